"""A failing case that passes alone in a fresh process is told as a fault of state."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pytest

from candle_mi_parity.candidate.sources import LiveSource, Source
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.judge.case import Judgement
from candle_mi_parity.run import alone
from candle_mi_parity.run.alone import tell_state
from candle_mi_parity.spec.cases import Case, load_cases
from tests.support.results import case as result

CASES = load_cases()[:20]


class Stateful(LiveSource):
    """A candidate that fails the last case once it has answered the case ``spoiler``, or always, or once."""

    def __init__(self, spoiler: str) -> None:
        self.spoiler = spoiler
        self._asked: list[str] = []

    def fresh(self) -> Stateful:
        return Stateful(self.spoiler if self.spoiler != "once" else "never")

    def __exit__(self, *_: object) -> None: ...

    def __enter__(self) -> Self:
        return self


def judge(case: Case, source: Source) -> Judgement:
    assert isinstance(source, Stateful)
    spoilt = source.spoiler in (*source._asked, "always", "once") and source.spoiler != "never"
    source._asked.append(case.id)
    return Judgement(result(case.id, Status.FAIL if spoilt and case == CASES[-1] else Status.PASS))


def told(spoiler: str) -> CaseResult:
    source = Stateful(spoiler)
    judgements = [judge(case, source) for case in CASES]
    assert judgements[-1].result.status is Status.FAIL
    tell_state(judgements, CASES, source, judge, "path:x")
    assert judgements[-1].result.status is Status.FAIL, "the verdict stays"
    return judgements[-1].result


@pytest.mark.parametrize(("place", "count"), [(18, 1), (15, 8), (0, 19)])
def test_the_fewest_earlier_cases_are_named_and_in_the_command(place: int, count: int) -> None:
    found = told(CASES[place].id)
    others = f"{count} other{'s' if count > 1 else ''}, last {CASES[18].id}"
    assert found.notes == [f"only after other cases in one process: it passes alone, and fails after {others}"]
    words = found.reproduce.split()
    assert words[words.index("run") + 1 : words.index("--candidate")] == [case.id for case in CASES[-count - 1 :]]


def test_all_cases_of_a_cause_have_the_command_that_was_tried() -> None:
    """Another of them may pass alone, and is the one that the terminal shows if it is smaller."""
    source = Stateful(CASES[17].id)
    judgements = [judge(case, source) for case in [*CASES[:18], CASES[-1]]]
    judgements.append(Judgement(result(f"{CASES[-1].family}/another", Status.FAIL)))
    tell_state(judgements, [*CASES[:18], CASES[-1], CASES[18]], source, judge, "path:x")
    first, second = (judgement.result for judgement in judgements[-2:])
    assert second.reproduce == first.reproduce and f" {CASES[-1].id} --candidate path:x" in second.reproduce
    assert second.notes == [f"as {CASES[-1].id}: {first.notes[0]}"]


def test_what_was_not_tried_beside_a_fault_of_state_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "MOST", 1)
    for spoiler, told in ((CASES[17].id, [alone.NOT_TRIED]), ("always", [])):
        source = Stateful(spoiler)
        judgements = [judge(case, source) for case in [*CASES[:18], CASES[-1]]]
        judgements.append(Judgement(result("another/family", Status.FAIL)))
        tell_state(judgements, [*CASES[:18], CASES[-1], CASES[18]], source, judge, "path:x")
        assert judgements[-1].result.notes == told


def test_a_case_that_fails_alone_too_is_no_fault_of_state() -> None:
    assert told("always").notes == []


def test_a_case_that_fails_once_is_told_as_not_repeatable() -> None:
    found = told("once")
    assert "passed too after the same cases" in found.notes[0] and "run --repeat" in found.notes[0]


def test_a_stored_release_has_no_process(tmp_path: Path) -> None:
    judgements = [Judgement(result("a/b", Status.FAIL))]
    tell_state(judgements, CASES[:1], object(), judge, "stored:0.2.2")  # type: ignore[arg-type]
    assert judgements[0].result.notes == []
