"""History: family × version over stored releases, so that a reader sees when a divergence came and when it went."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from candle_mi_parity.compare.diff import size
from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.verdict import CaseResult, Outcome
from candle_mi_parity.files.escape import cell, number, rendered
from candle_mi_parity.files.json_out import plain

HISTORY_FORMAT = "candle-mi-parity/history/1"
_STYLES = {"good": "green", "bad": "red", "warn": "yellow"}


@dataclass(frozen=True)
class Cell:
    """One case in one release.

    :ivar first: the first diverging tensor; empty where none diverges.
    :ivar ratio: its size in noise, gate 8; None where none diverges.
    :ivar note: what is known of the divergence, or why it was refused.
    """

    outcome: Outcome
    first: str = ""
    ratio: float | None = None
    note: str = ""

    @property
    def colour(self) -> str:
        return self.outcome.colour

    @property
    def text(self) -> str:
        return f"{self.first} {number(self.ratio)}" if self.first else self.outcome.value


@dataclass(frozen=True)
class Line:
    """One case over all releases, in their order; None where a release has no such case."""

    case: str
    family: str
    cells: list[Cell | None]

    def steps(self) -> list[str]:
        """An arrow a release: ``↑`` better than the one before, ``↓`` worse, ``·`` the same; the first has none."""
        arrows = [""]
        for before, after in pairwise(self.cells):
            known = before and after and before.outcome.judged and after.outcome.judged
            change = after.outcome.rank - before.outcome.rank if known and before and after else 0
            arrows.append("↓" if change > 0 else "↑" if change < 0 else "·")
        return arrows

    @property
    def clean(self) -> bool:
        """Agrees in every release."""
        return all(cell is not None and cell.outcome is Outcome.AGREES for cell in self.cells)


@dataclass(frozen=True)
class Summary:
    """One family in one release.

    :ivar came: cases that became worse since the release before, in words; ``went`` those that became better.
    """

    counts: dict[Outcome, int]
    came: list[str]
    went: list[str]

    @property
    def colour(self) -> str:
        present = [found for found, number in self.counts.items() if number]
        return "good" if present == [Outcome.AGREES] else "bad" if Outcome.DIVERGES in present else "warn"

    @property
    def text(self) -> str:
        said = [f"{n} {found if n == 1 else found.removesuffix('s')}" for found, n in self.counts.items() if n]
        return ", ".join(said) or "-"


@dataclass(frozen=True)
class History:
    """All of it: releases in order, cases in the table's order.

    :ivar started: when the first run began, ISO 8601; ``seconds`` is how long all of them took.
    """

    releases: list[str]
    versions: dict[str, str]
    lines: list[Line]
    started: str
    seconds: float

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(line.family for line in self.lines))

    def of(self, family: str) -> list[Line]:
        return [line for line in self.lines if line.family == family]

    def summary(self, family: str, release: int) -> Summary:
        lines = self.of(family)
        cells = [line.cells[release] for line in lines]
        counts = {found: sum(1 for cell in cells if cell and cell.outcome is found) for found in Outcome}
        steps = [(line, line.steps()[release]) for line in lines]
        return Summary(
            counts,
            [f"{line.case}: {_step(line, release)}" for line, arrow in steps if arrow == "↓"],
            [f"{line.case}: {_step(line, release)}" for line, arrow in steps if arrow == "↑"],
        )


def _step(line: Line, release: int) -> str:
    before, after = line.cells[release - 1], line.cells[release]
    assert before is not None and after is not None
    return f"{before.outcome.value} → {after.outcome.value}"


def make_history(results: dict[str, RunResult]) -> History:
    """From the run of each release, in the order of the releases.

    :raises ValueError: there is no release.
    """
    if not results:
        raise ValueError("no stored release: rust_outputs/ is empty")
    by_release = {release: {case.id: case for case in result.cases} for release, result in results.items()}
    families = {case.id: case.family for result in results.values() for case in result.cases}
    lines = [
        Line(name, family, [_cell(cases.get(name)) for cases in by_release.values()])
        for name, family in families.items()
    ]
    first = next(iter(results.values()))
    return History(list(results), first.versions, lines, first.started, time.monotonic() - first.tick)


def _cell(case: CaseResult | None) -> Cell | None:
    if case is None:
        return None
    first = case.first_divergence
    note = " ".join(part for part in (case.error, case.note) if part)
    return Cell(case.outcome, first.name if first else "", size(first) if first else None, note)


def terminal(history: History, console: Console) -> None:
    """Family × release, and under it what came and went."""
    table = Table(title="stored releases against PyTorch", box=box.SIMPLE_HEAD)
    for heading in ("family", *history.releases):
        table.add_column(heading, overflow="fold")
    for family in history.families:
        cells = [history.summary(family, index) for index in range(len(history.releases))]
        table.add_row(cell(family), *(Text(_short(cell), style=_STYLES[cell.colour]) for cell in cells))
    console.print(table)
    for index, release in enumerate(history.releases[1:], 1):
        cells = [history.summary(family, index) for family in history.families]
        came, went = (
            sum(len(side) for side in sides) for sides in zip(*((c.came, c.went) for c in cells), strict=True)
        )
        console.print(
            f"{history.releases[index - 1]} → {release}: {went} cases better, {came} worse", highlight=False
        )


def _short(cell: Summary) -> str:
    arrows = (f" ↑{len(cell.went)}" if cell.went else "") + (f" ↓{len(cell.came)}" if cell.came else "")
    return cell.text + arrows


def page(history: History) -> str:
    """``history.html``: one file, no script, nothing fetched."""
    return rendered("history.html.j2", history=history)


def document(history: History) -> dict[str, Any]:
    """``history.json``."""
    return {
        "format": HISTORY_FORMAT,
        "releases": history.releases,
        "versions": history.versions,
        "started": history.started,
        "seconds": round(history.seconds, 3),
        "cases": [
            {
                "id": line.case,
                "family": line.family,
                "releases": {
                    release: None if cell is None else _as_json(cell)
                    for release, cell in zip(history.releases, line.cells, strict=True)
                },
            }
            for line in history.lines
        ],
    }


def _as_json(cell: Cell) -> dict[str, Any]:
    ratio = plain(cell.ratio)
    return {"outcome": cell.outcome.value, "first": cell.first or None, "ratio": ratio, "note": cell.note}
