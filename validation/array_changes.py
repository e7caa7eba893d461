"""Changes of named arrays of a dump or of a model's weights; the input is not modified."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

import numpy as np
import torch

from tests.support.planting import Arrays
from validation.catalogue import CatalogueError, Change

One = Callable[[np.ndarray, Change], np.ndarray]


def _at(array: np.ndarray, change: Change, factor: float | None) -> np.ndarray:
    changed = array.copy()
    index = tuple(change.at)
    changed[index] = change.by if factor is None else changed[index] * np.float32(factor)
    return changed


def _exchange_rows(array: np.ndarray, change: Change) -> np.ndarray:
    one, other = (slice(start, start + int(change.by)) for start in change.at)
    moved = np.moveaxis(array, change.axis, 0)
    changed = moved.copy()
    changed[one], changed[other] = moved[other], moved[one]
    return np.moveaxis(changed, 0, change.axis)


def _cut(array: np.ndarray, change: Change) -> np.ndarray:
    return np.take(array, range(int(change.by)), axis=change.axis)


def _heads_last(array: np.ndarray, change: Change) -> np.ndarray:
    """Two axes that share one, laid out in the other order: ``axis`` is of length a·b and holds a first, ``by`` = a.

    With ``axis`` 1 on a [B, H, T, D] tensor: H and T exchanged under the old shape.
    """
    if change.axis == 1:
        return array.swapaxes(1, 2).reshape(array.shape)
    count = int(change.by)
    return array.reshape(count, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def _int8(array: np.ndarray, change: Change) -> np.ndarray:
    step = np.abs(array).max(-1, keepdims=True) / 127
    rounded: np.ndarray = (np.round(array / step) * step).astype(np.float32)
    return rounded


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, kept as float32."""
    return torch.from_numpy(np.ascontiguousarray(array)).bfloat16().float().numpy()


ONE: dict[str, One] = {
    "zero": lambda array, _: np.zeros_like(array),
    "ones": lambda array, _: np.ones_like(array),
    "put": lambda array, change: _at(array, change, None),
    "scale": lambda array, change: _at(array, change, change.by),
    "roll": lambda array, change: np.roll(array, int(change.by), axis=change.axis),
    "transpose": lambda array, _: np.ascontiguousarray(array.T),
    "swap_axes": lambda array, change: array.swapaxes(*change.at),
    "heads_last": _heads_last,
    "exchange_rows": _exchange_rows,
    "repeat": lambda array, change: array.repeat(int(change.by), axis=change.axis),
    "squeeze": lambda array, _: array[0],
    "cut": _cut,
    "softcap": lambda array, change: (np.tanh(array / change.by) * change.by).astype(array.dtype),
    "next_after": lambda array, _: np.nextafter(array, np.float32(9)),
    "round_bf16": lambda array, _: bfloat16(array),
    "round_f16": lambda array, _: array.astype(np.float16).astype(np.float32),
    "round_int8": _int8,
    "as_f16": lambda array, _: array.astype(np.float16),
    "as_f64": lambda array, _: array.astype(np.float64),
}
"""Changes of one array."""
AMONG = ("take", "exchange", "rename", "drop")
"""Changes among arrays."""


def changed(arrays: Arrays, change: Change) -> Arrays:
    """The arrays in the same order, with one of them (or all, with ``*``) changed.

    :raises CatalogueError: no such name, or no such change.
    """
    new = dict(arrays)
    needed = [change.other if change.change == "take" else change.name]
    needed += [change.other] if change.change == "exchange" else []
    names = [name for wanted in needed for name in fnmatch.filter(arrays, wanted)]
    if len(names) < len(needed):
        raise CatalogueError(f"no {' or '.join(needed)} to change; there are {', '.join(list(arrays)[:4])}, …")
    if change.change in ONE:
        return new | {name: ONE[change.change](arrays[name], change) for name in names}
    if change.change == "take":
        return new | {change.name: arrays[change.other]}
    if change.change == "exchange":
        return new | {change.name: arrays[change.other], change.other: arrays[change.name]}
    if change.change == "rename":
        return {change.other if name == change.name else name: array for name, array in new.items()}
    if change.change == "drop":
        return {name: array for name, array in new.items() if name != change.name}
    raise CatalogueError(f"no change {change.change!r}; there are {', '.join([*ONE, *AMONG])}")
