"""From arrays to a :class:`TensorResult`: the cheap checks, then the measure."""

from __future__ import annotations

import math

import numpy as np

from candle_mi_parity.gate import Measure
from candle_mi_parity.trace import Selection, TensorEntry
from candle_mi_parity.verdict import Status, TensorResult, Worst


def selected(array: np.ndarray, part: Selection | None) -> np.ndarray:
    """The part of a whole tensor that a stored trace kept."""
    if part is None:
        return array
    rows = array[..., part.rows, :]
    return rows if part.columns is None else rows[..., part.columns]


def malformed(entry: TensorEntry, shape: tuple[int, ...], dtype: str, agreed: bool | None) -> TensorResult | None:
    """The cheap checks: shape, dtype, finite. ``shape`` is the truth's whole shape."""

    def fail(reason: str, detail: str) -> TensorResult:
        return TensorResult(entry.name, Status.FAIL, reason, inputs_agreed=agreed, detail=detail)

    whole = entry.part.shape if entry.part else entry.shape
    if tuple(whole) != shape:
        return fail("shape", f"got shape {whole}, expected {list(shape)}")
    if entry.part is not None:
        limits = [(entry.part.rows, shape[-2]), (entry.part.columns or [], shape[-1])]
        kept = [len(entry.part.rows), shape[-1] if entry.part.columns is None else len(entry.part.columns)]
        if any(i >= limit for indices, limit in limits for i in indices) or entry.shape != [
            *shape[:-2],
            *kept,
        ]:
            return fail("shape", f"the part {entry.part.rows} × {entry.part.columns} does not fit {list(shape)}")
    if entry.dtype != dtype:
        return fail("dtype", f"got {entry.dtype}, expected {dtype}")
    if 0 in entry.shape:
        return fail("shape", f"got shape {entry.shape}: no element to compare")
    return None


def nonfinite(name: str, got: np.ndarray, expected: np.ndarray, agreed: bool | None) -> TensorResult | None:
    """A NaN or Inf anywhere fails, wherever the truth's value is."""
    bad = np.argwhere(~np.isfinite(got))
    if not len(bad):
        return None
    index = tuple(int(i) for i in bad[0])
    worst = Worst.of(list(index), float(got[index]), float(expected[index]), math.nan, math.nan)
    detail = f"{len(bad)} of {got.size} elements are NaN or Inf"
    return TensorResult(
        name, Status.FAIL, "nonfinite", compared=got.size, past=len(bad), inputs_agreed=agreed, worst=worst,
        detail=detail, position_ratio=math.inf, element_ratio=math.inf,
    )  # fmt: skip


def judged(
    name: str,
    measured: Measure,
    got: np.ndarray,
    expected: np.ndarray,
    mask: np.ndarray | None,
    agreed: bool | None,
    detail: str = "",
    exact: bool = False,
) -> TensorResult:
    """Turn a measure into a result; ``exact`` asks for bit equality."""
    index = tuple(int(i) for i in np.unravel_index(np.nanargmax(measured.element), measured.element.shape))
    worst = Worst.of(
        list(index),
        float(got[index]),
        float(expected[index]),
        float(measured.sigma[index]),
        float(measured.element[index]),
    )
    differs = exact and bool((got != expected).any())
    failed = differs or not measured.passes()
    noisy = bool(measured.unresolved.any())
    status = Status.FAIL if failed else Status.UNMEASURED if noisy else Status.PASS
    compared = got.size if mask is None else int(np.count_nonzero(mask))
    if noisy and not failed:
        detail = f"too noisy to judge at {int(measured.unresolved.sum())} positions. {detail}".strip()
    return TensorResult(
        name=name,
        status=status,
        reason="values" if failed else "noisy" if noisy else "",
        position_ratio=float(measured.position.max()),
        element_ratio=float(measured.element.max()),
        rms_ratio=measured.rms,
        compared=compared,
        left_out=got.size - compared,
        past=int(np.count_nonzero(got != expected)) if differs else measured.past(),
        exact=exact,
        inputs_agreed=agreed,
        worst=worst,
        detail=detail,
    )
