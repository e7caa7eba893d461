"""Speed and memory of two emitters side by side, from what each trace recorded of its own run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from candle_mi_parity.diff import CaseDiff
from candle_mi_parity.trace import Run

PHASES = ("load", "forward", "sae", "write")
IDLE = 1e-6
"""Seconds below which a phase had nothing to do: the SAE's, in a case without one."""


@dataclass(frozen=True)
class Figure:
    """One quantity on both sides; None where a side did not record it.

    :ivar cases: number of cases that both recorded, which alone are compared.
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    cases: int

    @property
    def factor(self) -> float | None:
        """B over A; None where either is unknown or A is 0."""
        return self.b / self.a if self.a and self.b is not None else None


def figures(cases: list[CaseDiff]) -> list[Figure]:
    """The median seconds of each phase, its slowest forward and the most memory held, over the same cases."""
    runs = [(case.a.run, case.b.run) for case in cases]
    timed = [_figure(f"{phase}, median", "s", runs, _seconds(phase), statistics.median) for phase in PHASES]
    slowest = _figure("forward, slowest case", "s", runs, _seconds("forward"), max)
    # The recorded peak is the process's so far, so only its largest means the same on both sides.
    return [*timed, slowest, _figure("peak memory", "MiB", runs, _peak, max)]


def _figure(
    name: str,
    unit: str,
    runs: list[tuple[Run | None, Run | None]],
    read: Callable[[Run | None], float | None],
    condense: Callable[[list[float]], float],
) -> Figure:
    """Over the cases that both sides recorded; where there are none, over each side's own."""
    pairs = [(read(a), read(b)) for a, b in runs]
    both = [pair for pair in pairs if None not in pair]
    sides = ([value for value in side if value is not None] for side in zip(*(both or pairs), strict=True))
    one, other = (condense(side) if side else None for side in sides) if pairs else (None, None)
    return Figure(name, unit, one, other, len(both))


def _seconds(phase: str) -> Callable[[Run | None], float | None]:
    def read(run: Run | None) -> float | None:
        found = run.seconds.get(phase) if run else None
        return found if found is not None and found >= IDLE else None

    return read


def _peak(run: Run | None) -> float | None:
    return run.peak_rss_bytes / 2**20 if run and run.peak_rss_bytes is not None else None
