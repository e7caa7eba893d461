"""The emitter refuses, in one line, an intervention that candle-mi would ignore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.sources import request
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.pytest_plugin import missing_tool
from candle_mi_parity.spec.paths import cache_root
from tests.support.planting import real

POST, SCORES, PATTERN = "blocks.1.hook_resid_post", "blocks.1.attn.hook_scores", "blocks.1.attn.hook_pattern"
EDGE = {"edges": [[5, 2]]}
VECTOR, WHOLE = "edit.1", "edit.0"

PATCH: dict[str, Any] = {"kind": "patch_at", "hook": POST, "position": 1, "tensor": VECTOR}
KNOCKOUT: dict[str, Any] = {"kind": "knockout", "hook": SCORES, "spec": EDGE}
STEER: dict[str, Any] = {"kind": "steer", "hook": PATTERN, "how": "scale", "value": 2.0, "spec": EDGE}
INJECT: dict[str, Any] = {"kind": "inject", "hook": POST, "position": 1, "features": [[0, 1.0]]}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a missing layer": ("patch-at", {"kind": "zero", "hook": "blocks.9.hook_resid_post"}, "never reached"),
    "an unknown hook": ("patch-at", {"kind": "zero", "hook": "blocks.1.hook_residual"}, "never reached"),
    "another spelling": ("patch-at", {"kind": "zero", "hook": "blocks.01.hook_resid_post"}, "is spelt"),
    "a patch of heads": ("patch-at", PATCH | {"hook": "blocks.1.attn.hook_q"}, "PatchAt"),
    "a patch past the prompt": ("patch-at", PATCH | {"position": 12}, "position 12 is outside"),
    "an addition that would broadcast": ("patch-at", {"kind": "add", "hook": POST, "tensor": VECTOR}, "has shape"),
    "a missing tensor": ("patch-at", {"kind": "add", "hook": POST, "tensor": "edit.99"}, "no tensor"),
    "a replacement of another shape": ("add-stream", {"kind": "replace", "hook": SCORES, "tensor": WHOLE}, "shape"),
    "a knockout of residuals": ("knockout", KNOCKOUT | {"hook": POST}, "attn.hook_scores"),
    "a knockout past the prompt": ("knockout", KNOCKOUT | {"spec": {"edges": [[12, 0]]}}, "out of range"),
    "a knockout of head 4 of 4": ("knockout", KNOCKOUT | {"spec": {"heads": [4], **EDGE}}, "head 4 out of range"),
    "a knockout of layer 3 of 3": ("knockout", KNOCKOUT | {"hook": "blocks.3.attn.hook_scores"}, "layer 3 out of"),
    "steering of scores": ("knockout", STEER | {"hook": SCORES}, "attn.hook_pattern"),
    "a weight above 1": ("knockout", STEER | {"how": "set_value"}, "must be in [0, 1]"),
    "a negative weight": ("knockout", STEER | {"value": -2.0}, "non-negative"),
    "an injection without an SAE": ("knockout", INJECT, "needs an SAE"),
}


@pytest.fixture(scope="module")
def emitter() -> Iterator[EmitterProcess]:
    if missing := missing_tool("rust"):
        pytest.skip(missing)
    process = EmitterProcess(build(parse_candidate("0.2.2"), cache_root(), print).path)
    yield process
    process.close()


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
