"""History: what each stored release makes of every case, and which divergences came and went between them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from candle_mi_parity.compare.diff import size
from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.verdict import CaseResult, Outcome
from candle_mi_parity.files.escape import cell, rendered

BETTER, WORSE, SAME = "↑", "↓", "·"
_STYLES = {"good": "green", "bad": "red", "warn": "yellow"}


@dataclass(frozen=True)
class CaseHistory:
    """One case over all releases, in their order; None where a release has no such case."""

    id: str
    family: str
    results: list[CaseResult | None]

    @property
    def agrees_everywhere(self) -> bool:
        return all(result is not None and result.outcome is Outcome.AGREES for result in self.results)

    def arrows(self) -> list[str]:
        """For each release whether it is better than the one before; the first has no arrow."""
        arrows = [""]
        for before, after in pairwise(self.results):
            if before and after and before.outcome.judged and after.outcome.judged:
                change = after.outcome.rank - before.outcome.rank
                arrows.append(WORSE if change > 0 else BETTER if change < 0 else SAME)
            else:
                arrows.append(SAME)
        return arrows


@dataclass(frozen=True)
class FamilySummary:
    """One family in one release: ``2 agree, 1 diverges``, and how many cases changed since the release before."""

    text: str
    colour: str
    better: int
    worse: int


@dataclass(frozen=True)
class History:
    """All releases in order, and the cases in the order of the case table.

    :ivar started: when the first run began, ISO 8601; ``seconds`` is how long all of them took.
    """

    releases: list[str]
    versions: dict[str, str]
    cases: list[CaseHistory]
    started: str
    seconds: float

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(case.family for case in self.cases))

    def cases_of(self, family: str) -> list[CaseHistory]:
        return [case for case in self.cases if case.family == family]

    def summary(self, family: str, release: int) -> FamilySummary:
        cases = self.cases_of(family)
        counts = Counter(result.outcome for case in cases if (result := case.results[release]))
        text = ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome])
        clean = counts.keys() == {Outcome.AGREES}
        colour = "good" if clean else "bad" if Outcome.DIVERGES in counts else "warn"
        arrows = Counter(case.arrows()[release] for case in cases)
        return FamilySummary(text or "-", colour, arrows[BETTER], arrows[WORSE])


def make_history(results: dict[str, RunResult]) -> History:
    """Combine the run of each release, in the order of the releases.

    :raises ValueError: there is no release.
    """
    if not results:
        raise ValueError("no stored release: rust_outputs/ is empty")
    by_release = [{case.id: case for case in result.cases} for result in results.values()]
    families = {case.id: case.family for result in results.values() for case in result.cases}
    cases = [CaseHistory(id, family, [cases.get(id) for cases in by_release]) for id, family in families.items()]
    first = next(iter(results.values()))
    return History(list(results), first.versions, cases, first.started, time.monotonic() - first.tick)


def terminal(history: History, console: Console) -> None:
    """Print family × release, and below how many cases became better and worse."""
    table = Table(title="stored releases against PyTorch", box=box.SIMPLE_HEAD)
    for heading in ("family", *history.releases):
        table.add_column(heading, overflow="fold")
    changes: list[Counter[str]] = [Counter() for _ in history.releases]
    for family in history.families:
        row = [history.summary(family, release) for release in range(len(history.releases))]
        for change, summary in zip(changes, row, strict=True):
            change.update(better=summary.better, worse=summary.worse)
        table.add_row(cell(family), *(Text(summary.text, style=_STYLES[summary.colour]) for summary in row))
    console.print(table)
    for (before, after), change in zip(pairwise(history.releases), changes[1:], strict=True):
        line = f"{before} → {after}: {change['better']} cases better, {change['worse']} worse"
        console.print(line, highlight=False)


def page(history: History) -> str:
    """``history.html``: one file without scripts and external resources."""
    return rendered("history.html.j2", history=history, size=size)
