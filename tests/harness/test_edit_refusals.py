"""The real emitter: an intervention that candle-mi does not honour is refused in one line, never dropped."""

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

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a hook that is never reached": (
        "patch-at",
        {"kind": "zero", "hook": "blocks.9.hook_resid_post"},
        "never reached",
    ),
    "a hook of no known name": ("patch-at", {"kind": "zero", "hook": "blocks.1.hook_residual"}, "never reached"),
    "a hook spelt otherwise": ("patch-at", {"kind": "zero", "hook": "blocks.01.hook_resid_post"}, "is spelt"),
    "a patch of heads": (
        "patch-at",
        {"kind": "patch_at", "hook": "blocks.1.attn.hook_q", "position": 1, "tensor": VECTOR},
        "PatchAt",
    ),
    "a patch past the prompt": (
        "patch-at",
        {"kind": "patch_at", "hook": POST, "position": 12, "tensor": VECTOR},
        "position 12 is outside",
    ),
    "an addition that would broadcast": ("patch-at", {"kind": "add", "hook": POST, "tensor": VECTOR}, "has shape"),
    "a tensor that is not there": ("patch-at", {"kind": "add", "hook": POST, "tensor": "edit.99"}, "no tensor"),
    "a replacement of another shape": (
        "add-stream",
        {"kind": "replace", "hook": SCORES, "tensor": WHOLE},
        "shape",
    ),
    "a knockout of residuals": ("knockout", {"kind": "knockout", "hook": POST, "spec": EDGE}, "attn.hook_scores"),
    "a knockout past the prompt": (
        "knockout",
        {"kind": "knockout", "hook": SCORES, "spec": {"edges": [[12, 0]]}},
        "out of range",
    ),
    "a knockout of a head too many": (
        "knockout",
        {"kind": "knockout", "hook": SCORES, "spec": {"heads": [4], **EDGE}},
        "head 4 out of range",
    ),
    "a knockout of a layer too many": (
        "knockout",
        {"kind": "knockout", "hook": "blocks.3.attn.hook_scores", "spec": EDGE},
        "layer 3 out of range",
    ),
    "steering of scores": (
        "knockout",
        {"kind": "steer", "hook": SCORES, "how": "scale", "value": 2.0, "spec": EDGE},
        "attn.hook_pattern",
    ),
    "a weight above 1": (
        "knockout",
        {"kind": "steer", "hook": PATTERN, "how": "set_value", "value": 2.0, "spec": EDGE},
        "must be in [0, 1]",
    ),
    "a negative weight": (
        "knockout",
        {"kind": "steer", "hook": PATTERN, "how": "scale", "value": -2.0, "spec": EDGE},
        "non-negative",
    ),
    "an injection without an SAE": (
        "knockout",
        {"kind": "inject", "hook": POST, "position": 1, "features": [[0, 1.0]]},
        "needs an SAE",
    ),
}


@pytest.fixture(scope="module")
def emitter() -> Iterator[EmitterProcess]:
    if missing := missing_tool("rust"):
        pytest.skip(missing)
    process = EmitterProcess(build(parse_candidate("0.2.2"), cache_root(), print).path)
    yield process
    process.close()


def asked(case_id: str, out: Path, *edits: dict[str, Any]) -> dict[str, object]:
    there = real(case_id)
    return request(there.subject, "free", there.inputs, out, "cpu") | {"edits": list(edits)}


@pytest.mark.rust
@pytest.mark.parametrize("name", REFUSED)
def test_an_intervention_that_is_not_honoured_is_refused(emitter: EmitterProcess, tmp_path: Path, name: str) -> None:
    case, edit, said = REFUSED[name]
    with pytest.raises(EmitterError) as refusal:
        emitter.emit(asked(f"llama/edit-{case}", tmp_path / "a.json", edit), 60.0)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert refusal.value.kind in ("request", "forward")
    assert not (tmp_path / "a.json").exists()


@pytest.mark.rust
def test_a_feature_that_the_sae_has_not_is_refused(emitter: EmitterProcess, tmp_path: Path) -> None:
    edit = {"kind": "inject", "hook": POST, "position": 1, "features": [[100000, 1.0]]}
    with pytest.raises(EmitterError, match="feature index 100000 out of range"):
        emitter.emit(asked("gemma2/edit-inject", tmp_path / "a.json", edit), 60.0)
