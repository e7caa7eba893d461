"""What the commands say on stderr: progress on long work, and a fault as one line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from candle_mi_parity.candidate.spelling import OutOfReachError
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import CaseResult
from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import printable
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.spec.cases import Case

LOG_SECONDS = 15.0
"""Where nobody watches a bar move, a line at most this often says what is done."""


class Terminal(Progress):
    """Progress on stderr, so that the table on stdout stays a table: a bar, or lines where stderr is no terminal."""

    def __init__(self, bar: Bar, total: int | None = None) -> None:
        self._bar, self._done, self._total = bar, 0, total
        self._task = bar.add_task("starting", total=None)
        self._logged, self._silent = time.monotonic(), True

    def case_starts(self, case: Case, step: str) -> None:
        if step == "model" and case.lane == "hub":
            # The hub's client draws bars of its own, and two of them on one terminal overwrite each other.
            self._bar.stop()
            line = f"{self._count()}{case.id}: from the hub"
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            self._bar.start()
        self._show(f"{self._count()}{case.id}: {step}")

    def case_ends(self, result: CaseResult) -> None:
        self._done += 1

    def note(self, line: str) -> None:
        self._show(line, at_once=self._silent)
        self._silent = False

    def keep(self, line: str) -> None:
        self._bar.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def _count(self) -> str:
        return f"[{self._done + 1}/{self._total}] " if self._total else ""

    def _show(self, line: str, at_once: bool = False) -> None:
        self._bar.update(self._task, description=line)
        # A run without a build that is soon over logs nothing.
        if not self._bar.console.is_terminal and (at_once or time.monotonic() - self._logged >= LOG_SECONDS):
            self._logged = time.monotonic()
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A fault before any verdict: one line on stderr, exit code 2; 3 where just network, GPU or nvcc is missing."""
    try:
        yield
    except ParityError as error:
        say(str(error))
        verdict = Verdict.INCONCLUSIVE if isinstance(error, OutOfReachError) else Verdict.ERROR
        raise typer.Exit(verdict.exit_code) from error


def say(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(printable(f"candle-mi-parity: {line}"), "bold red"))


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """Progress on stderr that leaves nothing behind."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar
