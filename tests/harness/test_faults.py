"""The fast seeded faults; and a fault that survives, or a crash, does not count as detected."""

import functools
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.hunt_result import Cause, HuntResult
from tests.support.planting import CASES, real
from validation.array_changes import AMONG, ONE
from validation.catalogue import NOWHERE, CatalogueError, Fault, Kind, load_faults
from validation.disturb import FUNCTIONS, Running, directly, output
from validation.faults import Detection, PlantedSource, detect, twin_problem
from validation.hunted import FAULT, is_the_fault
from validation.mistakes import load_mistakes
from validation.plant import REGISTERED, emitted
from validation.source_faults import check_anchors, edited, released_crate
from validation.trace_faults import IO

FAULTS = {fault.id: fault for fault in load_faults()}
LLAMA = "llama/hub"


@functools.cache
def twin(case_id: str) -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        return twin_problem(PlantedSource(None, Path(scratch)), case_id)


def became(fault: Fault, directory: Path) -> Detection:
    return detect(fault, PlantedSource(fault, directory), twin)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", [fault.id for fault in FAULTS.values() if fault.fast])
def test_a_fault_is_detected_where_it_was_planted(tmp_path: Path, name: str) -> None:
    found = became(FAULTS[name], tmp_path)
    assert found.right, found


def test_a_fault_in_one_capture_accuses_no_other_tensor() -> None:
    for name in ("hidden-states-as-output", "attn-out-is-resid-mid", "two-heads-swapped", "one-sign"):
        fault = FAULTS[name]
        there = real(fault.case)
        results = compare(there.truth, emitted(fault, there), None, None)
        assert [result.name for result in results if result.status == "FAIL"] == [fault.first]


# --- the catalogue --------------------------------------------------------------------------------


def test_the_catalogue_covers_every_kind_and_uses_everything() -> None:
    faults = list(FAULTS.values())
    assert len(faults) >= 200 and sum(fault.source is not None for fault in faults) >= 10
    assert set(Counter(fault.kind for fault in faults)) == set(get_args(Kind))
    assert REGISTERED and {fault.function for fault in faults if fault.function} == set(FUNCTIONS)
    assert {fault.io for fault in faults if fault.io} == set(IO)
    assert {fault.case for fault in faults} <= set(CASES)
    used = {change.change for fault in faults for change in (fault.weight, fault.tensor) if change}
    assert used == {*ONE, *AMONG}


@pytest.mark.rust
def test_every_anchor_in_candle_mi_is_there_exactly_once() -> None:
    sources = [fault.source for fault in FAULTS.values() if fault.source]
    check_anchors([*sources, *(mistake.edit for mistake in load_mistakes()), FAULT], released_crate())


def test_only_a_cause_with_both_keys_is_the_fault_that_a_hunt_must_find() -> None:
    def result(first: str, *keys: str) -> HuntResult:
        cause = Cause(
            "forward", "mistral", first, "values", "", {}, genes={f"config.{key}": ["null"] for key in keys}
        )
        return HuntResult("path:x", 0, ["mistral"], causes=[cause])

    assert is_the_fault(result("logits", "sliding_window", "rope_theta"))
    assert not is_the_fault(result("logits", "sliding_window"))
    assert not is_the_fault(result("hook_embed", "sliding_window", "rope_theta"))


def test_a_dead_a_doubled_and_an_idle_anchor_are_errors() -> None:
    edit = FAULTS["source-gelu-erf"].source
    assert edit is not None
    assert edited(f"a {edit.find} b", edit) == f"a {edit.replace} b"
    for text in ("", edit.find * 2):
        with pytest.raises(CatalogueError, match="expected once"):
            edited(text, edit)
    with pytest.raises(CatalogueError, match="replaced by itself"):
        edited(edit.find, edit.model_copy(update={"replace": edit.find}))


# --- what does not count as detected --------------------------------------------------------------


def made_up(monkeypatch: pytest.MonkeyPatch, disturb: object, first: str = "logits") -> Fault:
    monkeypatch.setitem(FUNCTIONS, "made_up", (directly, disturb))
    return Fault(id="made-up", kind="numerics", says=".", case=LLAMA, function="made_up", first=first)


def test_a_fault_below_the_gate_and_a_crash_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(run: Running) -> None:
        output(run.model.lm_head, lambda _, logits: logits * (1 + 1e-9))
        run.layers[0].mlp.down_proj.weight.data *= 1 + 2**-22

    def crash(run: Running) -> None:
        raise RuntimeError("planted")

    found = became(made_up(monkeypatch, tiny), tmp_path)
    assert (found.found, found.right) == (NOWHERE, False)
    found = became(made_up(monkeypatch, crash), tmp_path)
    assert "planted" in found.error and not found.right


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("case-stale", {"first": "model digest is"}),
        ("one-sign", {"first": "logits"}),
        ("one-sign", {"reason": "shape"}),
        ("one-sign", {"first": NOWHERE}),
        ("max-position-doubled", {"first": "logits"}),
    ],
)
def test_what_the_catalogue_does_not_predict_is_not_right(
    tmp_path: Path, name: str, expected: dict[str, str]
) -> None:
    assert became(FAULTS[name], tmp_path / "right").right
    assert not became(FAULTS[name].model_copy(update=expected), tmp_path / "wrong").right


def test_a_clean_twin_that_fails_proves_nothing(tmp_path: Path) -> None:
    fault = FAULTS["one-sign"]
    problem = twin_problem(PlantedSource(fault, tmp_path / "twin"), LLAMA)
    assert "blocks.1.mlp.hook_post" in problem
    found = detect(fault, PlantedSource(fault, tmp_path), lambda _: problem)
    assert found.error == problem and not found.right
