"""Interventions that go wrong: each mistake is planted in transformers' float32 run, and fails at the first tensor
that it reaches. And the rows: what cannot be applied is refused, by the table, the oracle or the emitter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from candle_mi_parity.candidate import torch_source
from candle_mi_parity.candidate.sources import request
from candle_mi_parity.errors import CaseTableError, OracleError
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.oracle.hooks import Edits
from candle_mi_parity.oracle.interventions import edits_of
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.paths import cache_root
from tests.support.planting import Real, failures, judge, real, rerun, write

ADD, SCALE, POST = "llama/edit-add-then-scale", "llama/edit-scale-stream", "blocks.1.hook_resid_post"
Tensor = torch.Tensor


def faulty(there: Real, fault: Callable[[Edits], Edits], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The float32 run of a case whose edits a fault has turned into others."""
    monkeypatch.setattr(torch_source, "edits_of", lambda subject, drawn: fault(edits_of(subject, drawn)))
    return rerun(there, there.subject.model_dir)


def dropped(hook: str) -> Callable[[Edits], Edits]:
    return lambda edits: {name: changes for name, changes in edits.items() if name != hook}


def twice(hook: str) -> Callable[[Edits], Edits]:
    return lambda edits: {name: [*changes, *changes] if name == hook else changes for name, changes in edits.items()}


def backwards(edits: Edits) -> Edits:
    return {name: [*reversed(changes)] for name, changes in edits.items()}


def only_the_last(edits: Edits) -> Edits:
    return {name: changes[-1:] for name, changes in edits.items()}


def moved(hook: str, to: str) -> Callable[[Edits], Edits]:
    return lambda edits: {to if name == hook else name: changes for name, changes in edits.items()}


def then(hook: str, change: Callable[[Tensor], Tensor]) -> Callable[[Edits], Edits]:
    return lambda edits: {name: [*changes, change] if name == hook else changes for name, changes in edits.items()}


def instead(hook: str, change: Callable[[Tensor], Tensor]) -> Callable[[Edits], Edits]:
    return lambda edits: {**edits, hook: [change]}


def one_position_on(there: Real) -> Callable[[Edits], Edits]:
    """Every patch one position further."""
    edits = [edit.model_copy(update={"position": (edit.position + 1) % 12}) for edit in there.subject.case.edits]  # type: ignore[union-attr]
    return with_edits(there, edits)


def with_edits(there: Real, edits: list[Any]) -> Callable[[Edits], Edits]:
    case = there.subject.case.model_copy(update={"edits": edits})
    return lambda _: edits_of(dataclasses.replace(there.subject, case=case), load_file(there.inputs))


SCORES = "blocks.1.attn.hook_scores"
PATTERN = "blocks.1.attn.hook_pattern"


def transposed(there: Real) -> Callable[[Edits], Edits]:
    """A knockout of keys by queries, [T, T] the wrong way round."""
    mask = torch.zeros(1, 4, 12, 12)
    for query, key in ((5, 2), (11, 0), (11, 3), (11, 10)):
        mask[0, 1, key, query] = -torch.inf
    return instead(SCORES, lambda scores: scores + mask)


def all_heads(there: Real) -> Callable[[Edits], Edits]:
    (edit,) = there.subject.case.edits
    spec = edit.spec.model_copy(update={"heads": None})  # type: ignore[union-attr]
    return with_edits(there, [edit.model_copy(update={"spec": spec})])


def unnormalised(there: Real) -> Callable[[Edits], Edits]:
    """Steering that leaves the rows as the factor made them."""
    (edit,) = there.subject.case.edits
    meant = torch.from_numpy(edit.spec.chosen(4, 12))  # type: ignore[union-attr]
    return instead(PATTERN, lambda pattern: torch.where(meant, pattern * 3.0, pattern))


def softly(there: Real) -> Callable[[Edits], Edits]:
    """A knockout by a very negative number in place of −∞."""
    meant = torch.from_numpy(there.subject.case.edits[0].spec.chosen(4, 12))  # type: ignore[union-attr]
    return instead(SCORES, lambda scores: torch.where(meant, -50.0, scores))


Fault = Callable[[Real], Callable[[Edits], Edits]]
FAULTS: dict[str, tuple[str, Fault, str]] = {
    "dropped": (SCALE, lambda _: dropped("blocks.0.mlp.hook_pre"), "blocks.0.mlp.hook_post"),
    "dropped at the embedding": (SCALE, lambda _: dropped("hook_embed"), "blocks.0.hook_resid_pre"),
    "dropped at the end": (SCALE, lambda _: dropped("hook_final_norm"), "logits"),
    "on the block's output, not on the stream": (
        SCALE,
        lambda _: moved("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"),
        "blocks.1.hook_resid_post",
    ),
    "applied twice": (SCALE, lambda _: twice("blocks.0.hook_resid_post"), "blocks.1.hook_resid_pre"),
    "in the wrong order": (ADD, lambda _: backwards, "blocks.2.hook_resid_pre"),
    "only the last of a hook": (ADD, lambda _: only_the_last, "blocks.2.hook_resid_pre"),
    "one layer off": (ADD, lambda _: moved(POST, "blocks.0.hook_resid_post"), "blocks.1.hook_resid_pre"),
    "one hook early": (ADD, lambda _: moved(POST, "blocks.1.hook_mlp_out"), POST),
    "one position on": ("llama/edit-patch-at", one_position_on, "blocks.0.hook_resid_pre"),
    "a factor 1e-4 off": (
        SCALE,
        lambda _: then("hook_embed", lambda tensor: tensor * 1.0001),
        "blocks.0.hook_resid_pre",
    ),
    "knockout transposed": ("llama/edit-knockout", transposed, PATTERN),
    "knockout of all heads": ("llama/edit-knockout", all_heads, PATTERN),
    "knockout by −50": ("llama/edit-knockout", softly, PATTERN),
    "steering without normalising": ("llama/edit-steer-scale", unnormalised, "blocks.1.hook_attn_out"),
    "injection dropped": ("gemma2/edit-inject", lambda _: dropped(POST), "blocks.2.hook_resid_pre"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_edit_gone_wrong_is_caught_where_it_shows_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case_id, fault, where = FAULTS[name]
    there = real(case_id)
    assert not failures(judge(there, write(tmp_path / "twin", there))), "the twin fails as well"
    arrays = faulty(there, fault(there), monkeypatch)
    assert failures(judge(there, write(tmp_path / "planted", there, arrays)))[:1] == [where]


@pytest.mark.parametrize("hook", ["hook_embed", POST, "blocks.0.attn.hook_q", "blocks.2.attn.hook_scores"])
def test_a_capture_taken_after_the_edit_is_caught(tmp_path: Path, hook: str) -> None:
    case_id = ADD if hook == POST else f"llama/edit-scale-{'attention' if '.attn.' in hook else 'stream'}"
    there = real(case_id)
    arrays = there.arrays
    for edit in [edit for edit in there.subject.case.edits if edit.hook == hook and edit.kind == "scale"]:
        arrays[hook] = arrays[hook] * edit.factor
    assert failures(judge(there, write(tmp_path, there, arrays))) == [hook]


# --- rows that cannot be applied ------------------------------------------------------------------


def subject_with(*edits: dict[str, Any], base: str = "llama/edit-knockout") -> PreparedCase:
    row = real(base).subject.case.model_dump()
    return prepare(Case.model_validate({**row, "edits": list(edits)}), cache_root())


def knockout(**spec: Any) -> dict[str, Any]:
    return {"kind": "knockout", "hook": SCORES, "spec": spec}


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown kind": ({"kind": "negate", "hook": POST}, "negate"),
    "an unknown key": ({"kind": "zero", "hook": POST, "position": 1}, "position"),
    "an unknown hook": ({"kind": "zero", "hook": "blocks.1.hook_resid"}, "no such hook point"),
    "a hook of a layer that is not there": (
        {"kind": "zero", "hook": "blocks.3.hook_resid_pre"},
        "no such hook point",
    ),
    "the logits": ({"kind": "zero", "hook": "logits"}, "no such hook point"),
    "a position past the prompt": ({"kind": "patch_at", "hook": POST, "position": 12}, "position 12 is outside"),
    "a negative position": ({"kind": "patch_at", "hook": POST, "position": -1}, "greater than or equal to 0"),
    "a patch of heads": ({"kind": "patch_at", "hook": "blocks.1.attn.hook_q", "position": 1}, "needs a hook that is"),
    "a factor of many bits": ({"kind": "scale", "hook": POST, "factor": 0.1}, "bfloat16"),
    "a factor that is no number": ({"kind": "scale", "hook": POST, "factor": float("nan")}, "bfloat16"),
    "a knockout of residuals": ({**knockout(edges=[[5, 2]]), "hook": POST}, "attn.hook_scores only"),
    "a knockout of a head too many": (knockout(heads=[4], edges=[[5, 2]]), "head 4, but the model has 4"),
    "a knockout past the prompt": (knockout(edges=[[12, 2]]), "position 12 is outside"),
    "a knockout of nothing": (knockout(), "names no entry"),
    "half an edge": (knockout(edges=[[5]]), "at least 2 items"),
    "steering the scores": (
        {"kind": "steer", "hook": SCORES, "how": "scale", "value": 2.0, "spec": {"edges": [[5, 2]]}},
        "attn.hook_pattern only",
    ),
    "a weight set in the future": (
        {"kind": "steer", "hook": PATTERN, "how": "set_value", "value": 0.5, "spec": {"edges": [[2, 5]]}},
        "in the future",
    ),
    "an injection without an SAE": (
        {"kind": "inject", "hook": POST, "position": 1, "features": [[0, 1.0]]},
        "the case's SAE",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_applied_is_refused(name: str) -> None:
    row, said = BAD_ROWS[name]
    with pytest.raises((CaseTableError, ValidationError)) as refusal:
        subject_with(row)
    assert said in str(refusal.value)


def test_a_steer_stands_alone() -> None:
    steer = {"kind": "steer", "hook": PATTERN, "how": "scale", "value": 2.0, "spec": {"edges": [[5, 2]]}}
    with pytest.raises(CaseTableError, match="stands alone"):
        subject_with(steer, {"kind": "zero", "hook": POST})


def test_a_query_without_any_key_has_no_truth() -> None:
    subject = subject_with(knockout(from_positions=[5]))
    with pytest.raises(OracleError, match="all its keys knocked out"):
        Oracle(subject, cache_root()).truth()


def test_edits_have_no_teacher_forced_truth() -> None:
    with pytest.raises(OracleError, match="no teacher-forced truth"):
        real(ADD).oracle.truth("forced")


def test_edits_are_part_of_the_digest_and_their_absence_is_not() -> None:
    zero: dict[str, Any] = {"kind": "zero", "hook": POST}
    assert subject_with(zero).digest != subject_with().digest
    assert subject_with(zero).digest != subject_with({**zero, "hook": "blocks.0.hook_resid_post"}).digest
    first, second = zero, {"kind": "scale", "hook": POST, "factor": 0.5}
    assert subject_with(first, second).digest != subject_with(second, first).digest
    # What it was before a case could have edits: stored traces and the ledger go by it.
    assert real("llama/hub").subject.digest == "722f957b2debc45563234785da9e03ce635ccf6c5d5ceb8dc530fc0b51bbd052"


def test_the_request_says_what_the_rows_say(tmp_path: Path) -> None:
    there = real("llama/edit-patch-at")
    asked: Any = request(there.subject, "free", there.inputs, tmp_path / "a.json", "cpu")
    assert asked["edits"][0] == {"kind": "patch_at", "hook": "hook_embed", "position": 0, "tensor": "edit.0"}
    assert json.dumps(asked)
