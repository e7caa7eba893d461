"""The loop of a hunt: what is found once, counted, kept, written, and gone on with."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import LiveSource
from candle_mi_parity.compare.hunt_result import Cause, HuntResult, Tally
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.errors import Stopped
from candle_mi_parity.hunt import worker
from candle_mi_parity.hunt.bench import Answer
from candle_mi_parity.hunt.genes import Genes, case_of
from candle_mi_parity.hunt.grammar import Grammar
from candle_mi_parity.hunt.hunt import ROUND, Hunt, Limits
from candle_mi_parity.hunt.shrink import cause_of
from candle_mi_parity.hunt.worker import Report, Worker
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.repro.crate import Dependencies
from candle_mi_parity.run.hunt import HuntOptions, hunt
from candle_mi_parity.run.hunt_files import reproduce_causes
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from tests.support.hunting import (
    KEYS,
    RELU,
    Fault,
    Faulty,
    Here,
    Imagined,
    bench,
    digest_of,
    hunted,
    new_where,
)

pytestmark = pytest.mark.usefixtures("one_thread")

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


def test_an_input_on_which_this_suite_dies_while_it_shrinks_is_a_cause_as_it_was_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def dies(*_: object) -> Cause:
        raise BrokenProcessPool("planted")

    monkeypatch.setattr(worker, "close_in", dies)
    answer = new_where("config.hidden_act", RELU)
    result = hunted(monkeypatch, tmp_path, answer, 3 * ROUND, HuntResult("torch", 3, ["mistral"]))
    assert result.tried == 3 * ROUND and result.verdict is Verdict.FAIL
    told = "the process of this suite died while it shrank this input"
    assert result.faults == {told: len(result.causes)}
    for cause in result.causes:
        assert cause.detail == f"broken: {told}; " and cause.genes["config.hidden_act"] == RELU
        assert answer(cause.what, cause.genes).kind == "new" and Case.model_validate(cause.smallest)


def test_a_process_that_dies_between_two_submissions_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Dead(Here):
        def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
            raise BrokenProcessPool("planted")

    pools: list[Executor] = [Here(), Dead()]
    limits = Limits(inputs=ROUND, search=0.0)
    monkeypatch.setattr(worker, "judge_all", lambda inputs, found: [Report(one, Answer("agree")) for one in inputs])
    grammar = Grammar(["mistral"], {"mistral": set(KEYS["mistral"])})
    result = HuntResult("torch", 3, ["mistral"])
    start = lambda hunt: pools.pop()  # noqa: E731
    Hunt(result, grammar, NOTHING_KNOWN, tmp_path, limits, lambda found: None, start=start).run()
    assert result.tallies["forward"].agree == ROUND and not result.faults and not pools


def test_a_long_round_says_what_is_being_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The judgement of inputs and the search of one cause may each take minutes."""
    notes: list[str] = []
    judging, searching = "judging round 1", "shrinking and explaining what differs in mistral at logits"
    until = time.monotonic() + 30

    def count(doing: str) -> int:
        return sum(note.endswith(doing) for note in notes)

    def long(work: Callable[..., Any], doing: str, wanted: int) -> Callable[..., Any]:
        """The work takes as long as the notes on it."""

        def done(*given: Any) -> Any:
            while count(doing) < wanted and time.monotonic() < until:
                time.sleep(0.001)
            return work(*given)

        return done

    monkeypatch.setattr("candle_mi_parity.hunt.hunt.NOTE_SECONDS", 0.005)
    monkeypatch.setattr(worker, "judge_all", long(worker.judge_all, judging, 13))
    monkeypatch.setattr(worker, "close_in", long(worker.close_in, searching, 2))
    answer = new_where("config.hidden_act", RELU)
    own = Worker(Imagined(tmp_path, answer), NOTHING_KNOWN, tmp_path, tmp_path)
    monkeypatch.setattr(worker, "_worker", own)
    monkeypatch.setattr(worker, "_keys", lambda one: ())
    grammar, limits = Grammar(["mistral"], {"mistral": set(KEYS["mistral"])}), Limits(inputs=384, search=0.0)
    result = HuntResult("torch", 3, ["mistral"])
    start = lambda hunt: ThreadPoolExecutor(1)  # noqa: E731
    Hunt(result, grammar, NOTHING_KNOWN, tmp_path, limits, lambda found: None, start=start, note=notes.append).run()
    assert count(judging) > 12, "more than one for each chunk"
    assert count(searching) > len(result.causes) == 1


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


def test_a_message_with_the_word_reads_is_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = HuntResult("torch", 1, ["llama"], seen={"refused: candle-mi reads nothing": 1})
    hunted(monkeypatch, tmp_path, digest_of(), ROUND, result)


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


@pytest.mark.thorough
def test_one_process_and_two_hunt_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def of(processes: int) -> HuntResult:
        monkeypatch.setattr("os.cpu_count", lambda: processes)
        options = HuntOptions("torch", inputs=ROUND, seed=5, families="llama", out=tmp_path / str(processes))
        return replace(hunt(options, lambda line: None, lambda found: None), seconds=0.0, command="")

    assert of(1) == of(2)


def test_what_a_search_reached_is_not_laid_to_the_next_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The candidate's process may have been started by direct calls, which leave no trace."""

    class Counted:
        profile = tmp_path / "counters"
        now = np.array([0, 0])

        def counts(self) -> np.ndarray:
            return self.now.copy()

        def taken(self, before: np.ndarray | None) -> np.ndarray:
            return np.asarray(self.now > (0 if before is None else before))

    counted, source = Counted(), object.__new__(LiveSource)
    source.branches, source.made = counted, {}  # type: ignore[assignment]
    there = Imagined(tmp_path, lambda family, genes: Answer("agree"))
    there.source = source
    own = Worker(there, NOTHING_KNOWN, tmp_path, tmp_path)
    monkeypatch.setattr(worker, "_worker", own)
    assert worker._taken(worker._counts()) == (), "the process was not started"
    counted.profile.write_text("started by a search, which reached the first region")
    counted.now[0] = 7
    before = worker._counts()
    counted.now[1] = 1
    assert worker._taken(before) == (1,)
