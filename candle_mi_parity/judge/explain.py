"""Explain a run's new divergences, and find explanations that no longer hold."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.suspects import hook_point
from candle_mi_parity.compare.verdict import CaseResult, Explained, Outcome, Status
from candle_mi_parity.judge.case import Judgement, Progress
from candle_mi_parity.judge.known import Evidence, explained
from candle_mi_parity.oracle.torch_state import TORCH
from candle_mi_parity.spec.explanations import Explanations
from candle_mi_parity.trace.trace import CandleMi

if TYPE_CHECKING:
    from candle_mi_parity.judge.hypotheses import Hypothesis


def explain_new(
    judgements: list[Judgement],
    table: Explanations,
    cache: Path,
    seconds: float,
    progress: Progress,
    each: float | None = None,
) -> None:
    """Search for the explanation of every new divergence.

    Cases of one family that first diverge at the same hook point often have one cause. The smallest of each such
    group is searched first. Another is searched after all of these, unless that explanation gives its first tensor.

    :param seconds: limit for all cases together.
    :param each: limit for one case; None for the default.
    """
    end = time.monotonic() + seconds
    causes: defaultdict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        first = judgement.result.first_divergence
        if judgement.evidence is not None and first is not None:
            causes[judgement.result.family, hook_point(first.name)].append(judgement)
    if not causes:
        return
    # Imported here because a run without a new divergence does not need torch.
    from candle_mi_parity.judge.search import SECONDS, search

    explains: list[Hypothesis] = []
    of_leader: dict[str, Hypothesis] = {}
    groups = [sorted(group, key=_size) for group in causes.values()]
    followers = [(group[0], one) for group in groups for one in group[1:]]
    for leader, judgement in [*((group[0], group[0]) for group in groups), *followers]:
        result = judgement.result
        assert judgement.evidence is not None
        if (left := min(each or SECONDS, end - time.monotonic())) <= 0:
            _add_reason(result, "the time limit of the search was reached")
            continue
        progress.note(f"{result.id}: what is computed instead?")
        with TORCH:
            if (known := of_leader.get(leader.result.id)) and _follows(
                result, judgement.evidence, known, leader.result
            ):
                continue
            found = search(result, judgement.evidence, table, cache, explains, left)
        if found is not None:
            explains = [found, *(one for one in explains if one is not found)]
            if judgement is leader:
                of_leader[result.id] = found


def _follows(result: CaseResult, evidence: Evidence, known: Hypothesis, leader: CaseResult) -> bool:
    """Whether the explanation of another case gives the numbers of a case, or of its first diverging tensor.

    The result then has the explanation, or where the case differs from it.
    """
    found = explained(evidence, known.change, known.rows)
    if isinstance(found, Explained):
        result.explained = found
        return True
    names = list(evidence.oracle.truth().tensors)
    first = result.first_divergence
    if first is None or first.name not in names or not found.first:
        return False
    if found.first in names[: names.index(first.name) + 1]:
        return False
    change, result.beyond_known = known.change.describe(), found.first
    _add_reason(result, f"{first.name} is that of {leader.id}, with {change}; then {found.first} differs from it too")
    return True


def _add_reason(result: CaseResult, reason: str) -> None:
    result.unexplained = "; ".join(filter(None, [result.unexplained, reason]))


def _size(judgement: Judgement) -> int:
    """Number of compared values: a search of a small case is fastest."""
    return sum(tensor.compared for tensor in judgement.result.tensors)


def hold_table(
    judgements: list[Judgement], table: Explanations, identity: CandleMi | None, result: RunResult, whole: bool
) -> None:
    """Find explanations that no longer hold: ``stale`` for the release that they are of, ``gone`` for others.

    :param whole: whether every case of the default lane ran. Only then an explanation that no case needs is stale or
        gone: the cases that need it may be among those that did not run.
    """
    if identity is None:
        return
    needed = {id for one in judgements if one.result.explained for id in one.result.explained.ids}
    not_needed = _not_needed(judgements) if whole else {}
    if not table.lists(identity.source, identity.version):
        result.known_before = _as_before(judgements, needed, not_needed, result.baseline)
    if not table.lists(identity.source, identity.version) and not table.exactly:
        # Where another of its cases fails, it may be there still, in another form.
        open_ids = {id for one in judgements if one.result.status is Status.FAIL for id in one.applicable}
        result.gone = {id: cases for id, cases in sorted(not_needed.items()) if id not in needed | open_ids}
    elif whole:
        result.stale = [
            f"{row.id} is expected, and no case needs it: remove it from the file of expected divergences"
            if table.exactly
            else f"{row.id} is listed for {identity.title}, and no case needs it: remove the release from its row"
            for row in table.explanation
            if result.baseline in row.releases and row.id not in needed
        ]


def _as_before(judgements: list[Judgement], needed: set[str], not_needed: dict[str, list[str]], baseline: str) -> str:
    """``94 of 94 known divergences as in 0.2.2``; empty where no explanation of the baseline applies.

    :param needed: ids of explanations without which another case is not explained. A case that agrees though one of
        them applies may have agreed before: an explanation may change nothing that a case shows.
    :param not_needed: see :func:`_not_needed`; empty for a part of the cases.
    """
    known = {one.result.id for one in judgements if one.result.status is Status.KNOWN}
    gone = {name for id, names in not_needed.items() if id not in needed for name in names}
    moved = {one.result.id for one in judgements if one.applicable and one.result.status is Status.FAIL}
    expected = len(known | gone | moved)
    return f"{len(known)} of {expected} known divergences as in {baseline}" if expected else ""


def _not_needed(judgements: list[Judgement]) -> dict[str, list[str]]:
    """Id of an explanation → cases to which it applies, and which agree or are explained without it."""
    cases: defaultdict[str, list[str]] = defaultdict(list)
    for one in judgements:
        explained = one.result.explained if one.result.status is Status.KNOWN else None
        if explained is not None or one.result.outcome is Outcome.AGREES:
            for id in set(one.applicable) - set(explained.ids if explained else ()):
                cases[id].append(one.result.id)
    return cases
