"""The reference of gradients of a forward pass: torch's autograd over transformers in float64, with noise."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from candle_mi_parity.coverage.calls import CallRow
from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.oracle.compute import SAMPLES
from candle_mi_parity.oracle.gradients import Variables, modes, only, with_respect_to
from candle_mi_parity.oracle.hooks import forward, load_model
from candle_mi_parity.oracle.rounding import Float64, MatmulScales, NoisePool
from candle_mi_parity.oracle.torch_state import TORCH
from candle_mi_parity.trace.truth import TruthTensor

Edit = Callable[[torch.Tensor], torch.Tensor]


@lru_cache(maxsize=1)
def _model(directory: Path) -> nn.Module:
    """Its LayerNorms in operations whose backward passes have a noise rule, which torch's own has not."""
    model = load_model(directory)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(_layer_norm, module)  # type: ignore[method-assign]
    return model


def _layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


_BEHIND: dict[Formula | None, tuple[str, ...]] = {Formula.ROPE_DETACHED: ("attn.hook_q", "attn.hook_k")}
"""Formula → the hooks behind which it loses the gradient."""
_BEFORE: dict[Formula | None, tuple[str, ...]] = {
    Formula.NORMS_DETACHED: ("hook_final_norm",),
    Formula.SOFTMAX_DETACHED: ("attn.hook_pattern",),
}
"""Formula → the hooks before which it loses the gradient."""
_FORMULAS = frozenset({Formula.PADDING_TRAINED, *_BEHIND, *_BEFORE})


def _forward(
    model: nn.Module,
    tokens: list[list[int]],
    cotangent: torch.Tensor,
    hooks: list[str],
    weights: list[str],
    formula: Formula | None,
) -> Callable[[], Named]:
    """The logits [B, T, V], and the gradient of their sum times ``cotangent`` for each hook and weight.

    :raises IndexError: there is no such hook.
    :raises KeyError: there is no such weight.
    """
    ids = torch.tensor(tokens)
    parameters = only(model, weights)
    with Float64():  # type: ignore[no-untyped-call]
        there = forward(model, ids).tensors
    if missing := [hook for hook in hooks if hook not in there]:
        raise IndexError(f"there is no hook {missing[0]}")
    behind, before = (
        [name for name in there if name.endswith(where[formula])] if formula in where else []
        for where in (_BEHIND, _BEFORE)
    )
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedding.padding_idx = None if formula is Formula.PADDING_TRAINED else model.config.pad_token_id  # type: ignore[union-attr]

    def once() -> Named:
        logits: Named = {}

        def loss(variables: Variables) -> torch.Tensor:
            edits: dict[str, list[Edit]] = {hook: [torch.Tensor.detach] for hook in before}
            for hook in hooks:
                edits.setdefault(hook, []).append(_added(variables[hook]))
            for hook in behind:
                edits.setdefault(hook, []).append(torch.Tensor.detach)
            logits["logits"] = forward(model, ids, edits, gradients=True).tensors["logits"]
            return (logits["logits"] * cotangent).sum()

        leaves = {hook: torch.zeros_like(there[hook]) for hook in hooks}
        gradients = with_respect_to(loss, leaves, parameters)
        return {"logits": logits["logits"].detach()} | gradients

    return once


def _added(variable: torch.Tensor) -> Edit:
    return lambda tensor: tensor + variable


def gradient_truth(
    row: CallRow, arrays: dict[str, np.ndarray], directory: Path, formula: Formula | None
) -> dict[str, TruthTensor]:
    """The expected results of a call; the noise is the rms of 16 samples of float32 rounding.

    :param arrays: the tensors of the table.
    :param directory: of the model.
    :raises CaseTableError: there is no such formula.
    :raises IndexError: PyTorch raises it.
    """
    if formula is not None and formula not in _FORMULAS:
        raise CaseTableError(f"{row.id}: {row.fn} has no formula {formula}")
    args: dict[str, Any] = {"hooks": [], "weights": []} | row.args
    cotangent = torch.from_numpy(arrays[args.pop("cotangent")]).double()
    with TORCH:
        once = _forward(_model(directory), cotangent=cotangent, formula=formula, **args)
        scales = MatmulScales()
        with modes(None, scales):
            values = once()
        squares = {name: torch.zeros_like(value) for name, value in values.items()}
        pool = NoisePool(zlib.crc32(row.id.encode()))
        for _ in range(SAMPLES):
            with modes(pool, scales):
                noisy = once()
            for name, value in values.items():
                squares[name] += (noisy[name] - value).square() / SAMPLES
    return {name: TruthTensor(value.numpy(), squares[name].sqrt().numpy()) for name, value in values.items()}


GRADIENTS = frozenset({"tracked_forward"})
"""Functions that :func:`gradient_truth` knows."""
