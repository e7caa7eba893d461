"""The hunt: inputs are drawn, judged, shrunk, explained and counted as they should be, and faults are found."""

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.hunt_result import Cause, Entry, HuntResult, Tally
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.errors import CaseTableError, ModelError, Stopped, TraceError
from candle_mi_parity.hunt import worker
from candle_mi_parity.hunt.bench import Answer, Bench, Found, message
from candle_mi_parity.hunt.genes import Genes, case_of, entries_of
from candle_mi_parity.hunt.grammar import Grammar, all_families, base_config, lengths_of
from candle_mi_parity.hunt.hunt import ROUND, Hunt, Limits
from candle_mi_parity.hunt.shrink import cause_of, smallest
from candle_mi_parity.hunt.worker import Worker
from candle_mi_parity.models.generate import generated_model, tensor_values
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle.built import built_model
from candle_mi_parity.oracle.hooks import load_model
from candle_mi_parity.repro.crate import Dependencies
from candle_mi_parity.run.hunt import HuntOptions, hunt
from candle_mi_parity.run.hunt_files import reproduce_causes
from candle_mi_parity.spec.cases import Layout, Statistic, TinyModel
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.families import FAMILIES, family_of
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import InMemory
from candle_mi_parity.trace.truth import Truth

KEYS = {family: {"rms_norm_eps", "hidden_act", "rope_theta", "sliding_window"} for family in FAMILIES}
Fault = Callable[[PreparedCase, dict[str, np.ndarray]], None]


class Faulty(TorchSource):
    """The control with a fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        made = super().trace(subject, mode, truth, inputs)
        arrays = {name: array.copy() for name, (array, _) in made.arrays.items()}
        self._fault(subject, arrays)
        return InMemory(
            {name: (array, None) for name, array in arrays.items()}, made.dtype, made.scalars, made.top_features
        )


def bench(directory: Path, fault: Fault = lambda subject, arrays: None) -> Bench:
    return Bench(Faulty(fault), NOTHING_KNOWN, directory / "scratch")


class Here(Executor):
    """Does the work at once, in this process."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*arguments, **named))
        except BrokenProcessPool as error:
            done.set_exception(error)
        return done


class Imagined(Bench):
    """Judges by the genes alone."""

    def __init__(self, directory: Path, answer: Callable[[str, Genes], Answer]) -> None:
        super().__init__(TorchSource(), NOTHING_KNOWN, directory / "scratch")
        self._imagined = answer

    def judge(self, family: str, genes: Genes, found: Sequence[Found] = ()) -> Answer:
        return self._imagined(family, genes)

    def numbers(self, family: str, genes: Genes) -> str:
        answer = self._imagined(family, genes)
        return answer.digest or answer.key


Answering = Callable[[str, Genes], Answer]


def digest_of(*slots: str) -> Answering:
    """Agrees; the numbers depend on some slots only."""
    return lambda family, genes: Answer("agree", digest=str([genes.get(slot) for slot in slots]))


def new_where(slot: str, value: list[Any]) -> Answering:
    def answer(family: str, genes: Genes) -> Answer:
        meets = genes.get(slot) == value
        return Answer("new", "", "logits", "values", digest="x") if meets else Answer("agree", digest=str(genes))

    return answer


def hunted(
    monkeypatch: pytest.MonkeyPatch, directory: Path, answer: Answering, inputs: int, result: HuntResult
) -> HuntResult:
    """A hunt in this process."""
    own = Worker(Imagined(directory, answer), NOTHING_KNOWN, directory, tempfile.TemporaryDirectory())
    monkeypatch.setattr(worker, "_worker", own)
    monkeypatch.setattr(worker, "_keys", lambda one: ("rope_theta", "use_cache") if one.family == "llama" else ())
    grammar = Grammar(result.families, {family: set(KEYS[family]) for family in result.families})
    limits = Limits(inputs=inputs, search=0.0)
    return Hunt(
        result, grammar, NOTHING_KNOWN, directory, limits, lambda found: None, start=lambda hunt: Here()
    ).run()


RELU = ["set", "relu"]


# --- The model in memory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_built_is_the_one_that_is_loaded(family: str, tmp_path: Path) -> None:
    for change in ({"tie_word_embeddings": True}, {"tie_word_embeddings": False, "attention_bias": True}):
        directory = generated_model(base_config(family) | {"num_hidden_layers": 1} | change, "hub", tmp_path)
        for dtype in (torch.float64, torch.bfloat16):
            offset = family_of(family).norm_offset
            made = lambda shapes: {n: tensor_values(n, shape, offset) for n, shape in shapes.items()}  # noqa: B023, E731
            ours, theirs = (
                dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
                for model in (built_model(directory, made, dtype), load_model(directory, dtype))
            )
            assert ours.keys() == theirs.keys()
            assert [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])] == []


def test_an_input_is_judged_as_its_row_of_the_table_is(tmp_path: Path) -> None:
    """The model in memory and its files are those that the case's row gives."""
    genes: Genes = {"weights.norm-negative": True, "config.rope_theta": ["set", 10.0]}
    model = case_of("gemma", genes).model
    assert isinstance(model, TinyModel)
    there = bench(tmp_path)
    oracle = there.oracle(case_of("gemma", genes))
    from candle_mi_parity.models.resolve import model_directory
    from candle_mi_parity.oracle.fields_read import fields_read

    directory = model_directory(model, tmp_path / "other")
    assert fields_read(directory) >= {"rms_norm_eps"}
    loaded = load_model(directory)
    ours = dict(oracle.computation.model.named_parameters())
    assert all(torch.equal(value, ours[name]) for name, value in loaded.named_parameters())
    files = [sorted(path.read_bytes() for path in where.iterdir()) for where in (directory, oracle.subject.model_dir)]
    assert files[0] == files[1]


@pytest.mark.parametrize("statistic", Statistic)
def test_every_statistic_changes_weights(statistic: Statistic, tmp_path: Path) -> None:
    config = base_config("starcoder2") | {"num_hidden_layers": 1, "tie_word_embeddings": False}
    plain, unusual = (generated_model(config, "hub", tmp_path, statistics=held) for held in ([], [statistic]))
    weights = [load_model(directory).state_dict() for directory in (plain, unusual)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_statistic_or_layout_that_concerns_nothing_is_refused(tmp_path: Path) -> None:
    tied = base_config("gemma") | {"num_hidden_layers": 1}
    with pytest.raises(ModelError, match="no tensor that the statistic head-equal"):
        generated_model(tied, "hub", tmp_path, statistics=[Statistic.HEAD_EQUAL])
    untied = base_config("llama") | {"num_hidden_layers": 1}
    with pytest.raises(ModelError, match="not tied"):
        generated_model(untied, "hub", tmp_path, layout=[Layout.STORED_HEAD])


def test_transformers_loads_the_same_numbers_from_every_layout(tmp_path: Path) -> None:
    config = base_config("gemma") | {"num_hidden_layers": 1}
    plain = load_model(generated_model(config, "hub", tmp_path)).state_dict()
    for layout in Layout:
        directory = generated_model(config, "hub", tmp_path, shards=2, layout=[layout])
        if layout is Layout.MISSING_NORM:
            with pytest.raises(ModelError, match=r"lacks model\.norm\.weight"):
                load_model(directory)
            continue
        loaded = load_model(directory).state_dict()
        exact = layout not in (Layout.FLOAT16, Layout.BFLOAT16)
        close = [torch.allclose(value, plain[name], rtol=0 if exact else 0.01) for name, value in loaded.items()]
        assert all(close) or layout is Layout.STORED_HEAD, layout


# --- Drawing


def test_a_seed_draws_the_same_inputs_and_another_seed_others() -> None:
    grammar = Grammar(all_families("*"), KEYS)

    def drawn(seed: int) -> list[tuple[str, Genes]]:
        return [grammar.draw(random.Random(f"{seed}:{i}"), [], lambda family, entry: 1.0, set()) for i in range(50)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert {family for family, _ in drawn(0)} == set(FAMILIES)


def test_what_is_drawn_is_a_case_or_does_not_fit_together() -> None:
    grammar = Grammar(all_families("*"), KEYS)
    cases, failed = [], []
    for place in range(400):
        family, genes = grammar.draw(random.Random(place), [], lambda family, entry: 1.0, set())
        assert json.loads(json.dumps(genes)) == genes
        try:
            cases.append(case_of(family, genes))
        except CaseTableError as error:
            failed.append(str(error))
    assert len(cases) > 390, failed
    assert {bool(case.sae) for case in cases} == {bool(case.edits) for case in cases} == {True, False}


def test_an_entry_that_changes_nothing_is_hardly_drawn() -> None:
    grammar = Grammar(["llama"], KEYS)
    dead = "config.rope_theta set 10.0"

    def share(weight: float) -> float:
        weigh = lambda family, name: weight if name == dead else 1.0  # noqa: E731
        drawn = [grammar.draw(random.Random(place), [], weigh, set())[1] for place in range(400)]
        return len([genes for genes in drawn if genes.get("config.rope_theta") == ["set", 10.0]]) / 400

    assert share(0.0) == 0.0 < share(1.0)


def test_pairs_of_entries_are_drawn_once_at_each_place_of_the_prompt() -> None:
    grammar, pairs = Grammar(["mistral"], {"mistral": {"sliding_window", "rms_norm_eps"}}), set[str]()
    drawn = [grammar.draw(random.Random(place), [], lambda family, entry: 1.0, pairs)[1] for place in range(2000)]
    both = [genes for genes in drawn if set(genes) == {"config.sliding_window", "config.rms_norm_eps", "tokens"}]
    lengths = {
        genes["tokens"]["random"]
        for genes in both
        if genes["config.sliding_window"] == ["set", 4] and genes["config.rms_norm_eps"] == ["set", 0.01]
    }
    assert {3, 4, 5} <= lengths, "at the window, below and above it"
    values = (len(grammar._values("mistral", key)) for key in ("sliding_window", "rms_norm_eps"))
    assert len(pairs) >= math.prod(values), "every pair of values"


def test_prompts_end_at_the_lengths_of_the_config() -> None:
    genes: Genes = {
        "config.sliding_window": ["set", 6],
        "config.rope_scaling": ["set", {"original_max_position_embeddings": 9}],
    }
    assert {6, 9} <= set(lengths_of("mistral", genes))


# --- Judging and shrinking


def test_the_control_agrees_and_a_refusal_is_counted_by_its_message(tmp_path: Path) -> None:
    there = bench(tmp_path)
    assert there.judge("llama", {}).kind == "agree"
    answer = there.judge("llama", {"config.hidden_act": ["set", "no such"]})
    assert answer.kind == "no-truth" and "transformers cannot run this config" in answer.key
    assert str(tmp_path) not in answer.key
    assert message(ModelError("/a/b/config.json: 12 of 3.5e-7")) == "…: N of N"


def test_a_fault_of_this_suite_is_no_divergence(tmp_path: Path) -> None:
    def fault(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
        raise ZeroDivisionError("planted")

    answer = bench(tmp_path, fault).judge("llama", {})
    assert (answer.kind, answer.detail) == ("fault", "ZeroDivisionError: planted")


@pytest.mark.parametrize(("kind", "expected"), [("panic", "broken"), ("crash", "broken"), ("model", "refused")])
def test_a_candidate_that_fails_is_broken_and_one_that_refuses_refused(
    kind: str, expected: str, tmp_path: Path
) -> None:
    def fault(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
        raise EmitterError(kind, "planted 7")

    assert bench(tmp_path, fault).judge("llama", {}).kind == expected


def test_an_answer_to_something_else_is_broken(tmp_path: Path) -> None:
    def fault(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
        raise TraceError("of something else")

    answer = bench(tmp_path, fault).judge("llama", {})
    assert (answer.kind, answer.first, answer.detail) == ("broken", "trace", "of something else")


def two_keys_and_a_boundary(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
    config = json.loads((subject.model_dir / "config.json").read_text())
    meets = config["sliding_window"] == len(subject.tokens[0]) and config["rms_norm_eps"] == 0.01
    arrays["logits"] *= 1.01 if meets else 1


def test_a_divergence_is_shrunk_to_the_genes_that_it_needs(tmp_path: Path) -> None:
    there = bench(tmp_path, two_keys_and_a_boundary)
    needed: Genes = {
        "config.sliding_window": ["set", 4],
        "config.rms_norm_eps": ["set", 0.01],
        "tokens": {"random": 4},
    }
    more: Genes = {"config.rope_theta": ["set", 10.0], "weights.embedding-mean": True, "layout.float16": True}
    answer = there.judge("mistral", needed | more)
    assert (answer.kind, answer.first, answer.reason) == ("new", "logits", "values")
    assert there.judge("mistral", more | {"tokens": {"random": 4}}).kind == "agree"
    found, _ = smallest(lambda genes: there.judge("mistral", genes), needed | more, answer)
    assert found == needed
    cause = cause_of(there, "mistral", needed | more, answer, [], NOTHING_KNOWN, tmp_path, 0.0)
    assert cause.genes == needed and cause.smallest["model"]["change"]["sliding_window"] == 4


def test_float16_loses_numbers_below_its_normal_range(tmp_path: Path) -> None:
    """Their rounding error does not scale with the number; the control once failed here."""
    assert bench(tmp_path).judge("phi3", {"dtype": "float16", "weights.matrices-tiny": True}).kind == "unmeasured"


# --- The loop


def test_a_divergence_is_found_once_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = new_where("config.hidden_act", RELU)
    result = hunted(monkeypatch, tmp_path, answer, 5 * ROUND, HuntResult("torch", 3, ["mistral"]))
    [cause] = result.causes
    assert cause.genes == {"config.hidden_act": RELU, "tokens": {"random": 1}}
    assert (cause.what, cause.first, cause.reason) == ("mistral", "logits", "values")
    assert cause.count > 1, "the others are the same cause"
    assert result.verdict is Verdict.FAIL and result.tried == 5 * ROUND
    agree = result.tallies["forward"].agree
    assert agree + cause.count == 5 * ROUND, "every input is counted once"
    assert sum(result.position.values()) == sum(result.element.values()) == agree


def test_two_divergences_are_two_causes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, other = new_where("config.hidden_act", RELU), new_where("config.rope_theta", ["null"])

    def either(family: str, genes: Genes) -> Answer:
        found = one(family, genes)
        return found if found.kind == "new" else replace(other(family, genes), first="hook_embed")

    result = hunted(monkeypatch, tmp_path, either, 5 * ROUND, HuntResult("torch", 3, ["mistral"]))
    assert sorted(cause.first for cause in result.causes) == ["hook_embed", "logits"]


def test_a_fault_at_the_same_tensor_as_another_is_a_cause_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other values of a key, and another key: what is left of an input without a cause is judged again."""
    wrong = {"config.hidden_act": [["set", "gelu"], RELU], "config.rope_theta": [["null"]]}

    def answer(family: str, genes: Genes) -> Answer:
        meets = any(genes.get(slot) in values for slot, values in wrong.items())
        return Answer("new", "", "logits", "values", digest="x") if meets else Answer("agree", digest=str(genes))

    result = hunted(monkeypatch, tmp_path, answer, 10 * ROUND, HuntResult("torch", 3, ["mistral"]))
    found = {(slot, str(value)) for cause in result.causes for slot, value in cause.genes.items() if slot != "tokens"}
    assert found == {(slot, str(value)) for slot, values in wrong.items() for value in values}
    assert all(len(cause.genes) == 2 for cause in result.causes), "one gene and the prompt"


def test_a_panic_with_another_message_is_a_cause_of_its_own(tmp_path: Path) -> None:
    def panics(said: str) -> Answer:
        def fault(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
            raise EmitterError("panic", said)

        return bench(tmp_path, fault).judge("llama", {})

    one, same, other = (panics(said) for said in ("index 3 of 2", "index 7 of 5", "unwrap on a None"))
    assert one.signature == same.signature != other.signature


def test_a_hunt_goes_on_as_if_it_had_not_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hunt(result: HuntResult, inputs: int) -> HuntResult:
        return hunted(monkeypatch, tmp_path, new_where("config.hidden_act", RELU), inputs, result)

    whole = hunt(HuntResult("torch", 3, ["mistral", "llama"]), 2 * ROUND)
    half = hunt(HuntResult("torch", 3, ["mistral", "llama"]), ROUND)
    half.write(tmp_path / "hunt.json")
    again = hunt(HuntResult.read(tmp_path / "hunt.json"), ROUND)
    assert replace(again, seconds=0.0) == replace(whole, seconds=0.0)
    assert whole.rounds == 2 and whole != half


def test_an_entry_that_never_changes_anything_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = digest_of("config.rms_norm_eps", "config.rope_theta")
    result = hunted(monkeypatch, tmp_path, answer, 10 * ROUND, HuntResult("torch", 0, ["llama"]))
    assert "config.sliding_window set 1" in result.dead
    assert not any(name.startswith(("config.rms_norm_eps", "config.rope_theta")) for name in result.dead)


def test_an_entry_that_one_family_reads_is_not_dead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(family: str, genes: Genes) -> Answer:
        return Answer("agree", digest=str(genes.get("config.sliding_window")) if family == "mistral" else "same")

    result = hunted(monkeypatch, tmp_path, answer, 10 * ROUND, HuntResult("torch", 0, ["llama", "mistral"]))
    assert not any("sliding_window" in name for name in result.dead)
    assert any("hidden_act" in name for name in result.dead)


def test_an_input_on_which_this_suite_dies_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(family: str, genes: Genes) -> Answer:
        if genes.get("config.hidden_act") == RELU:
            raise BrokenProcessPool("planted")
        return Answer("agree", digest=str(genes))

    result = hunted(monkeypatch, tmp_path, answer, 2 * ROUND, HuntResult("torch", 3, ["mistral"]))
    assert list(result.faults) == ["the process of this suite died"]
    assert result.verdict is Verdict.ERROR and result.tried == 2 * ROUND


def test_a_long_round_says_what_is_being_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The judgement of inputs and the search of one cause may each take minutes."""
    notes: list[str] = []

    def answer(family: str, genes: Genes) -> Answer:
        time.sleep(0.002)
        return new_where("config.hidden_act", RELU)(family, genes)

    monkeypatch.setattr("candle_mi_parity.hunt.hunt.NOTE_SECONDS", 0.005)
    own = Worker(Imagined(tmp_path, answer), NOTHING_KNOWN, tmp_path, tempfile.TemporaryDirectory())
    monkeypatch.setattr(worker, "_worker", own)
    monkeypatch.setattr(worker, "_keys", lambda one: ())
    grammar, limits = Grammar(["mistral"], {"mistral": set(KEYS["mistral"])}), Limits(inputs=384, search=0.0)
    result = HuntResult("torch", 3, ["mistral"])
    start = lambda hunt: ThreadPoolExecutor(1)  # noqa: E731
    Hunt(result, grammar, NOTHING_KNOWN, tmp_path, limits, lambda found: None, start=start, note=notes.append).run()
    assert sum(note.endswith("judging round 1") for note in notes) > 12, "more than one for each chunk"
    searching = [
        note for note in notes if note.endswith("shrinking and explaining what differs in mistral at logits")
    ]
    assert len(searching) > len(result.causes) == 1


def test_what_was_reached_first_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(family: str, genes: Genes) -> Answer:
        return Answer("refused", "no relu") if genes.get("config.hidden_act") == RELU else Answer("agree")

    result = hunted(monkeypatch, tmp_path, answer, 2 * ROUND, HuntResult("torch", 1, ["llama"]))
    assert set(result.seen) == {"refused: no relu", "llama reads rope_theta", "llama reads use_cache"}
    assert len(result.corpus) == 2, "the keys were read first by one input, the refusal came first from another"
    assert any(name == "llama: config.use_cache null" for name in result.entries), "a key that was read is varied"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Verdict.PASS),
        ({"tallies": {"forward": Tally(tried=3, no_truth={"x": 3})}}, Verdict.ERROR),
        ({"tallies": {"forward": Tally(tried=3, refused={"x": 2}, unmeasured=1)}}, Verdict.ERROR),
        ({"faults": {"x": 1}}, Verdict.ERROR),
        ({"causes": [Cause("forward", "llama", "logits", "values", "", {})]}, Verdict.FAIL),
    ],
    ids=["agrees", "nothing was judged", "all was refused or too noisy", "a fault of the suite", "a cause"],
)
def test_the_verdict(change: dict[str, Any], expected: Verdict) -> None:
    result = HuntResult("torch", 0, ["llama"], tallies={"forward": Tally(tried=3, agree=3)})
    for name, value in change.items():
        setattr(result, name, value)
    assert result.verdict is expected


def test_a_file_that_is_no_hunt_is_refused(tmp_path: Path) -> None:
    HuntResult("torch", 0, ["llama"], entries={"x": Entry(1)}).write(tmp_path / "hunt.json")
    held = json.loads((tmp_path / "hunt.json").read_text())
    for change in ({"format": "other/1"}, {"seed": "x"}, {"tallies": 3}):
        (tmp_path / "hunt.json").write_text(json.dumps(held | change))
        with pytest.raises(TraceError, match=r"hunt\.json"):
            HuntResult.read(tmp_path / "hunt.json")


# --- The end of a hunt


def with_a_mean(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
    arrays["logits"] *= 1.01 if arrays["hook_embed"].mean() > 2 else 1


def causes_of(monkeypatch: pytest.MonkeyPatch, directory: Path, fault: Fault, causes: list[Cause]) -> HuntResult:
    """The result whose causes were reproduced from a faulty control that passes for candle-mi 0.2.2."""
    crate = Dependencies("", "", None, b"", directory)
    monkeypatch.setattr("candle_mi_parity.run.hunt_files.open_source", lambda *arguments: Faulty(fault))
    monkeypatch.setattr("candle_mi_parity.run.hunt_files.dependencies", lambda *arguments: crate)
    result = HuntResult("0.2.2", 0, ["llama"], "0.2.2", causes=causes)
    result.tallies["forward"] = Tally(tried=3)
    reproduce_causes(result, directory / "out", directory / "cache", lambda line: None)
    assert HuntResult.read(directory / "out" / "hunt.json") == result
    return result


def test_a_cause_names_its_reproduction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = bench(tmp_path, with_a_mean)
    genes: Genes = {"weights.embedding-mean": True, "tokens": {"random": 2}}
    cause = cause_of(there, "llama", genes, there.judge("llama", genes), [], NOTHING_KNOWN, tmp_path, 0.0)
    result = causes_of(monkeypatch, tmp_path, with_a_mean, [replace(cause), replace(cause, first="hook_embed")])
    assert [each.folder for each in result.causes] == ["causes/1", ""]
    assert result.causes[1].no_folder == "another divergence comes first, at logits"
    [model] = (tmp_path / "out" / "causes" / "1" / "tests").glob("*/model/model.safetensors")
    assert load_file(model)["model.embed_tokens.weight"].mean() > 2
    assert 'href="causes/1/ISSUE.md"' in (tmp_path / "out" / "hunt.html").read_text()
    assert not (tmp_path / "out" / "causes" / "2").exists()


def test_a_cause_without_a_reproduction_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def row(**fields: Any) -> dict[str, Any]:
        return case_of("llama", fields.pop("genes", {})).model_dump(mode="json", exclude={"unmeasured"}) | fields

    def fault(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
        if len(subject.tokens[0]) == 3:
            raise ZeroDivisionError("planted")
        arrays["sae.features" if "sae.features" in arrays else "logits"] *= 1.01

    add = {"kind": "add", "hook": "blocks.0.attn.hook_q", "seed": 0}
    expected = {
        "a Rust test is written for forward passes only": Cause("call", "f", "result", "values", "", {}),
        "the candidate ended with a panic": Cause("forward", "llama", "panic", "panic", "", row()),
        "SAE in Gemma Scope's layout": Cause("forward", "llama", "sae.features", "values", "",
                                             row(genes={"sae.npz": 0.25})),
        "no Rust test is written for add": Cause("forward", "llama", "logits", "values", "", row(edits=[add])),
        "a fault of this suite: ZeroDivisionError: planted": Cause("forward", "llama", "logits", "values", "",
                                                                  row(tokens={"random": 3})),
    }  # fmt: skip
    late = [Cause("forward", "llama", "logits", "values", "", row()) for _ in range(3)]
    monkeypatch.setattr("candle_mi_parity.run.hunt_files.MOST_FOLDERS", 3)
    result = causes_of(monkeypatch, tmp_path, fault, [*expected.values(), *late])
    for reason, cause in expected.items():
        assert reason in cause.no_folder and not cause.folder
    assert all(cause.no_folder.startswith("only 3 causes are reproduced") for cause in late)
    assert not (tmp_path / "out" / "causes").exists()
    assert all(cause.no_folder for cause in result.causes)


@pytest.mark.parametrize(("name", "reproduces"), [("SIGINT", True), ("SIGTERM", False)])
def test_a_hunt_that_is_stopped_leaves_its_last_whole_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, reproduces: bool
) -> None:
    def run(hunt: Hunt) -> HuntResult:
        hunt.result.causes.append(Cause("call", "f", "result", "values", "", {}))
        hunt.result.tallies["forward"], hunt.result.rounds = Tally(tried=96), 1
        hunt.tell(hunt.result)
        hunt.result.tallies["forward"].tried += 40
        raise Stopped(name)

    for old in ("hunt.json", "hunt.html", "causes/1/ISSUE.md"):
        (tmp_path / "out" / old).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / old).write_text("of another hunt")
    monkeypatch.setattr(Hunt, "run", run)
    options = HuntOptions("torch", families="llama", out=tmp_path / "out")
    with pytest.raises(Stopped):
        hunt(options, lambda line: None, lambda found: None)
    found = HuntResult.read(tmp_path / "out" / "hunt.json")
    assert found.tried == 96 and bool(found.causes[0].no_folder) == reproduces
    page = (tmp_path / "out" / "hunt.html").read_text()
    assert "96 tried" in page and page.endswith("</html>")
    assert f"candle-mi-parity hunt --candidate torch --seed 0 --families llama --out {tmp_path}/out --resume" in page
    assert not (tmp_path / "out" / "causes").exists()


def test_the_entries_of_an_input() -> None:
    genes: Genes = {
        "config.a": ["set", {"b": 1}],
        "config.c": ["null"],
        "weights.norm-zero": True,
        "tokens": {},
        "shards": 2,
    }
    assert entries_of(genes) == {"config.a.b=1": "config.a", "config.c null": "config.c",
                                 "weights.norm-zero": "weights.norm-zero", "shards=2": "shards"}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
