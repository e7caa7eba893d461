"""Views of a :class:`Diff`: a summary for the terminal, ``diff.html``, and ``diff.md`` for a pull request."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from candle_mi_parity.compare.diff import CaseDiff, Diff, Direction, Kind, TensorDiff, shown
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import Outcome, Status, TensorResult
from candle_mi_parity.files.escape import cell, few, number, printable, rendered
from candle_mi_parity.report.views_ci import code, prose

LONGEST = 20
"""Rows of each list on the terminal."""
CASES_NAMED = 6
"""Cases named on the terminal for each change of outcome."""
_STYLES = {Verdict.FAIL: "bold red", Verdict.PASS: "green"}


@dataclass(frozen=True)
class OutcomeChange:
    """The cases that went from one outcome to another."""

    before: Outcome
    after: Outcome
    cases: list[str]

    @property
    def same(self) -> bool:
        return self.before is self.after

    @property
    def text(self) -> str:
        return f"{self.before.value} → {self.after.value}"

    @property
    def colour(self) -> str:
        if self.same or not (self.before.judged and self.after.judged):
            return "grey"
        return "bad" if self.after.rank > self.before.rank else "good"

    @property
    def families(self) -> str:
        return ", ".join(dict.fromkeys(case.split("/")[0] for case in self.cases))


def changes(diff: Diff) -> list[OutcomeChange]:
    """All cases by their two outcomes; those that became worse first, then those that became better."""
    found: dict[tuple[Outcome, Outcome], list[str]] = {}
    for case in diff.cases:
        found.setdefault((case.a.outcome, case.b.outcome), []).append(case.id)
    ordered = [OutcomeChange(before, after, cases) for (before, after), cases in found.items()]
    return sorted(ordered, key=lambda change: (("bad", "good", "grey").index(change.colour), -len(change.cases)))


def tensor_counts(diff: Diff) -> dict[str, int]:
    """Number of tensors, scalars and decisions of each kind; those that moved also by direction."""
    rows = [row for case in diff.cases for row in case.rows]
    counts = {kind.value: sum(1 for row in rows if row.kind is kind) for kind in Kind}
    return counts | {way.value: sum(1 for row in rows if row.direction is way) for way in Direction}


def unjudged(diff: Diff) -> list[CaseDiff]:
    """Cases without a result on one side: nothing is stored, or the suite failed."""
    return [case for case in diff.cases if not case.judged]


def terminal(diff: Diff, console: Console) -> None:
    """Print the changes of outcome, the cases that moved most, the counts, and the verdict in the last line."""
    _print_changes(diff, console)
    moved = sorted((case for case in diff.cases if case.moved()), key=_by_movement)
    lost = [f"not compared {case.id}: {case.a.result.error or case.b.result.error}" for case in unjudged(diff)]
    for style, lines in (
        ("cyan", [_moved_line(case) for case in moved]),
        ("red", [f"worse {case.id}: {'; '.join(case.worse)}" for case in diff.worse]),
        ("yellow", [f"{case.id} differs otherwise: {case.note}" for case in diff.cases if case.note]),
        ("dim", lost),
    ):
        for line in lines[:LONGEST]:
            console.print(Text(printable(line), style=style), soft_wrap=True)
        if len(lines) > LONGEST:
            console.print(f"… and {len(lines) - LONGEST} more in diff.html", style="dim")
    if partial := sum(1 for case in diff.cases if case.partial):
        console.print(f"{partial} cases are stored in part on one side; the other side was restricted to that part")
    counts = ", ".join(f"{count} {name}" for name, count in tensor_counts(diff).items() if count)
    console.print(f"tensors: {counts or 'none'}", highlight=False, soft_wrap=True)
    for cost in costs(diff.cases):
        console.print(f"{cost.name}: {cost.a:.3g} → {cost.b:.3g} {cost.unit}", highlight=False)
    verdict = Text(printable(f"verdict: {diff.line()}"), style=_STYLES.get(diff.verdict, "bold magenta"))
    console.print(verdict, soft_wrap=True)


def _print_changes(diff: Diff, console: Console) -> None:
    table = Table(title=f"{cell(diff.a)} → {cell(diff.b)}", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("verdict", "cases", "which"):
        table.add_column(heading, justify="right" if heading == "cases" else "left", overflow="fold")
    styles = {"bad": "bold red", "good": "green", "grey": "dim"}
    for change in changes(diff):
        which = change.families if change.same else few(change.cases, CASES_NAMED)
        table.add_row(Text(change.text, style=styles[change.colour]), str(len(change.cases)), cell(which))
    console.print(table)


def _by_movement(case: CaseDiff) -> tuple[bool, float]:
    """Worse ones first, then by how far the first tensor moved."""
    distance = case.moved()[0].distance
    return not case.worse, -(distance.ratio if distance else float("inf"))


def _moved_line(case: CaseDiff) -> str:
    """The first tensor that moved: its distance, its errors in A and B, and where it moved; in noise, gate 8."""
    first = case.moved()[0]
    distance = f"moved by {number(first.distance.ratio)} × noise" if first.distance else first.kind.value
    direction = f", {first.direction.value}" if first.direction else ""
    errors = f"error {result_size(first.a)} → {result_size(first.b)}{direction}"
    return f"{case.id}: {len(case.moved())} of {len(case.rows)} tensors, first {first.name} {distance}; {errors}"


def result_size(result: TensorResult | None) -> str:
    return "absent" if result is None or result.reason == "missing" else shown(result)


def _result_colour(result: TensorResult | None) -> str:
    if result is None:
        return "grey"
    return {Status.PASS: "good", Status.UNMEASURED: "warn"}.get(result.status, "bad")


def _row_colour(row: TensorDiff) -> str:
    if row.worse or row.direction is Direction.AWAY:
        return "bad"
    return "good" if row.better or row.direction is Direction.TOWARDS else "warn"


def page(diff: Diff) -> str:
    """``diff.html``: one file without scripts and external resources."""
    return rendered(
        "diff.html.j2",
        diff=diff,
        anchors={case.id: f"case-{place}" for place, case in enumerate(diff.cases) if case.moved() or case.note},
        changes=changes(diff),
        counts=tensor_counts(diff),
        costs=costs(diff.cases),
        unjudged=unjudged(diff),
        result_size=result_size,
        result_colour=_result_colour,
        row_colour=_row_colour,
    )


def markdown(diff: Diff) -> str:
    """A short table for a pull request; empty where no case changed and no number moved."""
    moved = [change for change in changes(diff) if not change.same]
    tensors = sorted((case for case in diff.cases if case.moved()), key=_by_movement)
    if not moved and not tensors and diff.verdict is Verdict.PASS:
        return ""
    signs = {"bad": "🔴", "good": "🟢", "grey": "⚪"}
    lines = [f"**candle-mi-parity**: {prose(diff.line())}", ""]
    if moved:
        lines += ["| | cases | which |", "|---|--:|---|"]
        lines += [
            f"| {signs[change.colour]} {change.text} | {len(change.cases)} | {few([code(c) for c in change.cases])} |"
            for change in moved
        ]
    for case in tensors[:CASES_NAMED]:
        lines += ["", f"{prose(_moved_line(case))}"]
    if len(tensors) > CASES_NAMED:
        lines += ["", f"Numbers of {len(tensors) - CASES_NAMED} more cases moved; see the page."]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Cost:
    """Time or memory of the emitter on both sides."""

    name: str
    unit: str
    a: float
    b: float


def costs(cases: list[CaseDiff]) -> list[Cost]:
    """Median seconds of each phase, and peak memory, over the cases for which both sides recorded them."""
    runs = [(case.a.run, case.b.run) for case in cases if case.a.run and case.b.run]
    found = []
    for phase in ("load", "forward", "sae", "write"):
        pairs = [(a.seconds[phase], b.seconds[phase]) for a, b in runs if phase in a.seconds and phase in b.seconds]
        if pairs:
            found.append(
                Cost(f"{phase}, median", "s", *(statistics.median(side) for side in zip(*pairs, strict=True)))
            )
    # The recorded peak is that of the process so far, so that only the largest means the same on both sides.
    peaks = [(a.peak_rss_bytes, b.peak_rss_bytes) for a, b in runs if a.peak_rss_bytes and b.peak_rss_bytes]
    if peaks:
        found.append(Cost("peak memory", "MiB", *(max(side) / 2**20 for side in zip(*peaks, strict=True))))
    return found
