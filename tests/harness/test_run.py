"""A run: two cases at a time, results in order, and nothing begun after the run broke off."""

from __future__ import annotations

import threading
import time

import pytest
from results import case as result

from candle_mi_parity.cases import Case, load_cases
from candle_mi_parity.run import two_at_a_time
from candle_mi_parity.verdict import CaseResult

CASES = load_cases()[:8]


def test_the_next_case_is_emitted_while_one_is_compared() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def judge(case: Case) -> CaseResult:
        meeting.wait()  # a broken barrier raises: one case at a time never meets another
        return result(case.id)

    with two_at_a_time(judge, CASES) as results:
        assert len(list(results)) == len(CASES)


def test_results_come_in_the_order_of_the_cases() -> None:
    def judge(case: Case) -> CaseResult:
        time.sleep(0.05 if case.id == CASES[0].id else 0)
        return result(case.id)

    with two_at_a_time(judge, CASES) as results:
        assert [found.id for found in results] == [case.id for case in CASES]


def test_a_run_that_breaks_off_begins_no_further_case() -> None:
    begun: list[str] = []

    def judge(case: Case) -> CaseResult:
        begun.append(case.id)
        time.sleep(0.05)
        return result(case.id)

    with pytest.raises(KeyboardInterrupt), two_at_a_time(judge, CASES) as results:
        raise KeyboardInterrupt(next(results).id)
    assert len(begun) <= 4
