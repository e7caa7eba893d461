"""Progress if stderr is not a terminal: a line at the start of a build, and then a line now and then."""

import io
import time

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from candle_mi_parity.report import terminal
from candle_mi_parity.spec.cases import load_cases

CASE = load_cases()[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock: list[float]) -> None:
    stream = io.StringIO()
    with Bar(console=Console(file=stream, width=100), transient=True, auto_refresh=False) as bar:
        progress = terminal.Terminal(bar, 3)
        progress.case_starts(CASE, "truth")
        assert stream.getvalue() == "", "a run that is soon over logs nothing"
        for line in ("building", "step 1 of 9", "step 2 of 9"):
            progress.note(line)
        assert stream.getvalue().splitlines() == ["building"]
        clock[0] += terminal.LOG_SECONDS
        progress.note("step 3 of 9")
        progress.note("step 4 of 9")
        clock[0] += terminal.LOG_SECONDS
        progress.case_starts(CASE, "truth")
    assert stream.getvalue().split("\n")[:3] == ["building", "step 3 of 9", f"[1/3] {CASE.id}: truth"]


def test_a_terminal_gets_no_lines(clock: list[float]) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with Bar(console=console, transient=True, auto_refresh=False) as bar:
        progress = terminal.Terminal(bar, 3)
        clock[0] += 10 * terminal.LOG_SECONDS
        progress.note("building")
        assert "building" not in stream.getvalue()
