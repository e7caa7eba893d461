"""The catalogue of faults is whole, and the proof itself can fail: a harmless fault survives, a crash is no kill."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import torch

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import TensorResult
from proof import doses
from proof.catalogue import NOWHERE, CatalogueError, Change, Fault, Kind, load_faults
from proof.changes import AMONG, ONE, changed
from proof.functions import FUNCTIONS, Running, output
from proof.io_faults import IO
from proof.judging import Outcome, PlantedSource, Status, outcome, twin_problem
from proof.plant import REGISTERED, emitted
from proof.scores import markdown, proved, scores
from proof.source import check_anchors, edited, released_crate
from tests.support.planting import CASES, real, with_arrays

FAULTS = {fault.id: fault for fault in load_faults()}
LLAMA = "llama/hub"


@functools.cache
def judged_names(case_id: str) -> tuple[TensorResult, ...]:
    from candle_mi_parity.compare.compare import compare

    there = real(case_id)
    return tuple(compare(there.truth, there.emitted, there.decoder, None))


@functools.cache
def twin(case_id: str) -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        return twin_problem(PlantedSource(None, Path(scratch)), case_id)


def became(fault: Fault, directory: Path) -> Outcome:
    return outcome(fault, PlantedSource(fault, directory), twin)


# --- the catalogue --------------------------------------------------------------------------------


def test_the_catalogue_has_its_size_in_every_kind() -> None:
    faults = list(FAULTS.values())
    assert len(faults) >= 80
    assert sum(fault.written_before_run for fault in faults) >= len(faults) / 3
    assert sum(fault.source is not None for fault in faults) >= 10
    assert set(Counter(fault.kind for fault in faults)) == set(get_args(Kind))
    assert sum(fault.fast for fault in faults) >= 30


def test_what_a_row_names_is_there_and_nothing_idles() -> None:
    assert all(module.__name__.startswith("proof.") for module in REGISTERED)
    assert {fault.function for fault in FAULTS.values() if fault.function} == set(FUNCTIONS)
    assert {fault.io for fault in FAULTS.values() if fault.io} == set(IO)
    assert {fault.case for fault in FAULTS.values()} <= set(CASES)
    used = {change.change for fault in FAULTS.values() for change in (fault.weight, fault.tensor) if change}
    assert used == {*ONE, *AMONG}


@pytest.mark.parametrize("case_id", sorted({fault.case for fault in FAULTS.values() if fault.fast}))
def test_the_first_tensor_of_a_row_is_one_of_its_case(case_id: str) -> None:
    names = {result.name for result in judged_names(case_id)}
    for fault in FAULTS.values():
        if fault.case == case_id and fault.scored and not fault.refused and fault.reason != "unexpected":
            assert fault.first in names, fault.id


ROW = '[[fault]]\nid = "a"\nkind = "io"\nsays = "."\ncase = "llama/hub"\nfirst = "logits"\n'


@pytest.mark.parametrize(
    "text",
    [
        "format = 1\nfault = []",
        f'format = 2\n{ROW}io = "x"',
        f"format = 1\n{ROW}",
        f'format = 1\n{ROW}io = "x"'.replace("io", "odd", 1),
        f'format = 1\n{ROW}io = "x"\nodd = 1',
        f'format = 1\n{ROW}io = "x"\nfunction = "y"',
        f'format = 1\n{ROW}io = "x"\npredicted = "hook_embed"',
        f'format = 1\n{ROW}io = "x"\npredicted = "hook_embed"\nwhy = "."',
        f'format = 1\n{ROW}function = "x"\nrefused = true',
        f'format = 1\n{ROW}io = "x"\n{ROW}io = "x"\n',
    ],
)
def test_a_malformed_catalogue_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "faults.toml"
    path.write_text(text)
    with pytest.raises(CatalogueError, match=r"faults\.toml"):
        load_faults(path)
    path.write_text(f'format = 1\n{ROW}io = "x"')
    assert len(load_faults(path)) == 1


def test_a_change_that_finds_nothing_is_an_error() -> None:
    arrays = real(LLAMA).arrays
    for change in (
        Change(name="nowhere", change="zero"),
        Change(name="logits", change="take", other="nowhere"),
        Change(name="logits", change="odd"),
    ):
        with pytest.raises(CatalogueError):
            changed(arrays, change)


# --- candle-mi's own source -----------------------------------------------------------------------


@pytest.mark.rust
def test_every_anchor_in_candle_mi_is_there_exactly_once() -> None:
    check_anchors(list(FAULTS.values()), released_crate())


def test_a_dead_a_doubled_and_an_idle_anchor_are_errors() -> None:
    edit = FAULTS["source-gelu-erf"].source
    assert edit is not None
    assert edited(f"a {edit.find} b", edit) == f"a {edit.replace} b"
    for text, anchor in (("", edit), (edit.find * 2, edit)):
        with pytest.raises(CatalogueError, match="expected once"):
            edited(text, anchor)
    with pytest.raises(CatalogueError, match="replaced by itself"):
        edited(edit.find, edit.model_copy(update={"replace": edit.find}))


# --- the fast lane --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [fault.id for fault in FAULTS.values() if fault.fast])
def test_the_fast_lane_sees_each_fault_where_it_was_planted(tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    found = became(fault, tmp_path)
    assert (found.status, found.right) == (Status.KILLED if fault.scored else Status.EQUIVALENT, True), found


def test_a_fault_in_one_capture_accuses_no_other_tensor(tmp_path: Path) -> None:
    for name in ("hidden-states-as-output", "attn-out-is-resid-mid", "two-heads-swapped", "one-sign"):
        fault = FAULTS[name]
        there = real(fault.case)
        results = compare(there.truth, emitted(fault, there), None, None)
        failed = [result.name for result in results if result.status == "FAIL"]
        assert failed == [fault.first]


# --- the proof can fail ---------------------------------------------------------------------------


def made_up(monkeypatch: pytest.MonkeyPatch, disturb: object, first: str = "logits") -> Fault:
    monkeypatch.setitem(FUNCTIONS, "made_up", disturb)
    return Fault(id="made-up", kind="numerics", says=".", case=LLAMA, function="made_up", first=first)


def test_a_fault_that_does_nothing_is_equivalent_and_unproved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = became(made_up(monkeypatch, lambda run: None), tmp_path)
    assert (found.status, found.right) == (Status.EQUIVALENT, False)
    assert not proved([found])
    assert became(made_up(monkeypatch, lambda run: None, NOWHERE), tmp_path / "2").right


def test_a_fault_below_the_gate_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(run: Running) -> None:
        output(run.model.lm_head, lambda _, logits: logits * (1 + 1e-9))
        run.layers[0].mlp.down_proj.weight.data *= 1 + 2**-22

    found = became(made_up(monkeypatch, tiny), tmp_path)
    assert found.status is Status.SURVIVED, found
    assert not proved([found])
    assert "**Survivors**: 1" in markdown([found])


def test_a_crash_is_no_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(run: Running) -> None:
        raise RuntimeError("planted")

    found = became(made_up(monkeypatch, crash), tmp_path)
    assert (found.status, found.right) == (Status.ERROR, False)
    assert "planted" in found.detail
    assert not proved([found])


def test_a_refusal_for_another_reason_is_no_kill(tmp_path: Path) -> None:
    fault = FAULTS["case-stale"].model_copy(update={"first": "model digest is"})
    assert became(fault, tmp_path).status is Status.ERROR


def test_a_kill_at_another_tensor_is_no_proof(tmp_path: Path) -> None:
    fault = FAULTS["one-sign"].model_copy(update={"first": "logits"})
    found = became(fault, tmp_path)
    assert (found.status, found.right) == (Status.KILLED, False)
    assert not proved([found])
    assert "**Caught elsewhere**: 1" in markdown([found])


def test_a_kill_for_another_reason_is_no_proof(tmp_path: Path) -> None:
    found = became(FAULTS["one-sign"].model_copy(update={"reason": "shape"}), tmp_path)
    assert (found.status, found.right) == (Status.KILLED, False)


def test_a_harmless_fault_that_is_killed_is_no_proof(tmp_path: Path) -> None:
    found = became(FAULTS["one-sign"].model_copy(update={"first": NOWHERE}), tmp_path)
    assert not proved([found])


def test_a_twin_that_fails_makes_its_faults_errors(tmp_path: Path) -> None:
    fault = FAULTS["one-sign"]
    problem = twin_problem(PlantedSource(fault, tmp_path / "twin"), LLAMA)
    assert "blocks.1.mlp.hook_post" in problem
    found = outcome(fault, PlantedSource(fault, tmp_path), lambda _: problem)
    assert (found.status, found.detail) == (Status.ERROR, problem)


def test_the_score_of_what_was_foretold_takes_the_first_prediction(tmp_path: Path) -> None:
    fault = FAULTS["one-sign"].model_copy(
        update={"written_before_run": True, "predicted": "logits", "why": "a guess"}
    )
    found = became(fault, tmp_path)
    told = {score.name: score for score in scores([found])}
    assert (told["all"].right, told["written before"].right) == (1, 0)


# --- doses ----------------------------------------------------------------------------------------


def test_the_search_finds_the_least_dose_to_a_factor_of_two() -> None:
    for least in (doses.SMALLEST, -13, 0, doses.LARGEST):
        assert doses.smallest(lambda k, least=least: k >= least) == least  # type: ignore[misc]
    assert doses.smallest(lambda _: False) is None


def test_one_position_off_by_little_is_seen_where_it_is() -> None:
    there = real(LLAMA)

    def run(factor: float) -> doses.Seen:
        arrays = there.arrays
        doses.one_position(arrays, factor)
        return doses.seen(there, with_arrays(there.emitted, arrays))

    found = doses.dose(LLAMA, "free", "one position", run)
    assert found.first == "blocks.1.mlp.hook_post"
    assert found.gate is not None and found.gate < 1e-5
    assert found.gate == min(size for size in (found.position, found.element) if size is not None)


def test_a_model_is_as_it_was_after_a_dose() -> None:
    from candle_mi_parity.oracle.hooks import load_model

    model = load_model(real(LLAMA).subject.model_dir, torch.float32)
    before = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    numbers = (model.model.layers[0].self_attn.scaling, model.model.norm.variance_epsilon)  # type: ignore[union-attr, index]
    for name, plant in doses.IN_MODEL.items():
        if name != "softcap":
            with plant(model, 1.5):
                pass
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert numbers == (model.model.layers[0].self_attn.scaling, model.model.norm.variance_epsilon)  # type: ignore[union-attr, index]
