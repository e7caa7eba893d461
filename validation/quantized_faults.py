"""Faults in how a quantised checkpoint is dequantised: nibbles, block scales, zero points, columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from candle_mi_parity.models import dequantize
from candle_mi_parity.models.dequantize import QuantizedWeights
from validation.disturb import Running, register


def _read(run: Running, method: str, change: Any) -> None:
    """Give the model the weights that a dequantiser with another method makes: ``change(original, *arguments)``."""
    assert run.subject.quantized_dir is not None
    original = getattr(QuantizedWeights, method)
    wrong = type("Wrong", (QuantizedWeights,), {method: lambda self, *given: change(original, self, *given)})
    weights = wrong(run.subject.quantized_dir)
    for name in run.subject.quantized:
        weight = np.ascontiguousarray(weights.dequantized(name))
        run.model.get_parameter(name).data.copy_(torch.from_numpy(weight))


def _unordered(run: Running, change: tuple[int, ...]) -> None:
    run.patch(dequantize, "AWQ_ORDER", change)
    _read(run, "_awq", lambda original, *given: original(*given))


def _swapped(original: Any, weights: QuantizedWeights, name: str) -> np.ndarray:
    codes: np.ndarray = original(weights, name)
    return (codes >> 4) | (codes << 4)


def _zeros_plus_one(original: Any, weights: QuantizedWeights, codes: Any, zeros: Any, base: str, groups: Any) -> Any:
    return original(weights, codes, zeros + 1, base, groups)


def _first_layout(original: Any, weights: QuantizedWeights, codes: Any, zeros: Any, base: str, groups: Any) -> Any:
    return original(weights, codes, zeros, base, np.sort(groups))


def _one_block_on(original: Any, weights: QuantizedWeights, name: str, state: dict[str, Any]) -> np.ndarray:
    return np.roll(original(weights, name, state), -1)


def _without_offset(original: Any, weights: QuantizedWeights, name: str, state: dict[str, Any]) -> np.ndarray:
    largest: np.ndarray = original(weights, name, state)
    return largest - np.float32(state["nested_offset"])


register(lambda run, change: _read(run, "_bytes", change), nibbles_swapped=_swapped)
register(
    lambda run, change: _read(run, "_largest", change),
    block_scale_of_neighbour=_one_block_on,
    nested_offset_left_out=_without_offset,
)
register(
    lambda run, change: _read(run, "_scaled", change),
    zero_points_plus_one=_zeros_plus_one,
    act_order_ignored=_first_layout,
)
register(lambda run, change: _unordered(run, change()), awq_columns_in_order=lambda: tuple(range(8)))
