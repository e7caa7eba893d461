"""The dequantised weights of a quantised checkpoint, compared number by number, before what is computed with them."""

from __future__ import annotations

import numpy as np

from candle_mi_parity.compare.gate import UNITS, measure
from candle_mi_parity.compare.tensor_result import judged, malformed, nonfinite, selected
from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.trace.formats import round_to_dtype
from candle_mi_parity.trace.trace import Emitted
from candle_mi_parity.trace.truth import Expected


def judge_weight(name: str, expected: Expected, trace: Emitted) -> TensorResult:
    """Compare a weight [1, out, in]; every number must be equal. A negative zero equals zero."""
    entry = trace.entries[name]
    if broken := malformed(entry, expected.shape, trace.dtype, None):
        return broken
    got, value = trace.tensor(name).astype(np.float64), selected(expected.value, entry.part)
    if broken := nonfinite(name, got, value, None):
        return broken
    measured = measure(got - value, value, np.zeros_like(value), unit=UNITS[trace.dtype])
    return judged(name, measured, got, value, None, None, _shares(got, value), exact=True)


def _shares(got: np.ndarray, value: np.ndarray) -> str:
    """Which share of a weight is wrong, apart from a rounding to bfloat16."""
    unequal = got != value
    if not unequal.any():
        return "every number is the one that the file defines"
    wrong = unequal & (got != round_to_dtype(value, "bfloat16"))
    if not wrong.any():
        return f"the {unequal.sum()} of {got.size} numbers that differ are those of the file, rounded to bfloat16"
    rows, columns = (np.flatnonzero(wrong.any((0, axis))) for axis in (2, 1))
    worst = float(np.abs(got - value)[wrong].max() / np.sqrt(np.square(value).mean()))
    return (
        f"{wrong.sum()} of {got.size} numbers ({wrong.mean():.1%}) are wrong by more than a rounding to bfloat16, by "
        f"up to {worst:.2g} of the weight's rms; {_span('rows', rows, got.shape[1])}, "
        f"{_span('columns', columns, got.shape[2])}"
    )


def _span(what: str, places: np.ndarray, count: int) -> str:
    """``rows 32 to 51 of 64 (20 of them)``."""
    return f"{what} {places[0]} to {places[-1]} of {count} ({len(places)} of them)"
