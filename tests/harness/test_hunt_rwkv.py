"""Inputs of a hunt without attention: how they are drawn, judged and shrunk."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from candle_mi_parity.hunt.genes import Genes, case_of
from candle_mi_parity.hunt.grammar import Grammar, base_config
from candle_mi_parity.hunt.shrink import cause_of
from candle_mi_parity.models.generate import generated_model
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.models.unusual import varied
from candle_mi_parity.oracle.rwkv_hooks import alike
from candle_mi_parity.run.hunt import HuntOptions, hunt
from candle_mi_parity.spec import edits
from candle_mi_parity.spec.cases import RandomTokens, Statistic, TinyModel
from candle_mi_parity.spec.edits import StateSteer
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.families import RECURRENT
from candle_mi_parity.spec.hook_points import STATE, hook_names
from candle_mi_parity.spec.paths import cache_root
from tests.support.hunting import KEYS, bench

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_drawn_of_a_model_without_attention() -> None:
    """Nothing of attention; edits of the stream and of the state; prompts that are long enough to forget."""
    grammar = Grammar([*RECURRENT], KEYS)
    drawn = [grammar.draw(random.Random(i), [], lambda family, entry: 1.0, set()) for i in range(600)]
    slots = {slot for _, genes in drawn for slot in genes}
    assert not {"recurrent", "config.rope_scaling", "layout.no-prefix", "layout.stored-head"} & slots
    assert {"weights.decay-whole", "weights.key-tiny", "layers", "dtype", "edit.1", "shards"} <= slots
    cases = [case_of(family, genes) for family, genes in drawn]
    assert all(case.features == ["rwkv"] for case in cases)
    kinds = {(edit.kind, edit.hook.split(".", 2)[-1]) for case in cases for edit in case.edits}
    assert {("state_knockout", STATE), ("state_steer", STATE), ("patch_at", "hook_resid_pre")} <= kinds
    assert {hook for _, hook in kinds} == {
        STATE,
        "hook_embed",
        "hook_resid_pre",
        "hook_resid_post",
        "hook_final_norm",
    }
    for case in cases:
        assert isinstance(case.model, TinyModel)
        layers = case.model.change["num_hidden_layers"]
        assert isinstance(layers, int)
        edits.check(case.edits, hook_names(layers, True), 34, 0, None)
    steered = [edit for case in cases for edit in case.edits if isinstance(edit, StateSteer)]
    assert {edit.layers is None for edit in steered} == {True, False}
    assert max(case.tokens.random for case in cases if isinstance(case.tokens, RandomTokens)) >= 33
    assert {case.sae.point for case in cases if case.sae} == {"hook_resid_pre", "hook_resid_post"}


@pytest.mark.parametrize("family", RECURRENT)
def test_a_statistic_of_a_recurrent_model_changes_only_what_it_names(family: str, tmp_path: Path) -> None:
    config = base_config(family) | {"num_hidden_layers": 2}
    plain = load_file(generated_model(config, "hub", tmp_path) / "model.safetensors")
    changed = {
        statistic: {name for name, array in varied(plain, 0, [statistic]).items() if (array != plain[name]).any()}
        for statistic in Statistic
    }
    assert all(changed.values())
    norms = {name for name, array in plain.items() if name.endswith("weight") and array.ndim == 1}
    assert changed[Statistic.NORM_LARGE] == changed[Statistic.NORM_ZERO] == norms
    # Matrices alone: no norm, no bias, no embedding, and no vector that is stored as [1, 1, d].
    assert all(plain[name].squeeze().ndim > 1 for name in changed[Statistic.MATRICES_TINY])
    assert not {name for name in changed[Statistic.MATRICES_TINY] if "embed" in name}
    assert len(changed[Statistic.QUERY_LARGE]) == len(changed[Statistic.MLP_LARGE]) == 2


def test_a_recurrent_model_whose_heads_do_not_fit_has_no_truth(tmp_path: Path) -> None:
    """It has no head at all, so that there was no number to draw."""
    for family in RECURRENT:
        answer = bench(tmp_path).judge(family, {"config.hidden_size": ["set", 8]})
        assert answer.kind == "no-truth" and "a width of N is not a number of heads of N" in answer.key
    other = bench(tmp_path).judge("rwkv6", {"config.head_size_divisor": ["set", 2.0]})
    assert other.kind == "no-truth" and "expected int, got float" in other.key


@pytest.mark.thorough
def test_a_fault_in_a_state_that_is_steered_is_shrunk_to_one_position(tmp_path: Path) -> None:
    def fault(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
        config = json.loads((subject.model_dir / "config.json").read_text())
        steered = any(isinstance(edit, StateSteer) and 2 in edit.at for edit in subject.case.edits)
        arrays[f"blocks.0.{STATE}"] *= 1.01 if steered and config["norm_eps"] == 0.01 else 1

    steer = {"kind": "state_steer", "hook": f"blocks.0.{STATE}", "factor": 0.5, "at": [0, 2, 40], "layers": None}
    needed: Genes = {"config.norm_eps": ["set", 0.01], "edit.0": steer}
    more: Genes = {
        "weights.decay-weak": True,
        "layers": 2,
        "tokens": {"random": 13},
        "config.tie_word_embeddings": ["set", True],
    }
    there = bench(tmp_path, fault)
    answer = there.judge("rwkv7", needed | more)
    assert (answer.kind, answer.first) == ("new", f"blocks.0.{STATE}")
    cause = cause_of(there, "rwkv7", needed | more, answer, [], NOTHING_KNOWN, tmp_path, 0.0)
    assert cause.genes == needed | {"edit.0": steer | {"at": [2]}, "tokens": {"random": 1}}
    assert cause.smallest["features"] == ["rwkv"]


def test_equal_pairs_of_tokens_are_counted() -> None:
    assert [alike([row]) for row in ([7], [1, 2, 3, 1], [5, 5, 5, 5], [1, 2, 1, 2, 1])] == [1, 1, 3, 2]
    assert alike([[1, 2, 3], [4, 4, 4]]) == 2


@pytest.mark.thorough
@pytest.mark.parametrize(("family", "token"), [("rwkv6", 2), ("rwkv7", 1)])
def test_a_repeated_id_is_no_false_alarm_and_hides_no_fault(
    family: str, token: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision what each position writes is rounded alike."""

    def fault(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
        arrays[f"blocks.0.{STATE}"] *= 1.1

    genes: Genes = {"dtype": "float16", "weights.decay-weak": True, "tokens": [token] * 64}
    answer = bench(tmp_path).judge(family, genes)
    assert answer.kind in ("agree", "unmeasured") and answer.position < 4
    assert bench(tmp_path, fault).judge(family, genes).first == f"blocks.0.{STATE}"
    monkeypatch.setattr("candle_mi_parity.oracle.compute.alike", lambda tokens: 1)
    assert bench(tmp_path).judge(family, genes).first == f"blocks.0.{STATE}", "so that the factor is needed"


@pytest.mark.thorough
def test_a_hunt_of_the_control_finds_nothing(tmp_path: Path) -> None:
    options = HuntOptions("torch", inputs=192, families="rwkv*", seed=5, out=tmp_path / "out", cache=cache_root())
    found = hunt(options, lambda line: None, lambda result: None)
    forward = found.tallies["forward"]
    assert (found.causes, found.faults) == ([], {})
    assert forward.tried == 192 and forward.agree > 90 and not forward.refused
