"""One input of a hunt: its model, how it is drawn, judged and shrunk."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.errors import CaseTableError, ModelError, TraceError
from candle_mi_parity.hunt.bench import message
from candle_mi_parity.hunt.edits import drawn_edit
from candle_mi_parity.hunt.genes import Genes, case_of, entries_of
from candle_mi_parity.hunt.grammar import Grammar, all_families, base_config, config_of, lengths_of
from candle_mi_parity.hunt.shrink import cause_of, smallest
from candle_mi_parity.models.generate import generated_model, tensor_values
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle.built import built_model
from candle_mi_parity.oracle.hooks import load_model
from candle_mi_parity.spec.cases import Layout, Statistic, TinyModel
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.families import MAPPED, RECURRENT, family_of, is_bidirectional
from tests.support.hunting import (
    KEYS,
    bench,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- The model in memory


@pytest.mark.parametrize("family", [*MAPPED, *RECURRENT])
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
    family = "rwkv6" if statistic.of_recurrence else "starcoder2"
    config = base_config(family) | {"num_hidden_layers": 1, "tie_word_embeddings": False}
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
        shards = 1 if layout is Layout.SHARDS_BESIDE else 2
        directory = generated_model(config, "hub", tmp_path, shards=shards, layout=[layout])
        if layout is Layout.MISSING_NORM:
            with pytest.raises(ModelError, match=r"lacks model\.norm\.weight"):
                load_model(directory)
            continue
        if layout is Layout.PICKLE:  # the truth is never of a pickle, and our generated ones are read here only
            files = sorted(directory.glob("pytorch_model-*.bin"))
            held = [torch.load(file, weights_only=True) for file in files]
            loaded = {name: value.double() for part in held for name, value in part.items()}
            assert len(files) == 2 and plain.keys() - loaded.keys() <= {"lm_head.weight"}
        else:
            loaded = load_model(directory).state_dict()
        exact = layout not in (Layout.FLOAT16, Layout.BFLOAT16)
        close = [torch.allclose(value, plain[name], rtol=0 if exact else 0.01) for name, value in loaded.items()]
        assert all(close) or layout is Layout.STORED_HEAD, layout


# --- Drawing


def test_a_seed_draws_the_same_inputs_and_another_seed_others() -> None:
    grammar = Grammar(all_families("*"), KEYS)

    def drawn(seed: int) -> list[tuple[str, Genes]]:
        return [grammar.draw(random.Random(f"{seed}:{i}"), [], lambda family, entry: 1.0, set()) for i in range(90)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert {family for family, _ in drawn(0)} == {*MAPPED, *RECURRENT}


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


def test_edits_of_later_keys_are_drawn_where_they_are_attended() -> None:
    def later(family: str, genes: Genes) -> bool:
        """Whether an attention edge with its key after its query is drawn."""
        bidirectional = is_bidirectional(config_of(family, genes))
        edits = [drawn_edit(random.Random(place), genes, bidirectional)["edit.0"] for place in range(600)]
        edges = [edge for edit in edits for edge in edit.get("spec", {}).get("edges", [])]
        return any(key > query for query, key in edges)

    assert later("a2d-qwen3", {}) and later("gemma", {"config.is_causal": ["null"]})
    assert not later("gemma", {}) and not later("qwen3", {"config.is_causal": ["set", True]})
    future: Genes = {
        "edit.0": {"kind": "steer", "hook": "blocks.0.attn.hook_pattern", "how": "set_value", "value": 0.5}
        | {"spec": {"edges": [[1, 3]]}}
    }
    assert case_of("Dream", future).edits and case_of("llama", future | {"config.is_causal": ["set", False]}).edits
    with pytest.raises(CaseTableError, match="in the future"):
        case_of("llama", future)


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


JUMP = {"sae.cfg.architecture": ["set", "jumprelu"]}


@pytest.mark.parametrize(
    ("genes", "kind"),
    [
        (JUMP | {"sae.threshold": 0.25}, "agree"),
        (JUMP | {"sae.threshold": 1e6}, "unmeasured"),
        ({"edit.0": {"kind": "zero", "hook": "blocks.0.mlp.hook_post"}}, "agree"),
        ({"edit.0": {"kind": "zero", "hook": "blocks.0.hook_resid_pre"}}, "unmeasured"),
    ],
    ids=["features fire", "no feature fires", "an MLP is 0", "almost everything is 0"],
)
def test_an_input_that_exercises_nothing_does_not_agree(tmp_path: Path, genes: Genes, kind: str) -> None:
    """As a case, which is UNMEASURED then; a fault is found all the same."""

    def fault(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
        arrays["logits"] += 1

    assert bench(tmp_path).judge("llama", genes).kind == kind
    assert bench(tmp_path, fault).judge("llama", genes).kind == "new"


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


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_model_of_unstated_size_is_refused_before_it_is_filled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str
) -> None:
    """transformers' defaults are the sizes of a large model."""

    def filled(*arguments: object) -> np.ndarray:
        raise AssertionError("weights were drawn")

    monkeypatch.setattr("candle_mi_parity.hunt.bench._values", filled)
    answer = bench(tmp_path).judge("llama", {f"config.{key}": ["absent"]})
    assert (answer.kind, answer.key) == ("no-truth", f"…: {key} is None, expected a positive whole number")


FALSE_ALARMS: dict[str, tuple[str, Genes, str]] = {
    "a weight that float32 rounds to 0 has its share of a steering": (
        "llama",
        {
            "weights.norm-large": True,
            "tokens": {"random": 5},
            "config.num_attention_heads": ["set", 2],
            "edit.0": {"kind": "steer", "hook": "blocks.0.attn.hook_pattern", "how": "set_value", "value": 1.0}
            | {"spec": {"layers": [0, 0], "edges": [[4, 3]]}},
        },
        "agree",
    ),
    "a product of query and key beyond float16": (
        "gemma",
        {
            "weights.norm-large": True,
            "tokens": {"random": 1},
            "dtype": "float16",
            "edit.0": {"kind": "add", "hook": "blocks.0.attn.hook_q", "seed": 2, "size": 10.0},
        },
        "unmeasured",
    ),
    "a GELU of large negative numbers alone": (
        "gemma2",
        {"weights.mlp-large": True, "config.intermediate_size": ["set", 1], "tokens": {"random": 5}},
        "unmeasured",
    ),
    "a softmax of float16 that is at one key or at another": (
        "Dream",
        {
            "recurrent": {"layers": [1, 1], "depth": 1, "feedback": [{"position": 2, "strength": -1.0, "seed": 0}]},
            "dtype": "float16",
            "weights.norm-large": True,
            "tokens": {"random": 12, "seed": 2},
        },
        "unmeasured",
    ),
}
"""What hunts of PyTorch in float32 and float16 called a divergence, and what it has to be called."""


@pytest.mark.parametrize("name", FALSE_ALARMS)
def test_what_was_a_false_alarm_is_none(name: str, tmp_path: Path) -> None:
    family, genes, kind = FALSE_ALARMS[name]
    answer = bench(tmp_path).judge(family, genes)
    assert (answer.kind, answer.detail) == (kind, "")
