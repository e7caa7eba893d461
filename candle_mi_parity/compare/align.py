"""Two traces made comparable: what one kept in part is cut out of the other, and entries kept by both are found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE, UNIT, UNITS, measure
from candle_mi_parity.compare.tensor_result import selected
from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.trace.trace import Emitted, Feature, Selection, TensorEntry
from candle_mi_parity.trace.truth import Truth


@dataclass
class Cut:
    """A whole trace, of which as much is shown as another one kept.

    :ivar parts: tensor → what is shown of it.
    :ivar shown: the tensors that are shown at all.
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
        if part is None or part.shape != entry.shape:  # another shape is for the comparison to say
            return entry
        last = entry.shape[-1] if part.columns is None else len(part.columns)
        shape = [*entry.shape[:-2], len(part.rows), last]
        return entry.model_copy(update={"shape": shape, "values": None, "file": "cut", "key": "cut", "part": part})

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
        cut = self.entries[name].part is not None
        return self.tensor(name)[..., rows, :] if cut else self.whole.rows(name, rows)


def parts_of(trace: Emitted) -> dict[str, Selection]:
    return {name: entry.part for name, entry in trace.entries.items() if entry.part is not None}


def like_with_like(one: Emitted, other: Emitted, selection: set[str], known: set[str]) -> tuple[Emitted, Emitted]:
    """The two traces, a whole one cut to what is kept of the other.

    :param selection: tensors of which a trace in part keeps something.
    :param known: all names of the truth; a tensor that it has not stays in sight.
    """
    mine, theirs = parts_of(one), parts_of(other)
    if bool(mine) == bool(theirs):
        return one, other

    def cut(whole: Emitted, parts: dict[str, Selection]) -> Emitted:
        return Cut(whole, parts, {name for name in whole.entries if name in selection or name not in known})

    return (one, cut(other, mine)) if mine else (cut(one, theirs), other)


def common(one: TensorEntry, other: TensorEntry) -> Selection | None:
    """What both hold of a tensor; None where both are whole. Its rows or columns are empty where they share none."""
    if one.part is None and other.part is None:
        return None
    shape = one.part.shape if one.part else one.shape
    rows, columns = _both(_rows(one), _rows(other)), None
    mine, theirs = (entry.part.columns if entry.part else None for entry in (one, other))
    if mine is not None or theirs is not None:
        every = list(range(shape[-1]))
        columns = _both(every if mine is None else mine, every if theirs is None else theirs)
    return Selection(shape=shape, rows=rows, columns=columns)


def _rows(entry: TensorEntry) -> list[int]:
    return entry.part.rows if entry.part else list(range(entry.shape[-2]))


def _both(one: list[int], other: list[int]) -> list[int]:
    kept = set(other)
    return [index for index in one if index in kept]


def restricted(array: np.ndarray, entry: TensorEntry, part: Selection | None) -> np.ndarray:
    """What a :func:`common` part leaves of a tensor that may itself be kept in part.

    :param array: as the trace holds it.
    """
    if part is None:
        return array
    held = _rows(entry)
    array = array[..., [held.index(row) for row in part.rows], :]
    if part.columns is None:
        return array
    columns = entry.part.columns if entry.part else None
    places = part.columns if columns is None else [columns.index(column) for column in part.columns]
    return array[..., places]


TOP_TOKENS = 10


@dataclass(frozen=True)
class Distance:
    """Between A and B.

    :ivar same: equal to the bit, wherever both hold the tensor.
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
        """Rounding can explain it; written so that NaN is not inside. Decisions are left to the verdicts."""
        return self.same or (self.position < POSITION_GATE and self.element < ELEMENT_GATE)

    @property
    def ratio(self) -> float:
        """As ``TensorResult.ratio``: 8 is the gate."""
        return max(self.position, self.element / 4)


SAME = Distance(True)
ENDLESS = Distance(False, math.inf, math.inf)


def tensor_distance(name: str, truth: Truth, a: Emitted, b: Emitted) -> Distance | None:
    """Of a tensor that both hold in the truth's shape; None where the parts that they keep have nothing in common.

    :raises TraceError: bytes that are not what a trace declares.
    """
    part = common(a.entries[name], b.entries[name])
    if part is not None and (not part.rows or part.columns == []):
        return None
    one, other = (restricted(trace.tensor(name), trace.entries[name], part) for trace in (a, b))
    if one.dtype == other.dtype and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes():
        return SAME
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return ENDLESS
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
            # Whether a forbidden key is read is a decision. Where both read it, the position's noise is the measure.
            if (((one != 0) != (other != 0)) & ~mask).any():
                return ENDLESS
            read = mask | (one != 0)
            value, mask = np.where(mask, value, one), read
    unit = UNIT if chain in truth.sae else UNITS[a.dtype]
    return _measured(other - one, value, noise, mask, unit)


def _measured(
    error: np.ndarray, value: np.ndarray, noise: np.ndarray, mask: np.ndarray | None, unit: float, decisions: int = 0
) -> Distance:
    found = measure(error, value, noise, mask, unit=unit)
    return Distance(False, float(found.position.max()), float(found.element.max()), decisions)


def figure_distance(name: str, a: Emitted, b: Emitted, one: TensorResult, other: TensorResult) -> Distance | None:
    """Of what is judged beside the tensors: a scalar in units of its σ, or decisions counted.

    :param one: A's result, which carries the scalar's noise.
    """
    if decide := _DECISIONS.get(name):
        decisions = decide(a, b)
        return SAME if not decisions else Distance(False, decisions=decisions)
    if one.worst is None or other.worst is None:
        return None
    size = abs(other.worst.got - one.worst.got)
    return SAME if size == 0 else Distance(False, element=size / one.worst.noise)


def _next_tokens(a: Emitted, b: Emitted) -> int:
    one, other = (trace.tensor("logits").argmax(-1) for trace in (a, b))
    return int(np.count_nonzero(one != other))


def _top_tokens(a: Emitted, b: Emitted) -> int:
    tops = [set(np.argsort(-trace.tensor("logits")[0, -1], kind="stable")[:TOP_TOKENS].tolist()) for trace in (a, b)]
    return len(tops[0] - tops[1])


def _top_features(a: Emitted, b: Emitted) -> int:
    one, other = ({feature.index for feature in trace.top_features} for trace in (a, b))
    return max(len(one - other), len(other - one))


def _active(a: Emitted, b: Emitted) -> int:
    one, other = (trace.scalars.get("sae.n_active_last_pos", math.nan) for trace in (a, b))
    return 0 if one == other else max(1, int(abs(other - one))) if math.isfinite(other - one) else 1


_DECISIONS: dict[str, Callable[[Emitted, Emitted], int]] = {
    "logits.next_token": _next_tokens,
    "logits.top10_last_pos": _top_tokens,
    "sae.top_features_last_pos": _top_features,
    "sae.n_active_last_pos": _active,
}
