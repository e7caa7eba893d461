"""History: when a divergence came and when it went, read off the stored releases."""

import re
from functools import partial

import pytest

from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.verdict import CaseResult, Failure, Outcome, Status
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.report import history
from candle_mi_parity.report.history import History, make_history
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.run import run_cases
from candle_mi_parity.spec.cases import load_cases
from tests.support.results import case, run_of, shown

RELEASES = ("0.1.6", "0.1.10", "0.1.24", "0.2.2")
ARROWS = {
    "llama/hub": ["", "·", "·", "·"],
    "llama/v5": ["", "·", "·", "·"],
    "llama/rope-linear": ["", "·", "↑", "·"],
    "llama/rope-yarn": ["", "·", "↑", "·"],  # a refusal is better than a wrong number
    "qwen3/window": ["", "·", "↓", "·"],
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Five cases of every stored release."""
    out, cases = tmp_path_factory.mktemp("out"), [case for case in load_cases() if case.id in ARROWS]

    def run(release: str) -> RunResult:
        options = RunOptions(f"stored:{release}", tuple(ARROWS), out, search=0)
        return run_cases(options, cases, {}, Progress())

    return make_history({release: run(release) for release in RELEASES})


def test_a_divergence_that_went_has_its_arrow_where_it_went(stored: History) -> None:
    assert {case.id: case.arrows() for case in stored.cases} == ARROWS
    llama, qwen3 = stored.summary("llama", 2), stored.summary("qwen3", 2)
    assert (llama.text, llama.better, llama.worse) == ("2 agrees, 1 refused, 1 diverges", 2, 0)
    assert (qwen3.text, qwen3.better, qwen3.worse) == ("1 diverges", 0, 1)


def test_the_page_and_the_terminal_show_all_of_it(stored: History) -> None:
    page = history.page(stored)
    assert all(release in page for release in RELEASES)
    assert "↑ agrees" in page and "↑ refused" in page and "↓ diverges" in page
    assert re.search(r"<code>blocks.0.attn.hook_scores</code> [12]\.\d+e\+06", page)
    assert 'title="CMI001: ' in page, "what is known of a divergence"
    assert "0.1.10 → 0.1.24: 2 cases better, 1 worse" in shown(partial(history.terminal, stored), 140)


def test_a_case_that_a_release_lacks_has_no_arrow() -> None:
    (found,) = make_history({"1": run_of(case("llama/hub")), "2": run_of()}).cases
    assert found.arrows() == ["", "·"] and found.results[1] is None
    with pytest.raises(ValueError, match="no stored release"):
        make_history({})


def test_an_outcome_is_decided_by_status_and_failure_and_by_no_message() -> None:
    def outcome(failure: Failure | None) -> Outcome:
        status = Status.ERROR if failure else Status.PASS
        return CaseResult("a/b", "a", "", status, "", error="model: no refusal", failure=failure).outcome

    refused, lost = (
        {Failure.MODEL, Failure.SAE, Failure.FORWARD},
        {Failure.INPUT, Failure.INTERNAL, Failure.NOT_BUILT},
    )
    crashed = {*Failure} - refused - lost - {Failure.ABSENT}
    assert outcome(None) is Outcome.AGREES
    assert {failure for failure in Failure if outcome(failure) is Outcome.REFUSED} == refused
    assert {failure for failure in Failure if outcome(failure) is Outcome.CRASHED} == crashed
    assert {failure for failure in Failure if outcome(failure) is Outcome.ABSENT} == {Failure.ABSENT}
    assert {failure for failure in Failure if outcome(failure) is Outcome.ERROR} == lost


def test_a_case_with_numbers_was_judged() -> None:
    found = [case("llama/hub", status).outcome for status in (Status.FAIL, Status.KNOWN, Status.UNMEASURED)]
    assert found == [Outcome.DIVERGES, Outcome.DIVERGES, Outcome.UNMEASURED]
    assert CaseResult("llama/hub", "llama", "", Status.UNMEASURED, "", failure=Failure.INPUT).outcome is Outcome.ERROR
