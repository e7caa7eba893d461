"""From arrays to a :class:`TensorResult`: the cheap checks, then the measure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from candle_mi_parity.compare.gate import Measure, rms_ratio
from candle_mi_parity.compare.verdict import Status, TensorResult, Worst
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.trace.trace import Selection, TensorEntry


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
        outside = any(index >= limit for indices, limit in limits for index in indices)
        if outside or entry.shape != [*shape[:-2], *kept]:
            part = one_line(f"{entry.part.rows} × {entry.part.columns}")
            return fail("shape", f"the part {part} does not fit {list(shape)}")
    if entry.dtype != dtype:
        return fail("dtype", f"got {entry.dtype}, expected {dtype}")
    if 0 in entry.shape:
        return fail("shape", f"got shape {entry.shape}: no element to compare")
    return None


def nonfinite(name: str, got: np.ndarray, expected: np.ndarray, agreed: bool | None) -> TensorResult | None:
    """A NaN or Inf anywhere fails, wherever the truth's value is."""
    if (finite := np.isfinite(got)).all():
        return None
    bad = np.argwhere(~finite)
    index = tuple(int(i) for i in bad[0])
    worst = Worst.of(list(index), float(got[index]), float(expected[index]), math.nan, math.nan)
    detail = f"{len(bad)} of {got.size} elements are NaN or Inf"
    return TensorResult(
        name, Status.FAIL, "nonfinite", compared=got.size, past=len(bad), inputs_agreed=agreed, worst=worst,
        detail=detail, position_ratio=math.inf, element_ratio=math.inf,
    )  # fmt: skip


@dataclass(frozen=True)
class Tally:
    """What a chunk of a tensor's positions contributes to its result.

    :ivar measured: number of compared elements, mean square of their error and of their noise.
    :ivar past: elements past the element gate.
    :ivar unequal: elements that are not bitwise equal.
    """

    position: float
    element: float
    worst: Worst
    passes: bool
    unresolved: int
    size: int
    past: int
    unequal: int
    measured: tuple[int, float, float]


def tally(measured: Measure, got: np.ndarray, expected: np.ndarray, mask: np.ndarray | None, start: int = 0) -> Tally:
    """Summarize a chunk, [B, …, t, entries].

    :param start: the tensor's position at which the chunk begins.
    """
    largest = np.argmax(measured.element)
    if math.isnan(measured.element.flat[largest]):
        largest = np.nanargmax(measured.element)
    index = [int(i) for i in np.unravel_index(largest, measured.element.shape)]
    place = tuple(index)
    index[-2] += start
    worst = Worst.of(
        index,
        float(got[place]),
        float(expected[place]),
        float(measured.sigma[place]),
        float(measured.element[place]),
    )
    compared = got.size if mask is None else int(np.count_nonzero(mask))
    return Tally(
        position=float(measured.position.max()),
        element=float(measured.element.max()),
        worst=worst,
        passes=measured.passes(),
        unresolved=int(measured.unresolved.sum()),
        size=got.size,
        past=measured.past(),
        unequal=int(np.count_nonzero(got != expected)),
        measured=(compared, *measured.mean_square),
    )


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
    return concluded(name, [tally(measured, got, expected, mask)], agreed, detail, exact)


def concluded(
    name: str, tallies: list[Tally], agreed: bool | None, detail: str = "", exact: bool = False
) -> TensorResult:
    """The result of a tensor from all its chunks; ``exact`` asks for bit equality."""
    differs = exact and any(part.unequal for part in tallies)
    failed = differs or not all(part.passes for part in tallies)
    unresolved = sum(part.unresolved for part in tallies)
    status = Status.FAIL if failed else Status.UNMEASURED if unresolved else Status.PASS
    compared = sum(part.measured[0] for part in tallies)
    if unresolved and not failed:
        detail = f"too noisy to judge at {unresolved} positions. {detail}".strip()
    return TensorResult(
        name=name,
        status=status,
        reason="values" if failed else "noisy" if unresolved else "",
        position_ratio=float(np.max([part.position for part in tallies])),
        element_ratio=float(np.max([part.element for part in tallies])),
        rms_ratio=_rms(tallies),
        compared=compared,
        left_out=sum(part.size for part in tallies) - compared,
        past=sum(part.unequal if differs else part.past for part in tallies),
        exact=exact,
        inputs_agreed=agreed,
        worst=max((part.worst for part in tallies), key=lambda worst: worst.ratio),
        detail=detail,
    )


def _rms(tallies: list[Tally]) -> float:
    """Over the whole tensor."""
    if len(tallies) == 1:
        return rms_ratio(*tallies[0].measured[1:])
    sums = np.array([[count * error, count * noise] for count, error, noise in (t.measured for t in tallies)])
    return rms_ratio(*sums.sum(0).tolist())
