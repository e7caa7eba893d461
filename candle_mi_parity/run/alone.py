"""Failing cases judged once more, alone in a fresh process: a fault of state is told as such."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from candle_mi_parity.candidate.sources import LiveSource, Source
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.judge.case import Judgement
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.paths import command

MOST = 6
"""Largest number of causes whose case is judged again."""
SECONDS = 20.0
BEFORE = (1, 8, 64)
"""Numbers of earlier cases that are tried, in a fresh process each; then all of them."""
NOT_TRIED = "was not judged alone, for want of time: it too may pass there, as others of this run do"

JudgeOn = Callable[[Case, Source], Judgement]


def tell_state(judgements: list[Judgement], cases: list[Case], source: Source, judge: JudgeOn, spec: str) -> None:
    """Judge the first failing case of each cause again; where it passes, say what it depends on.

    The verdict stays: a result that depends on earlier requests is wrong. No explanation is sought for it.

    Where there is no time to try a cause, and another is one of state, a note says so.

    :param cases: the cases of the judgements.
    """
    if not isinstance(source, LiveSource):
        return
    end = time.monotonic() + SECONDS
    causes: defaultdict[str, list[int]] = defaultdict(list)
    for place, judgement in enumerate(judgements):
        found = judgement.result
        if found.status is Status.FAIL or found.outcome.value == "crashed":
            causes[f"{found.family} {found.new_at or found.error}"].append(place)
    state = False
    for number, places in enumerate(causes.values()):
        if number >= MOST or time.monotonic() > end:
            for place in places if state else ():
                judgements[place].result.notes.append(NOT_TRIED)
            continue
        first = cases[places[0]]
        with source.fresh() as alone:
            again = judge(first, alone).result
        if again.status not in (Status.PASS, Status.KNOWN):
            continue
        before = [case for name in source.asked_before(first.id) for case in cases if case.id == name]
        state = True
        told, needed = _told(first, before, source, judge, end)
        for place in places:
            result = judgements[place].result
            result.notes.append(told if place == places[0] else f"as {first.id}: {told}")
            judgements[place] = replace(judgements[place], evidence=None)
            _reproduce(result, [*needed, first] if needed else [], spec)


def _told(case: Case, before: list[Case], source: LiveSource, judge: JudgeOn, end: float) -> tuple[str, list[Case]]:
    """What a case depends on, in one sentence, and the fewest earlier cases after which it fails again."""
    for count in sorted({min(count, len(before)) for count in (*BEFORE, len(before))} - {0}):
        if time.monotonic() > end:
            break
        with source.fresh() as process:
            for earlier in before[-count:]:
                judge(earlier, process)
            if judge(case, process).result.status not in (Status.PASS, Status.KNOWN):
                names = f"{count} other{'s' if count > 1 else ''}, last {before[-1].id}"
                return f"only after other cases in one process: it passes alone, and fails after {names}", before[
                    -count:
                ]
    return "it passes alone in a fresh process, and passed too after the same cases: see `run --repeat`", []


def _reproduce(result: CaseResult, cases: list[Case], spec: str) -> None:
    """Set the command that shows the cause; all its cases have the one that was tried, since each may pass alone."""
    if cases:
        result.reproduce = command("run", *(case.id for case in cases), "--candidate", spec)
        result.shrink = ""
