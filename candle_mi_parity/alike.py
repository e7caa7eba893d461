"""Two traces made comparable: what one kept in part is cut out of the other, and entries kept by both are found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from candle_mi_parity.judge import selected
from candle_mi_parity.trace import Emitted, Feature, Selection, TensorEntry


@dataclass(frozen=True)
class Cut:
    """A whole trace, of which as much is shown as another one kept.

    :ivar parts: tensor → what is shown of it.
    :ivar shown: the tensors that are shown at all.
    """

    whole: Emitted
    parts: dict[str, Selection]
    shown: set[str]

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
