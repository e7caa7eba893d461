"""The shape of an error, in one phrase and as a picture by position.

This is evidence for a reader; the verdict is the gate's.
"""

from __future__ import annotations

import numpy as np

from candle_mi_parity.compare.gate import ELEMENT_GATE, measure
from candle_mi_parity.compare.verdict import Diagnosis

COLUMNS = 32
"""Largest width of the picture of features, in blocks."""
ROWS = 64
MOST = 0.99
"""Share of the squared error that one head or position must have to be named."""
EXPLAINED = 0.01
"""A hypothesis holds if it leaves less than this share of the error's rms."""


def diagnose(
    tensor: str, got: np.ndarray, expected: np.ndarray, noise: np.ndarray, mask: np.ndarray | None
) -> Diagnosis:
    """Diagnose batch row 0 of a tensor [B, …, T, entries].

    :param mask: True where an entry is compared; other entries count only if the candidate's value is not 0.
    """
    error = got - expected
    if mask is not None:
        error = np.where(mask | (got != 0), error, 0.0)
    sigma = measure(np.zeros_like(error), expected, noise).sigma
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        ratio = np.nan_to_num(np.abs(error) / sigma, nan=1e30, posinf=1e30)[0]
    picture, rows = _picture(ratio)
    return Diagnosis(
        tensor,
        _shape(got[0], expected[0], error[0], ratio),
        picture,
        rows,
        "head" if ratio.ndim == 3 else "features",
    )


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


def _shape(got: np.ndarray, expected: np.ndarray, error: np.ndarray, ratio: np.ndarray) -> str:
    """Of one batch row, [H, T, D] or [T, d]."""
    if not np.isfinite(got).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(got))[0]]
        return f"non-finite, first at {index}"
    bad = ratio >= ELEMENT_GATE
    if bad.sum() == 1:
        return f"one element {[int(i) for i in np.argwhere(bad)[0]]}"
    for phrase in (_permuted(got, expected), _factor(got, expected, error), _precision(got, expected)):
        if phrase:
            return phrase
    return _place(error, bad) or "spread"


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


def _place(error: np.ndarray, bad: np.ndarray) -> str:
    """One head, one position, or everything from a position on."""
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
    positions: np.ndarray = np.any(bad, axis=axis)
    first = int(positions.argmax())
    return f"from position {first} on" if first > 0 and positions[first:].all() else ""
