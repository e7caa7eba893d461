"""The shape of an error, in one phrase and as a picture by position.

This is evidence for a reader; the verdict is the gate's.
"""

from __future__ import annotations

import re

import numpy as np

from candle_mi_parity.compare.gate import ELEMENT_GATE, measure
from candle_mi_parity.compare.verdict import Diagnosis
from candle_mi_parity.spec.hook_points import axes

COLUMNS = 32
"""Largest width of the picture of features, in blocks."""
ROWS = 64
MOST = 0.99
"""Share of the squared error that one head or position must have to be named."""
SHOWN = 8
"""Largest number of heads, positions or entries that are listed."""
EXPLAINED = 0.01
"""A hypothesis holds if it leaves less than this share of the error's rms."""


def diagnose(
    tensor: str, got: np.ndarray, expected: np.ndarray, noise: np.ndarray, mask: np.ndarray | None
) -> Diagnosis:
    """Diagnose a tensor [B, …, T, entries]; the picture is of the batch row with the largest error.

    :param mask: True where an entry is compared; other entries count only if the candidate's value is not 0.
    """
    error = got - expected
    if mask is not None:
        error = np.where(mask | (got != 0), error, 0.0)
    sigma = measure(np.zeros_like(error), expected, noise).sigma
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        ratio = np.nan_to_num(np.abs(error) / sigma, nan=1e30, posinf=1e30)
    largest = ratio.reshape(len(ratio), -1).max(1)
    row = int(largest.argmax())
    picture, rows = _picture(ratio[row])
    shape = _shape(axes(tensor, ratio.ndim)[1:], got[row], expected[row], error[row], ratio[row])
    wrong = [int(batch) for batch in np.flatnonzero(largest >= ELEMENT_GATE)]
    if 0 < len(wrong) < len(ratio):
        shape = f"{_of('batch row', wrong, len(ratio))}: {shape}"
    return Diagnosis(tensor, shape, picture, rows, "head" if ratio.ndim == 4 else "features")


def _picture(ratio: np.ndarray) -> tuple[list[list[float]], list[int]]:
    """[H, T, D] → position × head, [T, d] → position × block; at most :data:`ROWS` rows, evenly chosen."""
    if ratio.ndim == 3:
        by_column = ratio.max(-1).T
    else:
        blocks = np.array_split(ratio, min(COLUMNS, ratio.shape[-1]), axis=-1)
        by_column = np.stack([block.max(-1) for block in blocks], axis=-1)
    rows = np.unique(np.linspace(0, len(by_column) - 1, min(ROWS, len(by_column))).astype(int))
    with np.errstate(divide="ignore"):
        picture = np.clip(np.log10(by_column[rows]), -2, 9).round(2)
    return picture.tolist(), rows.tolist()


def _shape(
    names: tuple[str, ...], got: np.ndarray, expected: np.ndarray, error: np.ndarray, ratio: np.ndarray
) -> str:
    """Of one batch row, [H, T, D] or [T, d], whose axes have these names."""
    if not np.isfinite(got).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(got))[0]]
        return f"non-finite, first at {index}"
    bad = ratio >= ELEMENT_GATE
    if bad.sum() == 1:
        return f"one element {[int(i) for i in np.argwhere(bad)[0]]}"
    for phrase in (_permuted(got, expected), _factor(got, expected, error), _precision(got, expected)):
        if phrase:
            return phrase
    return _place(names, error, bad) or "spread"


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _permuted(got: np.ndarray, expected: np.ndarray) -> str:
    """Whether each head is another head's truth."""
    if got.ndim != 3 or len(got) < 2:
        return ""
    distance = np.array([[_rms(mine - theirs) for theirs in expected] for mine in got])
    source = distance.argmin(1)
    left = distance[np.arange(len(got)), source].max()
    moved = source != np.arange(len(got))
    if moved.any() and left < EXPLAINED * distance.max():
        return f"heads permuted: {source.tolist()}"
    return ""


def _factor(got: np.ndarray, expected: np.ndarray, error: np.ndarray) -> str:
    energy = float((expected * expected).sum())
    factor = float((got * expected).sum()) / energy if energy else 1.0
    return f"constant factor {factor:.6g}" if _rms(got - factor * expected) < EXPLAINED * _rms(error) else ""


def _precision(got: np.ndarray, expected: np.ndarray) -> str:
    """Whether every value is the truth rounded to a narrower format."""
    near = _rms(got - expected) < 0.01 * _rms(expected)
    bits = np.ascontiguousarray(got, np.float32).view(np.uint32)
    if near and not (bits & 0xFFFF).any():
        return "reduced precision: bfloat16 values"
    with np.errstate(over="ignore"):
        half = np.array_equal(got, got.astype(np.float16).astype(np.float64))
    if near and half:
        return "reduced precision: float16 values"
    return "reduced precision: TF32 values" if near and not (bits & 0x1FFF).any() else ""


def _place(names: tuple[str, ...], error: np.ndarray, bad: np.ndarray) -> str:
    """The heads, positions and entries to which an error is confined."""
    energy = np.square(error)
    total = float(energy.sum())
    if error.ndim == 3 and total and len(error) > 1:
        by_head = energy.sum((1, 2)) / total
        if by_head.max() > MOST:
            return f"one head ({int(by_head.argmax())})"
    axis = tuple(i for i in range(error.ndim) if i != error.ndim - 2)
    by_position = energy.sum(axis) / total if total else energy.sum(axis)
    if len(by_position) > 1 and by_position.max() > MOST:
        return f"one position ({int(by_position.argmax())})"
    parts = []
    for place, name in enumerate(names):
        touched = np.any(bad, axis=tuple(i for i in range(error.ndim) if i != place))
        if touched.any() and not touched.all():
            parts.append(_of(name, [int(i) for i in np.flatnonzero(touched)], len(touched)))
    return ", ".join(parts)


def _of(name: str, which: list[int], count: int) -> str:
    """``two of four heads (0, 3)``, ``from position 8 on``, ``entries 0 to 7 of 16``, ``batch row 2``."""
    first, last = which[0], which[-1]
    names = re.sub(r"([^aeo])y$", r"\1ie", name) + "s"
    if len(which) == 1:
        return f"{name} {first} of {count}"
    if len(which) != last - first + 1:
        shown = ", ".join(map(str, which[:SHOWN])) + (", …" if len(which) > SHOWN else "")
        return f"{len(which)} of {count} {names} ({shown})"
    if name == "head":
        return f"{len(which)} of {count} heads ({', '.join(map(str, which))})"
    return f"from {name} {first} on" if last == count - 1 else f"{names} {first} to {last} of {count}"
