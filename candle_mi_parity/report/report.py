"""Views of a :class:`RunResult`: the terminal's table and ``report.json``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status, TensorResult
from candle_mi_parity.coverage.census_record import Census
from candle_mi_parity.coverage.field_check import Finding
from candle_mi_parity.files.escape import cell, printable
from candle_mi_parity.files.json_out import plain

REPORT_FORMAT = "candle-mi-parity/report/3"
_COLOURS = {
    "PASS": "green",
    "KNOWN": "yellow",
    "FAIL": "bold red",
    "UNMEASURED": "magenta",
    "ERROR": "bold red",
}


def coloured(status: Status | Verdict) -> Text:
    return Text(status.value, style=_COLOURS.get(status.value, "bold magenta"))


def case_table(result: RunResult) -> Table:
    """One row a case: what was compared, the worst tensor and its ratio, the verdict, the first divergence."""
    title = f"candle-mi {result.candidate} against transformers {result.versions['transformers']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    for heading in ("case", "tensors", "worst tensor", "pos / 8", "elem / 32", "verdict", "first divergence"):
        narrow = heading in ("case", "verdict")
        right = heading in ("tensors", "pos / 8", "elem / 32")
        table.add_column(heading, justify="right" if right else "left", no_wrap=narrow, overflow="fold")
    for case in result.cases:
        worst, first = case.worst, case.first_divergence
        table.add_row(
            cell(case.id),
            f"{case.compared}/{case.expected}" + (" in part" if case.in_part else ""),
            cell(worst.name) if worst else "-",
            f"{worst.position_ratio:.3g}" if worst else "-",
            f"{worst.element_ratio:.3g}" if worst else "-",
            coloured(case.status),
            cell(first.name) if first else "-",
        )
    return table


def terminal(result: RunResult, console: Console) -> None:
    """The table, what to read about each case that is not a pass, and the verdict in the last line."""
    console.print(case_table(result))
    _terminal_rest(result, console)
    console.print(Text(f"started {result.started}, took {result.seconds:.0f} s", style="dim"))
    console.print(
        Text.assemble("verdict: ", (printable(result.line()), _COLOURS.get(result.verdict.value, "bold magenta")))
    )


def _terminal_rest(result: RunResult, console: Console) -> None:
    """Below the table: whatever is not as it should be, and the direct calls in one line."""
    for case in result.judged:
        if case.status not in (Status.PASS, Status.KNOWN):
            console.print(
                coloured(case.status), Text(printable(case.message())), soft_wrap=True
            )  # a command must copy whole
    for note in dict.fromkeys(case.note for case in result.cases if case.note):
        ids = ", ".join(case.id for case in result.cases if case.note == note)
        console.print(Text(printable(f"{ids}: {note}"), style="yellow"))
    passing = [case for case in result.cases if case.status in (Status.PASS, Status.KNOWN)]
    for note in dict.fromkeys(note for case in passing for note in case.notes):
        ids = ", ".join(case.id for case in passing if note in case.notes)
        console.print(Text(printable(f"{ids}: note: {note}"), style="cyan"))
    for reason in dict.fromkeys(result.skipped.values()):
        names = [name for name, why in result.skipped.items() if why == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(Text(printable(f"{', '.join(names[:3])}{more}: not run: {reason}"), style="dim"))
    for line in result.stale:
        console.print(Text(printable(f"stale: {line}"), style="bold red"))
    if result.calls is not None:
        console.print(Text(printable(result.calls.line())), soft_wrap=True)


def calls(result: RunResult, console: Console) -> None:
    """Direct calls: what is known by cause, and then what :func:`terminal` says of them."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in ("known", "calls"):
        table.add_column(heading, overflow="fold")
    for cause, known in (result.calls.known if result.calls else {}).items():
        table.add_row(cell(cause), cell(", ".join(call.id for call in known)))
    console.print(table)
    _terminal_rest(result, console)


def clean_ratios(result: RunResult) -> Table:
    """The clean bands of the gate, per case: every ratio of a tensor that passed, exact ones counted apart."""
    bands = "bands: rms 0.2 to 3, position < 4, element < 16"
    table = Table(title=cell(f"clean ratios of {result.candidate} ({bands})"), box=box.SIMPLE_HEAD)
    for heading in ("case", "tensors", "exact", "rms from", "rms to", "position", "element", "inside"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for case in result.cases:
        row = clean_row(case.tensors)
        table.add_row(cell(case.id), *row[:-1], Text(row[-1], style="green" if row[-1] == "yes" else "red"))
    return table


def clean_row(tensors: list[TensorResult]) -> list[str]:
    """Counts and extremes of one case's tensors, ``yes`` last where all lie in the bands of the design."""
    matrices = [tensor for tensor in tensors if tensor.worst is not None and tensor.worst.index]
    exact = [tensor for tensor in matrices if tensor.element_ratio == 0]
    noisy = [tensor for tensor in matrices if tensor.element_ratio > 0]
    if not noisy:
        return [str(len(matrices)), str(len(exact)), "-", "-", "-", "-", "no"]
    rms = [tensor.rms_ratio for tensor in noisy]
    position = max(tensor.position_ratio for tensor in noisy)
    element = max(tensor.element_ratio for tensor in noisy)
    # At the lens's one position all entries share the norm's one random factor, which may come out near zero.
    spread = [tensor.rms_ratio for tensor in noisy if not tensor.name.startswith("lens")]
    inside = min(spread) >= 0.2 and max(rms) <= 3 and position < 4 and element < 16
    figures = [f"{min(spread):.2f}", f"{max(rms):.2f}", f"{position:.2f}", f"{element:.2f}"]
    return [str(len(matrices)), str(len(exact)), *figures, "yes" if inside else "no"]


def census(taken: Census, console: Console) -> None:
    """One row a class, those that compute something else first, and the totals in the last line."""
    title = f"candle-mi {taken.candle_mi.version} asked about transformers {taken.transformers}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    for heading in ("class", "outcome", "read by", "first divergence", "ratio", "evidence"):
        table.add_column(heading, justify="right" if heading == "ratio" else "left", overflow="fold")
    for entry in sorted(taken.classes, key=lambda entry: list(taken.counts).index(entry.outcome)):
        probes = ", ".join(f"{name}: {outcome}" for name, outcome in entry.probes.items())
        unread = f"never reads {', '.join(entry.unread[:3])}" if entry.unread else ""
        evidence = "; ".join(part for part in (entry.reason, probes, unread) if part)
        reader = f"{entry.reader}, {entry.dialect}" if entry.reader else "-"
        ratio = "-" if entry.ratio is None else f"{entry.ratio:.3g}"
        cells = (entry.model_type, entry.outcome, reader, entry.first or "-", ratio, evidence)
        table.add_row(*(cell(text) for text in cells))
    console.print(table)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in taken.counts.items()), highlight=False)


def document(result: RunResult) -> dict[str, Any]:
    """The report as JSON-ready data; a number that JSON has not is spelt as a string."""
    cases, calls = [_case(case) for case in result.cases], result.calls
    return {
        "format": REPORT_FORMAT,
        "verdict": result.verdict.value,
        "line": result.line(),
        "candidate": result.candidate,
        "candle_mi": result.identity,
        "versions": result.versions,
        "strict": result.strict,
        "started": result.started,
        "seconds": round(result.seconds, 3),
        "fault": result.fault,
        "counts": {status.value: result.count(status) for status in Status},
        "cases": cases,
        "calls": calls and {"results": [_case(call) for call in calls.results], "skipped": calls.skipped},
        "skipped": result.skipped,
        "stale": result.stale,
        "baseline": result.baseline,
        "gone": result.gone,
    }


def _case(case: CaseResult) -> dict[str, Any]:
    first = case.first_divergence
    return {
        "id": case.id,
        "family": case.family,
        "digest": case.digest,
        "status": case.status.value,
        "compared": case.compared,
        "expected": case.expected,
        "unmeasured": case.unmeasured,
        "in_part": case.in_part,
        "first_divergence": first.name if first else None,
        "diagnosis": asdict(case.diagnosis) if case.diagnosis else None,
        "sae": [plain(asdict(view)) for view in case.sae],
        "error": case.error,
        "explained": plain(asdict(case.explained)) if case.explained else None,
        "unexplained": case.unexplained,
        "failure": case.failure.value if case.failure else None,
        "notes": case.notes,
        "reproduce": case.reproduce,
        "seconds": round(case.seconds, 3),
        "downloads": [asdict(download) for download in case.downloads],
        "tensors": [plain(asdict(tensor)) for tensor in case.tensors],
        "forced": [plain(asdict(tensor)) for tensor in case.forced],
    }


def fields_table(findings: list[Finding], console: Console) -> None:
    """The config-field ledger, one line a family and field; what does not hold is said in its last column."""
    table = Table(title="fields of config.json that transformers reads", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("family", "field", "covered by", "effect / noise", "fault"):
        table.add_column(heading, justify="right" if heading == "effect / noise" else "left", overflow="fold")
    for found in findings:
        ratio = "-" if found.ratio is None else f"{found.ratio:.3g}"
        fault = Text(printable(found.fault), style="bold red")
        table.add_row(cell(found.family), cell(found.field), cell(found.cover), ratio, fault)
    console.print(table)
    faults = sum(1 for found in findings if found.fault)
    console.print(f"{len(findings)} fields, {faults} of them not covered as the ledger says")
