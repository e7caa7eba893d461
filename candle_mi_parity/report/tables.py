"""What the commands print on stdout: tables, both answers, and the verdict on one line for ``grep``."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.files.escape import cell, few, number, one_line, printable
from candle_mi_parity.files.json_out import ReportError
from candle_mi_parity.files.untrusted import read_json
from candle_mi_parity.report.causes import NEW, CauseSeen, failures, known_causes, new_causes, right
from candle_mi_parity.spec.cases import Case

if TYPE_CHECKING:
    from candle_mi_parity.coverage.census_record import Census
    from candle_mi_parity.coverage.field_check import FieldFinding

FEW = 24
"""Up to this number each case has a row; beyond it, only those that neither pass nor are known."""
FEW_CAUSES = 3
"""Up to this number each known cause has a line."""
WIDE = 300
"""Width if stdout is a file, so that names are not broken."""
_COLOURS = {"PASS": "green", "KNOWN": "yellow", "FAIL": "bold red", "ERROR": "bold red"}


def stdout() -> Console:
    """A console as wide as the terminal, or :data:`WIDE`."""
    return Console(width=None if sys.stdout.isatty() else WIDE)


def colour(status: Status | Verdict) -> str:
    return _COLOURS.get(status.value, "magenta")


def run_tables(result: RunResult, console: Console, page: Path | None = None, show_known: bool = False) -> None:
    """Print what is known, what did not run, what is new, the failures by place, both answers, and the verdict last.

    :param page: path of the run's page.
    :param show_known: whether each known cause has a line of its own, however many there are.
    """
    if result.build:
        _print(console, f"built with {result.build}", "dim")
    known = known_causes(result)
    for cause in known if show_known or len(known) <= FEW_CAUSES else ():
        _print(console, _known(cause), colour(cause.status))
    if len(known) > FEW_CAUSES and not show_known:
        cases = len([case for case in result.judged if case.status is Status.KNOWN])
        ids = few([cause.id for cause in known], 4)
        _print(console, f"known: {cases} cases and calls, for {len(known)} causes ({ids}); --show-known", "yellow")
    for id, names in result.gone.items():
        sentence = f" {result.known[id].says}" if id in result.known else ""
        _print(console, f"gone: {id}:{sentence} Now right: {', '.join(names)}", "green")
    waiting: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in result.skipped.items():
        waiting[reason].append(name)
    for reason, names in waiting.items():
        _print(console, f"not run: {few(names, 3)}: {reason}", "dim")
    for note, names in result.notes().items():
        _print(console, f"note: {few(names)}: {note}", "cyan")
    new = [case for case in result.cases if case.status not in (Status.PASS, Status.KNOWN)]
    if shown := result.cases if len(result.cases) <= FEW else new:
        console.print(_case_table(result, shown))
    for cause in new_causes(result):
        others = [case.id for case in cause.cases[1:]]
        also = f"\n  the same in {len(others)} more: {few(others)}" if others else ""
        _print(console, cause.leader.message() + also, colour(cause.status))
    for line in result.stale:
        _print(console, f"stale: {line}", "bold red")
    for part in result.sections.values():
        _print(console, part.line())
    _print(console, f"started {result.started}, took {result.seconds:.0f} s", "dim")
    if page is not None:
        _print(console, f"report: {page}")
    for line in failures(result):
        _print(console, line, "bold red")
    _print(console, f"{right(result)} {result.is_right()}")
    _print(console, f"{NEW} {result.is_new()}")
    _print(console, f"verdict: {result.line()}", colour(result.verdict))


def _print(console: Console, line: str, style: str = "") -> None:
    """Print without wrapping, so that commands can be copied."""
    console.print(Text(printable(line), style=style), soft_wrap=True)


def _known(cause: CauseSeen) -> str:
    size = f"{len(cause.cases)} case{'s' * (len(cause.cases) > 1)}"
    size += "" if cause.worst is None else f", equal within {cause.worst:.2g} of 8"
    return f"known: {cause.outcome.sign} {cause.id} {cause.name} ({size}): {cause.says}"


def _case_table(result: RunResult, cases: list[CaseResult]) -> Table:
    title = f"candle-mi {result.candidate} against transformers {result.versions['transformers']}"
    table = _table(title, "case", "verdict", "tensors >", "ratio / 8 >", "first divergence, or largest ratio")
    for case in cases:
        tensor = case.first_divergence or case.worst
        table.add_row(
            cell(case.id),
            Text(f"{case.outcome.sign} {case.status.value}", style=colour(case.status)),
            f"{case.compared}/{case.expected}" + (" in part" if case.in_part else ""),
            number(tensor.ratio) if tensor else "",
            cell(tensor.name if tensor else one_line(case.error, 60)),
        )
    return table


def _table(title: str, *headings: str) -> Table:
    """A table whose first column is not wrapped; headings of numeric columns end with ``>``."""
    table = Table(title=cell(title), box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    for place, heading in enumerate(headings):
        name = heading.removesuffix(" >")
        right = name != heading
        table.add_column(name, justify="right" if right else "left", no_wrap=right or not place, overflow="fold")
    return table


def census(taken: Census, console: Console) -> None:
    """Print one row for each class, those that compute something else first, and the totals."""
    title = f"candle-mi {taken.candle_mi.version} asked about transformers {taken.transformers}"
    table = _table(title, "class", "outcome", "read by", "first divergence", "ratio >", "reason")
    for entry in sorted(taken.classes, key=lambda entry: list(taken.counts).index(entry.outcome)):
        reader = f"{entry.reader}, {entry.dialect}" if entry.reader else "-"
        ratio = "-" if entry.ratio is None else f"{entry.ratio:.3g}"
        cells = (entry.model_type, entry.outcome, reader, entry.first or "-", ratio, entry.reason)
        table.add_row(*(cell(text) for text in cells))
    console.print(table)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in taken.counts.items()), highlight=False)


def fields_table(findings: list[FieldFinding], console: Console) -> None:
    """The config-field ledger, one line for each family and field, with its fault in the last column."""
    title = "fields of config.json that transformers reads"
    table = _table(title, "family", "field", "covered by", "effect / noise >", "fault")
    for found in findings:
        ratio = "-" if found.ratio is None else f"{found.ratio:.3g}"
        fault = Text(printable(found.fault), style="bold red")
        table.add_row(cell(found.family), cell(found.field), cell(found.cover), ratio, fault)
    console.print(table)
    faults = sum(1 for found in findings if found.fault)
    console.print(f"{len(findings)} fields, {faults} of them not covered as the ledger says")


def case_list(cases: list[Case], report: Path, console: Console) -> None:
    """Print one row for each case: its lane, and its status in the last run.

    :param report: ``report.json`` of that run; it need not exist.
    """
    last: dict[str, str] = {}
    if report.is_file():
        found = read_json(report, ReportError)
        last = {case["id"]: f"{case['status']} {_ids_of(case)}".strip() for case in found.get("cases", [])}
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in ("case", "lane", "last run"):
        table.add_column(heading, no_wrap=True)
    for case in cases:
        table.add_row(cell(case.id), case.lane, cell(last.get(case.id, "-")))
    console.print(table)
    console.print(f"{len(cases)} cases" + (f"; last run: {report}" if last else ""), highlight=False)


def _ids_of(case: dict[str, Any]) -> str:
    return ", ".join((case.get("explained") or {}).get("ids", []))
