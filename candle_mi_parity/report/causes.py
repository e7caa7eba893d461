"""Cases that do not agree, grouped by cause; page, terminal, summary and JSON show the same groups."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.suspects import hook_point
from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status
from candle_mi_parity.files.escape import few, one_line

MOST = 6
"""Largest number of places in a line of failures."""
NEW = "Is anything new?"


def right(result: RunResult) -> str:
    """The first question, of candle-mi or of another program."""
    program = "TransformerLens" if result.candidate == "transformer-lens" else "the program"
    who = program if result.candidate.startswith(("command:", "transformer-lens")) else "candle-mi"
    return f"Does {who} compute what PyTorch computes?"


"""The two questions, which :class:`RunResult` answers."""


@dataclass(frozen=True)
class CauseSeen:
    """One cause, with the cases or direct calls in which it occurs.

    :ivar id: ``CMI006`` for a known cause, ``new-1`` for a new one.
    :ivar name: of a known cause, in a few words.
    :ivar says: what candle-mi does instead, in one sentence.
    :ivar cases: the smallest first.
    """

    id: str
    says: str
    cases: list[CaseResult]
    name: str = ""
    kind: str = ""
    remedy: str = ""

    @property
    def anchor(self) -> str:
        """Anchor of its evidence on the page."""
        return f"of-{self.id.replace(' ', '-')}"

    @property
    def leader(self) -> CaseResult:
        return self.cases[0]

    @property
    def outcome(self) -> Outcome:
        return self.leader.outcome

    @property
    def status(self) -> Status:
        return self.leader.status

    @property
    def worst(self) -> float | None:
        """Largest ratio under the explanation, gate 8; None for refusals and unexplained divergences."""
        ratios = [case.explained.worst for case in self.cases if case.explained and case.explained.ratios]
        return max(ratios, default=None)


def known_causes(result: RunResult) -> list[CauseSeen]:
    """Known causes of other numbers, then of refusals; a case with two causes is in both."""
    found = []
    for id in dict.fromkeys([*result.wrong_causes, *result.refused_causes]):
        known = (case for case in result.judged if case.status is Status.KNOWN)
        cases = sorted((case for case in known if case.explained and id in case.explained.ids), key=_size)
        if row := result.known.get(id):
            found.append(CauseSeen(id, row.says, cases, row.name, row.kind, row.remedy))
        elif explained := cases[0].explained:
            found.append(CauseSeen(id, explained.says, cases, remedy=explained.remedy))
    return found


def known_together(result: RunResult) -> list[CauseSeen]:
    """The same cases, each once, grouped by their combination of causes."""
    groups = grouped(case for case in result.judged if case.status is Status.KNOWN)
    found = [
        CauseSeen(" and ".join(explained.ids), explained.says, group)
        for group in groups
        if (explained := group[0].explained)
    ]
    return sorted(found, key=lambda cause: (cause.outcome.rank, cause.id))


def new_causes(result: RunResult) -> list[CauseSeen]:
    """Causes of cases that fail or could not be judged, the gravest first."""
    gravest = [Status.FAIL, Status.ERROR, Status.UNMEASURED]
    groups = grouped(case for case in result.results if case.status in gravest)
    groups.sort(key=lambda cases: gravest.index(cases[0].status))
    return [CauseSeen(f"new-{place}", _says(cases[0]), cases, kind="new") for place, cases in enumerate(groups, 1)]


def grouped(cases: Iterable[CaseResult]) -> list[list[CaseResult]]:
    """Cases by explanation, by family (calls by function) and first hook point, or by message; smallest first."""
    found: dict[tuple[str, ...], list[CaseResult]] = {}
    for case in cases:
        found.setdefault((case.status.value, *_key(case)), []).append(case)
    return [sorted(group, key=_size) for group in found.values()]


def failures(result: RunResult) -> list[str]:
    """The cases and calls that fail or could not be judged, one line for each status, grouped by what is new.

    Other forwards come last: where the traces of a case fail, they do too.

    ``FAIL: 166 first at blocks.0.attn.hook_scores (llama/hub and 165 more); llama/batch first at logits``.
    """
    lines = []
    others = {case.id for case in result.results} - {case.id for case in result.judged}
    for status in (Status.FAIL, Status.ERROR, Status.UNMEASURED):
        groups: dict[str, list[CaseResult]] = {}
        for case in result.results:
            if case.status is status:
                key = _where(case) if case.new_at else re.sub(r"\d+", "N", _where(case))
                groups.setdefault(key, []).append(case)
        parts = []
        for cases in sorted(groups.values(), key=lambda group: (group[0].id in others, -len(group))):
            names, where = [case.id for case in cases], _where(cases[0])
            parts.append(f"{names[0]} {where}" if len(names) == 1 else f"{len(names)} {where} ({few(names, 3)})")
        if parts:
            lines.append(
                f"{status.value}: {'; '.join(parts[:MOST])}"
                + f"; and {len(parts) - MOST} other places" * (len(parts) > MOST)
            )
    return lines


def _where(case: CaseResult) -> str:
    if case.new_at:
        known = ", beside what is known" if case.beyond_known else ""
        state = ", only after other cases" if any("only after other cases" in note for note in case.notes) else ""
        return f"first at {case.new_at}{known}{state}"
    error = case.error.replace(case.id, "…") if "/" in case.id else case.error
    return one_line(error, 160) or "without a reason"


def _key(case: CaseResult) -> tuple[str, ...]:
    first = case.first_divergence
    if case.explained:
        return tuple(case.explained.ids) or (case.explained.change,)
    if first:
        # The results of two functions have the same names; a call's id without its last part stands for the function.
        of = case.id.rpartition("/")[0] if case.family == "calls" else case.family
        return of, hook_point(case.new_at)
    return (re.sub(r"\d+", "0", case.error.replace(case.id, "")),)


def _says(case: CaseResult) -> str:
    first = case.first_divergence
    if case.explained:
        return one_line(case.explained.line())
    if first:
        place = f"{case.family} first differs at {hook_point(case.new_at)}"
        return one_line(f"{place}: {case.unexplained}" if case.unexplained else place)
    return one_line(case.error)


def _size(case: CaseResult) -> int:
    return sum(tensor.compared for tensor in case.tensors)
