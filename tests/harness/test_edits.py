"""Interventions that cannot be applied are refused, by the table or by the emitter.

Wrong interventions are planted in ``validation/faults.toml``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.requests import request
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.errors import CaseTableError, OracleError
from candle_mi_parity.judge.notes import edits_before
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.edits import StateKnockout, StateSteer
from candle_mi_parity.spec.paths import cache_root
from tests.support.planting import real

POST, SCORES, PATTERN = "blocks.1.hook_resid_post", "blocks.1.attn.hook_scores", "blocks.1.attn.hook_pattern"


def subject_with(*edits: dict[str, Any], base: str = "llama/edit-knockout") -> PreparedCase:
    row = real(base).subject.case.model_dump()
    return prepare(Case.model_validate({**row, "edits": list(edits)}), cache_root())


def knockout(**spec: Any) -> dict[str, Any]:
    return {"kind": "knockout", "hook": SCORES, "spec": spec}


STEER = {"kind": "steer", "hook": PATTERN, "how": "scale", "value": 2.0, "spec": {"edges": [[5, 2]]}}
INJECT = {"kind": "inject", "hook": POST, "position": 1, "features": [[0, 1.0]]}
KNOCKED = {"kind": "state_knockout", "hook": "blocks.1.rwkv.hook_state", "at": [2]}
STEERED = KNOCKED | {"kind": "state_steer", "factor": 2.0}
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown kind": ({"kind": "negate", "hook": POST}, "negate"),
    "an unknown key": ({"kind": "zero", "hook": POST, "position": 1}, "position"),
    "an unknown hook": ({"kind": "zero", "hook": "blocks.1.hook_resid"}, "no such hook point"),
    "a missing layer": ({"kind": "zero", "hook": "blocks.3.hook_resid_pre"}, "no such hook point"),
    "the logits": ({"kind": "zero", "hook": "logits"}, "no such hook point"),
    "a position past the prompt": ({"kind": "patch_at", "hook": POST, "position": 12}, "position 12 is outside"),
    "a replacement that would broadcast": (
        {"kind": "replace", "hook": POST, "shape": "[1, d]"},
        "takes no tensor of shape",
    ),
    "a vector for every head": (
        {"kind": "add", "hook": "blocks.1.attn.hook_q", "shape": "[d]"},
        "takes no tensor of shape",
    ),
    "a patch of all positions": (
        {"kind": "patch_at", "hook": POST, "position": 1, "shape": "[1, T, d]"},
        "takes no tensor of shape",
    ),
    "a negative position": ({"kind": "patch_at", "hook": POST, "position": -1}, "greater than or equal to 0"),
    "a patch of heads": ({"kind": "patch_at", "hook": "blocks.1.attn.hook_q", "position": 1}, "needs a hook [B, T"),
    "a factor of many bits": ({"kind": "scale", "hook": POST, "factor": 0.1}, "bfloat16"),
    "a factor of NaN": ({"kind": "scale", "hook": POST, "factor": float("nan")}, "bfloat16"),
    "a knockout of residuals": ({**knockout(edges=[[5, 2]]), "hook": POST}, "only at attn.hook_scores"),
    "a knockout of a head too many": (knockout(heads=[4], edges=[[5, 2]]), "head 4, but the model has 4"),
    "a knockout past the prompt": (knockout(edges=[[12, 2]]), "position 12 is outside"),
    "a knockout of nothing": (knockout(), "selects no entry"),
    "a range past the last layer": (knockout(layers=[1, 3], edges=[[5, 2]]), "layers [1, 3], but the model has 3"),
    "an empty range": (knockout(layers=[2, 1], edges=[[5, 2]]), "layers [2, 1]"),
    "half an edge": (knockout(edges=[[5]]), "at least 2 items"),
    "steering the scores": (STEER | {"hook": SCORES}, "only at attn.hook_pattern"),
    "a weight set in the future": (STEER | {"how": "set_value", "spec": {"edges": [[2, 5]]}}, "in the future"),
    "an injection without an SAE": (INJECT, "the case's SAE"),
    "a state of attention": (KNOCKED | {"hook": SCORES}, "only at rwkv.hook_state"),
    "a state that a transformer does not have": (KNOCKED, "no such hook point"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_applied_is_refused(name: str) -> None:
    row, message = BAD_ROWS[name]
    with pytest.raises((CaseTableError, ValidationError)) as refusal:
        subject_with(row)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"kind": "zero", "hook": "blocks.1.rwkv.hook_decay"}], "is a read-out"),
        ([KNOCKED | {"layers": [1, 3]}], "layers [1, 3], but the model has 3"),
        ([KNOCKED | {"layers": [2, 1]}], "layers [2, 1]"),
        ([KNOCKED | {"at": []}], "at least 1 item"),
        ([STEERED | {"factor": 0.1}], "bfloat16"),
        ([STEERED, KNOCKED, STEERED], "one state_steer a forward pass"),
    ],
)
def test_an_edit_of_a_state_that_cannot_be_applied_is_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises((CaseTableError, ValidationError)) as refusal:
        subject_with(*rows, base="rwkv7/hub")
    assert message in str(refusal.value)


def test_what_a_state_edit_scales() -> None:
    edits = subject_with(KNOCKED | {"layers": "all"}, STEERED | {"at": [1, 30]}, base="rwkv7/hub").case.edits
    knocked, steered = (edit for edit in edits if isinstance(edit, StateKnockout | StateSteer))
    assert [list(knocked.factors(layer, 4)) for layer in (0, 2)] == [[1, 1, 0, 1]] * 2
    assert [list(steered.factors(layer, 4)) for layer in (0, 1)] == [[1, 1, 1, 1], [1, 2, 1, 1]]


def test_a_later_key_may_be_steered_and_knocked_out_where_it_is_attended() -> None:
    plain, cut = (real(f"Dream/{name}").truth for name in ("edit-steer-set-future", "edit-knockout-future"))
    pattern = cut.tensors["blocks.0.attn.hook_pattern"]
    assert pattern.allowed is not None and not pattern.allowed[:, 1, 4].any()
    assert (pattern.value[..., 1, 4] == 0).all() and pattern.allowed.sum() == pattern.allowed.size - 4
    assert (plain.tensors["blocks.0.attn.hook_pattern"].value[..., 1, 4] > 0).all()


def test_edits_that_cannot_be_combined_or_have_no_truth() -> None:
    with pytest.raises(CaseTableError, match="cannot be combined"):
        subject_with(STEER, {"kind": "zero", "hook": POST})
    with pytest.raises(OracleError, match="all its keys knocked out"):
        Oracle(subject_with(knockout(from_positions=[5])), cache_root()).truth()
    with pytest.raises(OracleError, match="no teacher-forced truth"):
        real("llama/edit-add-stream").oracle.truth("forced")


def test_the_digest_depends_on_the_edits_and_their_order() -> None:
    zero: dict[str, Any] = {"kind": "zero", "hook": POST}
    scale = {"kind": "scale", "hook": POST, "factor": 0.5}
    rows = [[], [zero], [zero | {"hook": "blocks.0.hook_resid_post"}], [zero, scale], [scale, zero]]
    assert len({subject_with(*edits).digest for edits in rows}) == len(rows)
    # Stored traces refer to this digest: a case without edits keeps it.
    assert real("llama/hub").subject.digest == "722f957b2debc45563234785da9e03ce635ccf6c5d5ceb8dc530fc0b51bbd052"


def test_the_request_to_the_emitter_has_the_edit(tmp_path: Path) -> None:
    there = real("llama/edit-patch-at")
    asked: Any = request(there.subject, "free", there.inputs, tmp_path / "a.json", "cpu")
    assert asked["edits"][0] == {"kind": "patch_at", "hook": "hook_embed", "position": 0, "tensor": "edit.0"}


# --- the emitter refuses, in one line, what candle-mi would ignore

EDGE = {"edges": [[5, 2]]}
VECTOR, WHOLE = "edit.1", "edit.0"
PATCH: dict[str, Any] = {"kind": "patch_at", "hook": POST, "position": 1, "tensor": VECTOR}
KNOCKOUT = knockout(**EDGE)

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a missing layer": ("patch-at", {"kind": "zero", "hook": "blocks.9.hook_resid_post"}, "never reached"),
    "an unknown hook": ("patch-at", {"kind": "zero", "hook": "blocks.1.hook_residual"}, "never reached"),
    "another spelling": ("patch-at", {"kind": "zero", "hook": "blocks.01.hook_resid_post"}, "is spelt"),
    "a patch of heads": ("patch-at", PATCH | {"hook": "blocks.1.attn.hook_q"}, "PatchAt"),
    "a patch past the prompt": ("patch-at", PATCH | {"position": 12}, "position 12 is outside"),
    "a missing tensor": ("patch-at", {"kind": "add", "hook": POST, "tensor": "edit.99"}, "no tensor"),
    "a replacement of another shape": ("add-stream", {"kind": "replace", "hook": SCORES, "tensor": WHOLE}, "shape"),
    "a knockout of residuals": ("knockout", KNOCKOUT | {"hook": POST}, "attn.hook_scores"),
    "a knockout past the prompt": ("knockout", KNOCKOUT | {"spec": {"edges": [[12, 0]]}}, "out of range"),
    "a knockout of head 4 of 4": ("knockout", KNOCKOUT | {"spec": {"heads": [4], **EDGE}}, "head 4 out of range"),
    "a range of 4 layers of 3": ("knockout", KNOCKOUT | {"spec": {"layers": [0, 3], **EDGE}}, "layer range end"),
    "a knockout of layer 3 of 3": ("knockout", KNOCKOUT | {"hook": "blocks.3.attn.hook_scores"}, "layer 3 out of"),
    "steering of scores": ("knockout", STEER | {"hook": SCORES}, "attn.hook_pattern"),
    "a weight above 1": ("knockout", STEER | {"how": "set_value"}, "must be in [0, 1]"),
    "a negative weight": ("knockout", STEER | {"value": -2.0}, "non-negative"),
    "an injection without an SAE": ("knockout", INJECT, "needs an SAE"),
}


@pytest.fixture(scope="module")
def emitter() -> Iterator[EmitterProcess]:
    with EmitterProcess(build(parse_candidate("0.2.2"), cache_root(), print).path) as process:
        yield process


def asked(case_id: str, out: Path, edit: dict[str, Any]) -> dict[str, object]:
    there = real(case_id)
    return request(there.subject, "free", there.inputs, out, "cpu") | {"edits": [edit]}


@pytest.mark.rust
@pytest.mark.parametrize("name", REFUSED)
def test_an_intervention_that_candle_mi_ignores_is_refused(
    emitter: EmitterProcess, tmp_path: Path, name: str
) -> None:
    case, edit, message = REFUSED[name]
    with pytest.raises(EmitterError) as refusal:
        emitter.emit(asked(f"llama/edit-{case}", tmp_path / "a.json", edit), 60.0)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert refusal.value.kind in ("request", "forward")
    assert not (tmp_path / "a.json").exists()


@pytest.mark.rust
def test_a_feature_that_the_sae_does_not_have_is_refused(emitter: EmitterProcess, tmp_path: Path) -> None:
    edit = INJECT | {"features": [[100000, 1.0]]}
    with pytest.raises(EmitterError, match="feature index 100000 out of range"):
        emitter.emit(asked("gemma2/edit-inject", tmp_path / "a.json", edit), 60.0)


@pytest.mark.rust
def test_an_addition_that_would_make_more_rows_is_refused(emitter: EmitterProcess, tmp_path: Path) -> None:
    there = real("llama/edit-add-shapes")
    asked = request(there.subject, "free", there.inputs, tmp_path / "a.json", "cpu")
    with pytest.raises(EmitterError, match=r"edit\.4.* has shape \[3, 1, 64\]"):
        emitter.emit(asked | {"tokens": there.subject.tokens[:1]}, 60.0)


@pytest.mark.parametrize(
    ("first", "before"),
    [
        ("blocks.1.attn.hook_scores", []),
        ("blocks.1.attn.hook_pattern", ["knockout at blocks.1.attn.hook_scores"]),
        ("logits", ["knockout at blocks.1.attn.hook_scores", "zero at blocks.1.hook_resid_post"]),
    ],
)
def test_the_edits_before_a_divergence_are_those_whose_hook_lies_before_it(first: str, before: list[str]) -> None:
    """An edit acts after the tensor at its own hook was captured."""
    subject = subject_with(knockout(edges=[[5, 2]]), {"kind": "zero", "hook": POST})
    assert edits_before(TensorResult(first, Status.FAIL), subject) == before
