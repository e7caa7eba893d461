"""Each edit of a case changes the tensors after it by more than rounding, and every kind is tested at every hook.

The traces of these cases are judged with all others in `test_cases.py`.
"""

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.hooks import forward, load_model
from candle_mi_parity.oracle.interventions import drawn_tensors, edits_of
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.spec.cases import Case, load_cases
from candle_mi_parity.spec.hook_points import LAYER_POINTS
from candle_mi_parity.spec.paths import cache_root

EDITED = {case.id: case for case in load_cases() if case.edits}
POINTS = {"hook_embed", "hook_final_norm", *LAYER_POINTS}
STREAM = {point for point in POINTS if not point.startswith("attn.")}
TAKES = {
    "replace": POINTS,
    "add": POINTS,
    "scale": POINTS,
    "zero": POINTS,
    "patch_at": STREAM,
    "knockout": {"attn.hook_scores"},
    "steer": {"attn.hook_pattern"},
}

FAR = {"float32": 1000, "float16": 10, "bfloat16": 3}
"""By how many times its noise an edit must change a tensor."""

UNSEEN = {
    "gemma2/edit-scale-attention": {"blocks.0.attn.hook_v", "blocks.1.attn.hook_pattern"},
    "gemma2/edit-scale-stream": {"blocks.1.mlp.hook_post"},
    "llama/edit-knockout-layers": {"blocks.0.attn.hook_scores", "blocks.2.attn.hook_scores"},
}
"""Gemma 2 normalises the output of both blocks, which cancels a factor on it, apart from the norm's eps. A knockout
has no effect in a layer outside of its range."""


@functools.cache
def model_of(directory: Path) -> nn.Module:
    return load_model(directory)


def values(case: Case) -> dict[str, torch.Tensor]:
    """The truth's own numbers, without their noise."""
    subject = prepare(case, cache_root())
    model = model_of(subject.model_dir)
    drawn = {key: torch.from_numpy(array).double() for key, array in drawn_tensors(subject, model).items()}
    edits = edits_of(subject, drawn)
    with Float64(), torch.no_grad():  # type: ignore[no-untyped-call]
        return forward(model, torch.tensor(subject.tokens), edits).tensors


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


@pytest.mark.every(4)
@pytest.mark.parametrize("case_id", EDITED)
def test_each_edit_of_a_case_changes_a_later_tensor(case_id: str) -> None:
    case = EDITED[case_id]
    there = values(case)
    noise = Oracle(prepare(case, cache_root()), cache_root()).truth().tensors
    unseen = set()
    for index, edit in enumerate(case.edits):
        rest = [other for place, other in enumerate(case.edits) if place != index]
        without = values(case.model_copy(update={"edits": rest}))
        moved = {name: rms(tensor - without[name]) for name, tensor in there.items() if name in noise}
        if not any(
            size > FAR[case.dtype] * rms(torch.from_numpy(noise[name].noise)) and size > 1e-3 * rms(without[name])
            for name, size in moved.items()
        ):
            unseen.add(edit.hook)
    assert unseen == UNSEEN.get(case_id, set())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", TAKES)
def test_every_kind_is_tested_at_every_hook_that_takes_it(family: str, kind: str) -> None:
    cases = [case for case in EDITED.values() if case.family == family]
    hooks = {edit.hook for case in cases for edit in case.edits if edit.kind == kind}
    assert {hook.split(".", 2)[2] if hook.startswith("blocks") else hook for hook in hooks} == TAKES[kind]
