"""What the commands print on stderr: progress, and an error as one line."""

from __future__ import annotations

import threading
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
"""Time between two lines of progress if stderr is not a terminal."""


class Terminal(Progress):
    """Progress on stderr: a bar, or lines if stderr is not a terminal."""

    def __init__(self, bar: Bar, total: int | None = None) -> None:
        self._bar, self._done, self._total = bar, 0, total
        self._task = bar.add_task("starting", total=None, logged=time.monotonic())
        self._silent = True

    def case_starts(self, case: Case, step: str) -> None:
        if step == "model" and case.lane == "hub":
            # The hub's client draws its own bars, which would overwrite this one.
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
        _log(self._bar, at_once=at_once)


def _log(bar: Bar, at_once: bool = False) -> None:
    """Print what is being done as a line, if stderr is not a terminal and has had no line for a while.

    A short run without a build logs nothing.
    """
    if bar.console.is_terminal:
        return
    for task in bar.tasks:
        if at_once or time.monotonic() - task.fields["logged"] >= LOG_SECONDS:
            bar.update(task.id, logged=time.monotonic())
            bar.console.print(task.description, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error as one line on stderr, with exit code 2, or 3 if only network, GPU or nvcc is missing."""
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
    """A progress bar on stderr that is removed at the end."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar, repeated(bar):
        yield bar


@contextmanager
def repeated(bar: Bar, every: float = 1.0) -> Iterator[None]:
    """Repeat the last line of progress where nothing new is told for a while: a log that stands still looks dead.

    :param every: seconds between two looks at the clock.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every):
            _log(bar)

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
