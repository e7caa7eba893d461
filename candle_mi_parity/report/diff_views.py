"""Views of a :class:`Diff`: a short one for the terminal, ``diff.json`` and ``diff.html`` with everything."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from candle_mi_parity.compare.diff import CaseDiff, Diff, Direction, Kind, Row, Side, shown, size
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import Outcome, Status, TensorResult
from candle_mi_parity.files.escape import cell, number, printable, rendered
from candle_mi_parity.files.json_out import plain
from candle_mi_parity.report.causes import few
from candle_mi_parity.trace.trace import Run

DIFF_FORMAT = "candle-mi-parity/diff/1"
SHOWN = 20
"""Rows of each list on the terminal."""
NAMED = 6
"""Cases named on the terminal for each change of verdict."""
_STYLES = {Verdict.FAIL: "bold red", Verdict.PASS: "green"}
_DIRECTIONS = {Direction.TOWARDS: "green", Direction.AWAY: "red", Direction.SIDEWAYS: "yellow"}


@dataclass(frozen=True)
class Change:
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


def changes(diff: Diff) -> list[Change]:
    """All cases by what happened to their verdict; what changed first."""
    found: dict[tuple[Outcome, Outcome], list[str]] = {}
    for case in diff.cases:
        found.setdefault((case.a.outcome, case.b.outcome), []).append(case.id)
    ordered = [Change(before, after, cases) for (before, after), cases in found.items()]
    return sorted(ordered, key=lambda change: ({"bad": 0, "good": 1}.get(change.colour, 2), -len(change.cases)))


def tensor_counts(diff: Diff) -> dict[str, int]:
    """How many tensors, scalars and sets of decisions did what; those that moved, by direction too."""
    counts = {kind.value: sum(case.count(kind) for case in diff.cases) for kind in Kind}
    rows = [row for case in diff.cases for row in case.rows]
    return counts | {way.value: sum(1 for row in rows if row.direction is way) for way in Direction}


def unjudged(diff: Diff) -> list[CaseDiff]:
    """Cases of which one side has nothing: not stored, or a fault of the suite."""
    return [case for case in diff.cases if not case.judged]


def terminal(diff: Diff, console: Console) -> None:
    """Verdicts that changed, the cases that moved most, counts, speed, and the verdict in the last line."""
    _print_changes(diff, console)
    moved = sorted((case for case in diff.cases if case.moved()), key=_by_movement)
    if moved:
        console.print(_moved_table(moved[:SHOWN], len(moved)))
    for case in diff.worse[:SHOWN]:
        console.print(
            Text.assemble(("worse ", "bold red"), printable(f"{case.id}: {'; '.join(case.worse)}")), soft_wrap=True
        )
    _say_the_rest(len(diff.worse), console)
    for case in (noted := [case for case in diff.cases if case.note])[:SHOWN]:
        console.print(Text(printable(f"{case.id} differs otherwise: {case.note}"), style="yellow"), soft_wrap=True)
    _say_the_rest(len(noted), console)
    for case in unjudged(diff)[:SHOWN]:
        said = case.a.result.error or case.b.result.error
        console.print(Text(printable(f"not compared {case.id}: {said}"), style="dim"), soft_wrap=True)
    _say_the_rest(len(unjudged(diff)), console)
    cut = sum(1 for case in diff.cases if case.cut)
    if cut:
        console.print(f"{cut} cases are stored in part on one side; the other side was cut to that part")
    console.print(f"tensors: {_count_line(tensor_counts(diff))}", highlight=False, soft_wrap=True)
    console.print("speed and memory, as each trace recorded them when it was emitted:")
    for figure in figures(diff.cases):
        console.print(f"  {_figure_line(figure)}", highlight=False)
    verdict = Text(printable(f"verdict: {diff.line()}"), style=_STYLES.get(diff.verdict, "bold magenta"))
    console.print(verdict, soft_wrap=True)


def _print_changes(diff: Diff, console: Console) -> None:
    table = Table(title=f"{cell(diff.a)} → {cell(diff.b)}", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("verdict", "cases", "which"):
        table.add_column(heading, justify="right" if heading == "cases" else "left", overflow="fold")
    styles = {"bad": "bold red", "good": "green", "grey": "dim"}
    for change in changes(diff):
        which = change.families if change.same else few(change.cases, NAMED)
        table.add_row(Text(change.text, style=styles[change.colour]), str(len(change.cases)), cell(which))
    console.print(table)


def _by_movement(case: CaseDiff) -> tuple[bool, float]:
    """Worse ones first, then by how far the first tensor moved."""
    distance = case.moved()[0].distance
    return not case.worse, -(distance.ratio if distance else float("inf"))


def _moved_table(cases: list[CaseDiff], total: int) -> Table:
    title = f"cases in which tensors moved: {total}" + (f", the first {SHOWN}" if total > SHOWN else "")
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=0,
        caption="A–B: apart; A, B: error against PyTorch; in rounding noise, gate 8",
    )
    for heading in ("case", "moved", "first tensor that moved", "A–B", "A", "B", "direction"):
        left = heading in ("case", "first tensor that moved", "direction")
        table.add_column(
            heading,
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=heading != "first tensor that moved",
        )
    for case in cases:
        first = case.moved()[0]
        direction = first.direction or first.kind
        table.add_row(
            cell(case.id),
            f"{len(case.moved())}/{len(case.rows)}",
            cell(first.name),
            number(first.distance.ratio if first.distance else None),
            result_size(first.a),
            result_size(first.b),
            Text(direction.value, style=_DIRECTIONS.get(first.direction, "red") if first.direction else "red"),
        )
    return table


def _say_the_rest(count: int, console: Console) -> None:
    if count > SHOWN:
        console.print(f"… and {count - SHOWN} more in diff.html", style="dim")


def _count_line(counts: dict[str, int]) -> str:
    ways = ", ".join(f"{counts[way.value]} {way.value}" for way in Direction)
    names = {Kind.IDENTICAL: "identical to the bit", Kind.ROUNDING: "within rounding", Kind.APART: "not comparable"}
    said = [
        f"{counts[kind.value]} {names.get(kind, kind.value)}" + (f" ({ways})" if kind is Kind.MOVED else "")
        for kind in Kind
        if counts[kind.value] or kind is Kind.MOVED
    ]
    return ", ".join(said)


def _figure_line(figure: Figure) -> str:
    line = f"{figure.name}: {quantity(figure.a, figure.unit)} → {quantity(figure.b, figure.unit)}"
    return line + (f" ({figure.factor:.2f} times, {figure.cases} cases)" if figure.factor is not None else "")


def quantity(value: float | None, unit: str) -> str:
    if value is None:
        return "not recorded"
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def result_size(result: TensorResult | None) -> str:
    return "absent" if result is None or result.reason == "missing" else shown(result)


def _result_colour(result: TensorResult | None) -> str:
    if result is None:
        return "grey"
    return {Status.PASS: "good", Status.UNMEASURED: "warn"}.get(result.status, "bad")


def _row_colour(row: Row) -> str:
    if row.worse or row.direction is Direction.AWAY:
        return "bad"
    return "good" if row.better or row.direction is Direction.TOWARDS else "warn"


def page(diff: Diff) -> str:
    """``diff.html``: one file, no script, nothing fetched."""
    return rendered(
        "diff.html.j2",
        diff=diff,
        anchors={case.id: f"case-{place}" for place, case in enumerate(diff.cases)},
        changes=changes(diff),
        counts=tensor_counts(diff),
        figures=figures(diff.cases),
        unjudged=unjudged(diff),
        quantity=quantity,
        result_size=result_size,
        result_colour=_result_colour,
        row_colour=_row_colour,
        anchored=_anchored,
    )


def _anchored(case: CaseDiff) -> bool:
    """Whether the page says more of a case than its verdicts."""
    return bool(case.moved() or case.note)


def document(diff: Diff) -> dict[str, Any]:
    """``diff.json``; every tensor that is not the same to the bit, and numbers that JSON has not as strings."""
    return {
        "format": DIFF_FORMAT,
        "verdict": diff.verdict.value,
        "line": diff.line(),
        "a": {"candidate": diff.a, "candle_mi": diff.identity_a},
        "b": {"candidate": diff.b, "candle_mi": diff.identity_b},
        "versions": diff.versions,
        "started": diff.started,
        "seconds": round(diff.seconds, 3),
        "tensors": tensor_counts(diff),
        "changes": [{"from": change.before, "to": change.after, "cases": change.cases} for change in changes(diff)],
        "speed": [asdict(figure) | {"factor": figure.factor} for figure in figures(diff.cases)],
        "cases": [plain(_case(case)) for case in diff.cases],
    }


def _case(case: CaseDiff) -> dict[str, Any]:
    return {
        "id": case.id,
        "a": _side(case.a),
        "b": _side(case.b),
        "cut": case.cut,
        "worse": case.worse,
        "better": case.better,
        "note": case.note,
        "identical": case.count(Kind.IDENTICAL),
        "tensors": [_row(row) for row in case.rows if row.kind is not Kind.IDENTICAL],
    }


def _side(side: Side) -> dict[str, Any]:
    explained = side.result.explained
    return {
        "outcome": side.outcome.value,
        "error": side.result.error,
        "explained": asdict(explained) if explained else None,
        "unexplained": side.result.unexplained,
    }


def _row(row: Row) -> dict[str, Any]:
    distance = row.distance
    return {
        "name": row.name,
        "kind": row.kind.value,
        "direction": row.direction.value if row.direction else None,
        "position": distance.position if distance else None,
        "element": distance.element if distance else None,
        "decisions": distance.decisions if distance else None,
        "a": {"status": row.a.status.value, "ratio": size(row.a)} if row.a else None,
        "b": {"status": row.b.status.value, "ratio": size(row.b)} if row.b else None,
        "worse": row.worse,
        "better": row.better,
    }


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
