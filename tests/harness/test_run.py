"""A run: two cases at a time, results in order, and nothing started after the run was stopped."""

import io
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status
from candle_mi_parity.errors import ParityError, Stopped
from candle_mi_parity.judge import case as judge_case_module
from candle_mi_parity.judge.case import Judgement, Progress
from candle_mi_parity.report import terminal
from candle_mi_parity.run import run
from candle_mi_parity.run.at_once import at_once
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.spec.cases import Case, load_cases
from candle_mi_parity.spec.conditions import Facts
from tests.support.planting import Giving, judged
from tests.support.results import case as result

CASES = load_cases()[:8]


def test_two_cases_are_at_work_at_once_and_results_come_in_the_order_of_the_cases() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def wait_for_another(case: Case) -> Judgement:
        meeting.wait()  # raises where no other case arrives
        time.sleep(0.05 if case.id == CASES[0].id else 0)
        return Judgement(result(case.id))

    with at_once(2, wait_for_another, CASES) as futures:
        assert [future.result().result.id for future in futures] == [case.id for case in CASES]


def test_a_stopped_run_starts_no_further_case_and_waits_for_none() -> None:
    """A case may hang in its emitter, which is closed only after this."""
    begun: list[str] = []
    release = threading.Event()

    def hang(case: Case) -> Judgement:
        begun.append(case.id)
        if case.id != CASES[0].id:
            release.wait(30)
        return Judgement(result(case.id))

    started = time.monotonic()
    with pytest.raises(Stopped), at_once(2, hang, CASES) as futures:
        raise Stopped(futures[0].result().result.id)
    took = time.monotonic() - started
    release.set()
    time.sleep(0.1)  # a case that was not cancelled would start now
    assert took < 5 and len(begun) <= 4


class Interrupting(Progress):
    """Stops the run when the first case is done, with every other in hand."""

    def __init__(self, all_but_one: threading.Event) -> None:
        self._all_but_one = all_but_one

    def case_ends(self, found: CaseResult) -> None:
        assert self._all_but_one.wait(10)
        raise Stopped("SIGINT")


def test_the_report_of_a_stopped_run_has_every_finished_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second case is still at work when the run is stopped; the third has been judged."""
    third, release = threading.Event(), threading.Event()

    def hang_from_the_fourth(case: Case, *_: object) -> Judgement:
        if case.id == CASES[1].id:
            release.wait(30)
        if case.id == CASES[3].id:
            third.set()  # the same thread did the third before
            release.wait(30)
        return Judgement(result(case.id))

    monkeypatch.setattr(run, "judge_case", hang_from_the_fourth)
    options = RunOptions("stored:0.2.2", out=tmp_path, cache=tmp_path)
    told = run.blank(options)
    with pytest.raises(Stopped):
        run.run_cases(options, CASES, {"x/hub": "no hub"}, Interrupting(third), told)
    release.set()
    assert [found.id for found in told.cases] == [CASES[0].id, CASES[2].id]
    assert set(told.skipped) == {"x/hub", CASES[1].id} | {case.id for case in CASES[3:]}


@pytest.mark.parametrize(("spec", "most"), [("torch", 1), ("stored:0.2.2", 2)])
def test_one_case_at_a_time_where_the_candidate_is_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str, most: int
) -> None:
    """torch's default dtype is shared by all threads."""
    at_work: list[str] = []
    seen: list[int] = []

    def count(case: Case, *_: object) -> Judgement:
        at_work.append(case.id)
        seen.append(len(at_work))
        time.sleep(0.05)
        at_work.remove(case.id)
        return Judgement(result(case.id))

    monkeypatch.setattr(run, "judge_case", count)
    run.run_cases(RunOptions(spec, ("*",), tmp_path, cache=tmp_path), CASES, {}, Progress())
    assert max(seen) == most


def test_a_tree_that_was_edited_during_the_run_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "judge_case", lambda case, *_: Judgement(result(case.id)))
    monkeypatch.setattr(run, "changed_since", lambda *_: "it was edited")
    found = run.run_cases(RunOptions("stored:0.2.2", ("*",), tmp_path, cache=tmp_path), CASES, {}, Progress())
    assert found.verdict.exit_code == 2 and "it was edited" in found.is_new()


@pytest.mark.parametrize("locked", [True, False])
def test_one_model_is_made_or_run_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, locked: bool) -> None:
    """The lock is what prevents it: without the lock the test sees two at once."""
    at_work, together = threading.Lock(), []

    def torch_works(*_: object) -> Any:
        if at_work.acquire(blocking=False):
            time.sleep(0.05)
            at_work.release()
        else:
            together.append(threading.current_thread().name)
        return SimpleNamespace(digest="", downloads=())

    class FakeOracle:
        subject = SimpleNamespace(case=CASES[0])

        def __init__(self, *_: object) -> None:
            torch_works()

        def truth(self, mode: str = "free") -> None:
            torch_works()
            raise ParityError("made")

    monkeypatch.setattr(judge_case_module, "prepare", torch_works)
    monkeypatch.setattr(judge_case_module, "Oracle", FakeOracle)
    monkeypatch.setattr(judge_case_module, "facts_of", lambda _: Facts({}, 1))
    monkeypatch.setattr(judge_case_module, "padding_notes", lambda _: [])
    monkeypatch.setattr(judge_case_module, "version_notes", lambda _: [])
    if not locked:
        monkeypatch.setattr(judge_case_module, "TORCH", nullcontext())
    found = run.run_cases(RunOptions("stored:0.2.2", ("*",), tmp_path, cache=tmp_path), CASES, {}, Progress())
    assert [case.error for case in found.cases] == ["made"] * len(CASES)
    assert bool(together) is not locked


def test_a_case_whose_feature_the_candidate_lacks_is_not_run(tmp_path: Path) -> None:
    """It is no failure; one whose feature does not compile is an ERROR with the compiler's line."""

    def raising(kind: str, told: str) -> Giving:
        def give(*_: object) -> Any:
            raise EmitterError(kind, told)

        return Giving(give)

    case = CASES[0]
    absent = judged(case, raising("absent", "candle-mi 0.1.6 has no feature quantized"))
    broken = judged(case, raising("not-built", "feature quantized: src/backend.rs:9:1: error: x"))
    assert (absent.status, absent.outcome) == (Status.UNMEASURED, Outcome.ABSENT)
    assert (broken.status, broken.outcome) == (Status.ERROR, Outcome.ERROR) and "backend.rs:9:1" in broken.error
    whole = run.blank(RunOptions("0.1.6", (), tmp_path))
    for each in (absent, broken):
        run._take(each, whole)
    assert whole.skipped == {case.id: "candle-mi 0.1.6 has no feature quantized"}
    assert whole.cases == [broken]


# --- progress where stderr is not a terminal ------------------------------------------------------


CASE = load_cases()[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then_and_a_terminal_none(clock: list[float]) -> None:
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
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with Bar(console=console, transient=True, auto_refresh=False) as bar:
        progress = terminal.Terminal(bar, 3)
        clock[0] += 10 * terminal.LOG_SECONDS
        progress.note("building")
        assert "building" not in stream.getvalue()


def test_a_log_gets_a_line_again_where_nothing_new_is_told(clock: list[float]) -> None:
    stream = io.StringIO()
    with Bar(console=Console(file=stream, width=100), transient=True, auto_refresh=False) as bar:
        with terminal.repeated(bar, every=0.001):
            terminal.Terminal(bar).note("direct calls")
            for number in (2, 3):
                clock[0] += terminal.LOG_SECONDS
                until = time.perf_counter() + 10
                while stream.getvalue().count("direct calls\n") < number and time.perf_counter() < until:
                    time.sleep(0.001)
            time.sleep(0.05)
        clock[0] += terminal.LOG_SECONDS
        time.sleep(0.05)
    assert stream.getvalue().split() == ["direct", "calls"] * 3, "once for each span of silence, none after the end"


@pytest.mark.parametrize(
    ("candidate", "asked"), [("stored:0.2.2", "0.2.2"), ("stored:my/traces", "stored:my/traces")]
)
def test_what_is_not_run_names_a_candidate_that_can_be_asked(
    candidate: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No release stores a case that needs a download or much memory."""
    monkeypatch.setattr(run, "run_cases", lambda _options, _cases, skipped, *_: skipped)
    skipped: Any = run.run(RunOptions(candidate, cache=tmp_path, out=tmp_path), lambda _: Progress())
    assert set(skipped) == {case.id for case in load_cases() if case.lane != "default"}
    assert all(f"run --candidate {asked} --cases {id}" in why for id, why in skipped.items())
