"""Two traces made comparable where one of them is stored in part, and the distance between their tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE, UNIT, UNITS, measure
from candle_mi_parity.compare.tensor_result import selected
from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.spec.hook_points import format_of
from candle_mi_parity.trace.trace import Emitted, Feature, Selection, TensorEntry
from candle_mi_parity.trace.truth import Truth


@dataclass
class PartialView:
    """A whole trace, restricted to what another trace holds.

    :ivar parts: tensor → the part of it that is shown.
    :ivar shown: names of the tensors that are shown.
    """

    whole: Emitted
    parts: dict[str, Selection]
    shown: set[str]
    asked: set[str] | None = None

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        return {name: self._entry(entry) for name, entry in self.whole.entries.items() if name in self.shown}

    def _entry(self, entry: TensorEntry) -> TensorEntry:
        part = self.parts.get(entry.name)
        if part is None or part.shape != entry.shape:  # the comparison reports another shape
            return entry
        last = entry.shape[-1] if part.columns is None else len(part.columns)
        shape = [*entry.shape[:-2], len(part.rows), last]
        return entry.model_copy(
            update={"shape": shape, "values": None, "file": "partial", "key": "partial", "part": part}
        )

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def scalars(self) -> dict[str, float]:
        return self.whole.scalars

    @property
    def top_features(self) -> list[Feature]:
        return self.whole.top_features

    def tensor(self, name: str) -> np.ndarray:
        return selected(self.whole.tensor(name), self.entries[name].part)

    def rows(self, name: str, rows: slice) -> np.ndarray:
        partial = self.entries[name].part is not None
        return self.tensor(name)[..., rows, :] if partial else self.whole.rows(name, rows)


def align_traces(one: Emitted, other: Emitted, selection: set[str], known: set[str]) -> tuple[Emitted, Emitted]:
    """The two traces; if one of them is stored in part, the other is restricted to the same part.

    :param selection: tensors of which a trace in part keeps something.
    :param known: all names of the truth; a tensor under another name stays visible.
    """
    parts, other_parts = (
        {name: entry.part for name, entry in trace.entries.items() if entry.part is not None}
        for trace in (one, other)
    )
    if bool(parts) == bool(other_parts):
        return one, other

    def restrict(whole: Emitted, kept: dict[str, Selection]) -> Emitted:
        return PartialView(whole, kept, {name for name in whole.entries if name in selection or name not in known})

    return (one, restrict(other, parts)) if parts else (restrict(one, other_parts), other)


def common(one: TensorEntry, other: TensorEntry) -> Selection | None:
    """The part of a tensor that both traces hold, possibly without rows or columns; None if both are whole."""
    if one.part is None and other.part is None:
        return None
    shape = one.part.shape if one.part else one.shape
    rows, columns = (
        [index for index in kept if index in set(other_kept)]
        for kept, other_kept in zip(_kept(one), _kept(other), strict=True)
    )
    return Selection(shape=shape, rows=rows, columns=columns)


def _kept(entry: TensorEntry) -> tuple[list[int], list[int]]:
    """Rows and columns of the whole tensor that a trace holds."""
    if entry.part is None:
        return list(range(entry.shape[-2])), list(range(entry.shape[-1]))
    columns = entry.part.columns
    return entry.part.rows, list(range(entry.part.shape[-1])) if columns is None else columns


def restricted(array: np.ndarray, entry: TensorEntry, part: Selection | None) -> np.ndarray:
    """The :func:`common` part of a tensor that may itself be stored in part.

    :param array: as the trace holds it.
    """
    if part is None:
        return array
    rows, columns = ({index: place for place, index in enumerate(kept)} for kept in _kept(entry))
    array = array[..., [rows[row] for row in part.rows], :]
    return array[..., [columns[column] for column in part.columns or []]]


@dataclass(frozen=True)
class Distance:
    """Between A and B.

    :ivar same: bitwise equal, wherever both hold the tensor.
    :ivar position: largest rms(B − A)/noise over positions; gate 8.
    :ivar element: largest \\|B − A\\|/σ over elements; gate 32.
    :ivar decisions: features, tokens or counts that differ.
    """

    same: bool
    position: float = 0.0
    element: float = 0.0
    decisions: int = 0

    @property
    def inside(self) -> bool:
        """Rounding can explain it; NaN is not inside. Decisions do not count here."""
        return self.same or (self.position < POSITION_GATE and self.element < ELEMENT_GATE)

    @property
    def ratio(self) -> float:
        """As ``TensorResult.ratio``: 8 is the gate."""
        return max(self.position, self.element / 4)


SAME = Distance(True)
INFINITE = Distance(False, math.inf, math.inf)


def tensor_distance(name: str, truth: Truth, a: Emitted, b: Emitted) -> Distance | None:
    """Distance between two tensors of the truth's shape; None if the traces hold no common part.

    :raises TraceError: the bytes are not those that the trace declares.
    """
    part = common(a.entries[name], b.entries[name])
    if part is not None and (not part.rows or part.columns == []):
        return None
    one, other = (restricted(trace.tensor(name), trace.entries[name], part) for trace in (a, b))
    if one.dtype == other.dtype and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes():
        return SAME
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return INFINITE
    one, other = one.astype(np.float64), other.astype(np.float64)
    chain, _, kind = name.partition(".")
    if chain in truth.sae and kind == "features":
        pre = truth.sae[chain].pre
        fire, flips = (one != 0) & (other != 0), int(np.count_nonzero((one != 0) != (other != 0)))
        return _measured(other - one, selected(pre.value, part), selected(pre.noise, part), fire, UNIT, flips)
    expected = truth.tensors[name]
    value, noise, mask = selected(expected.value, part), selected(expected.noise, part), None
    if expected.allowed is not None:
        mask = np.broadcast_to(selected(expected.allowed, part), one.shape)
        if name.endswith("hook_pattern"):
            # Whether a masked key is read is a decision. Where both read it, the position's noise is the measure.
            if (((one != 0) != (other != 0)) & ~mask).any():
                return INFINITE
            value, mask = np.where(mask, value, one), mask | (one != 0)
    unit = UNIT if chain in truth.sae else UNITS[format_of(name, a.dtype)]
    return _measured(other - one, value, noise, mask, unit)


def _measured(
    error: np.ndarray, value: np.ndarray, noise: np.ndarray, mask: np.ndarray | None, unit: float, decisions: int = 0
) -> Distance:
    found = measure(error, value, noise, mask, unit=unit)
    return Distance(False, float(found.position.max()), float(found.element.max()), decisions)


def figure_distance(one: TensorResult, other: TensorResult) -> Distance:
    """Distance between scalars in units of their σ; decisions differ if their results do."""
    if one.worst is None or other.worst is None:
        return SAME if one == other else Distance(False, decisions=max(1, abs(other.past - one.past)))
    size = abs(other.worst.got - one.worst.got)
    return SAME if size == 0 else Distance(False, element=size / one.worst.noise)
