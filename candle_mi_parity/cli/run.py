"""``run`` and ``list``: judge a candidate on the cases of the table, and list the cases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from candle_mi_parity.cli.options import (
    DEFAULT_CANDIDATE,
    OUT,
    CandidateOption,
    CasesOption,
    DeviceOption,
    Globs,
    OnlyOption,
    OutOption,
    globs,
)

if TYPE_CHECKING:
    from candle_mi_parity.compare.run_result import RunResult
    from candle_mi_parity.run.options import RunOptions


def run_command(
    patterns: Globs = None,
    candidate: CandidateOption = DEFAULT_CANDIDATE,
    cases: CasesOption = None,
    out: OutOption = OUT,
    device: DeviceOption = "cpu",
    strict: Annotated[bool, typer.Option(help="Known divergences fail too.")] = False,
    search: Annotated[float, typer.Option(min=0, help="Seconds for explaining what is new; 0 for no search.")] = 30.0,
    propose: Annotated[bool, typer.Option("--propose", help="Print rows of explanations.toml for it.")] = False,
    only: OnlyOption = None,
    baseline: Annotated[str, typer.Option(help="A release whose known divergences are expected.")] = "",
    known: Annotated[Path | None, typer.Option(help="A file of expected divergences instead.")] = None,
    show_known: Annotated[bool, typer.Option("--show-known", help="A line for every known divergence.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Run each case so often and count what is not the same.")] = 1,
) -> None:
    """Judge a candle-mi against PyTorch. Exit code 0 PASS or KNOWN, 1 FAIL, 2 ERROR, 3 INCONCLUSIVE."""
    from candle_mi_parity.report import tables
    from candle_mi_parity.report.terminal import one_line_errors
    from candle_mi_parity.run.options import RunOptions

    with one_line_errors():
        wanted = globs(patterns, cases)
        # A partial run never replaces the report of a full run.
        out = out / "part" if (wanted or only) and out == OUT else out
        options = RunOptions(candidate, wanted, out, strict, None, device, baseline, known, tuple(only or ()), search)
        if repeat > 1:
            _repeat(options, repeat)
            return
        result = run_and_write(options)
        tables.run_tables(result, tables.stdout(), out / "report.html", show_known)
        if propose:
            from candle_mi_parity.judge.propose import proposals

            print(*proposals(result), sep="\n")
    raise typer.Exit(result.verdict.exit_code)


def run_with_progress(options: RunOptions, result: RunResult | None = None) -> RunResult:
    """Run with a progress bar."""
    from candle_mi_parity.report.terminal import Terminal, progress_bar
    from candle_mi_parity.run.run import run

    with progress_bar() as bar:
        return run(options, lambda count: Terminal(bar, count), result)


def run_and_write(options: RunOptions) -> RunResult:
    """Run, and write every view of the result, also of a run that is stopped."""
    from candle_mi_parity.report.views import written
    from candle_mi_parity.run.run import blank, require_selection

    require_selection(options)  # before an earlier report is removed
    with written(blank(options), options.out) as result:
        run_with_progress(options, result)
    return result


def _repeat(options: RunOptions, times: int) -> None:
    """Run each case several times and count tensors whose bytes differ."""
    from dataclasses import asdict

    from candle_mi_parity.files.escape import printable
    from candle_mi_parity.files.json_out import write_json
    from candle_mi_parity.report.terminal import Terminal, progress_bar
    from candle_mi_parity.report.views import remove
    from candle_mi_parity.run.repeat import repeat

    remove(options.out, "repeat.json")
    with progress_bar() as bar:
        found = repeat(options, times, lambda count: Terminal(bar, count))
    write_json(asdict(found), options.out / "repeat.json")
    for case in found.cases:
        print(printable(f"{case.id}: {case.line}"))
    print(found.line)


def list_command(patterns: Globs = None, out: OutOption = OUT) -> None:
    """Show the cases, and what the last run in --out found."""
    from candle_mi_parity.report import tables
    from candle_mi_parity.report.terminal import one_line_errors
    from candle_mi_parity.spec.cases import load_cases, select

    with one_line_errors():
        cases = load_cases()
        tables.case_list(select(cases, list(patterns)) if patterns else cases, out / "report.json", tables.stdout())
