"""A whole run: its cases, and the answers to the two questions of a reader."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status
from candle_mi_parity.spec.explanations import Cause


class Verdict(StrEnum):
    """Verdict of a run, with its exit code. KNOWN: cases diverge, and all divergences are known."""

    PASS = "PASS"
    KNOWN = "KNOWN"
    FAIL = "FAIL"
    ERROR = "ERROR"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        codes = {Verdict.PASS: 0, Verdict.KNOWN: 0, Verdict.FAIL: 1, Verdict.ERROR: 2, Verdict.INCONCLUSIVE: 3}
        return codes[self]


def now() -> str:
    """ISO 8601, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Forwards:
    """Forward passes beside the judged one of each case: without captures, with one, after others, in a new process.

    :ivar results: one for each case, with a tensor for each forward; a single one if nothing was asked.
    :ivar skipped: why none was made; empty if they were.
    """

    results: list[CaseResult] = field(default_factory=list)
    skipped: str = ""

    @property
    def new(self) -> list[CaseResult]:
        """Cases with a forward that is not equal."""
        return [case for case in self.results if case.status is not Status.PASS]

    def line(self) -> str:
        """``2061 of 2061 forwards of 184 cases equal the judged ones to the bit``, and where they do not."""
        if self.skipped:
            return f"no other forwards were made: {self.skipped}"
        equal = sum(case.compared for case in self.results)
        every = sum(case.expected for case in self.results)
        size = f"{equal} of {every} forwards of {_many(len(self.results), 'case')}"
        differ = f", not those of {_many(len(self.new), 'case')}" if self.new else ""
        return f"{size} equal the judged ones to the bit{differ}"


@dataclass(frozen=True)
class DirectCalls:
    """candle-mi's public functions, called one by one.

    :ivar results: one for each call; a single one if no call was answered.
    :ivar skipped: why the calls were not judged; empty if they were.
    """

    results: list[CaseResult] = field(default_factory=list)
    skipped: str = ""

    @property
    def new(self) -> list[CaseResult]:
        """Calls that neither agree nor are known to differ."""
        return [call for call in self.results if call.status not in _RIGHT_AND_KNOWN]

    def line(self) -> str:
        """``75 of 100 direct calls agree, 25 do not for 8 known causes``, and the new ones by name."""
        if self.skipped:
            return f"direct calls were not judged: {self.skipped}"
        agree, known = (sum(1 for call in self.results if call.status is wanted) for wanted in _RIGHT_AND_KNOWN)
        text = f"{agree} of {len(self.results)} direct calls agree"
        causes = len(_ids(call for call in self.results if call.status is Status.KNOWN))
        text += f", {known} do not for {_many(causes, 'known cause')}" if known else ""
        return text + (f", and new: {', '.join(call.id for call in self.new)}" if self.new else "")


_RIGHT_AND_KNOWN = (Status.PASS, Status.KNOWN)
_OTHERWISE = ("gives other numbers in another forward", "give other numbers in another forward")


@dataclass
class RunResult:
    """All cases against one candidate.

    :ivar candidate: as the user spelt it.
    :ivar identity: the candidate as its traces name it; empty if none was read.
    :ivar baseline: the release whose explanations apply to the candidate; empty if there is none.
    :ivar skipped: case id → reason and remedy.
    :ivar known: id → cause, for all listed releases.
    :ivar gone: id of an explanation of the baseline → cases to which it applies and that agree; only for a candidate
        that was built from source.
    :ivar known_before: how many cases diverge as in the baseline, for a candidate that is not the baseline itself.
    :ivar stale: explanations of a release that no longer hold, one line each.
    :ivar calls: direct calls of functions; None if only some cases were run.
    :ivar forwards: forward passes beside the cases'; None before they were made.
    :ivar fault: why the run ended early, one line; the results until then are kept.
    :ivar started: when the run began, ISO 8601.
    :ivar tick: the same on a monotonic clock, in seconds.
    :ivar seconds: duration of the run until its report was written.
    """

    candidate: str
    identity: dict[str, str]
    versions: dict[str, str]
    cases: list[CaseResult]
    skipped: dict[str, str]
    stale: list[str] = field(default_factory=list)
    strict: bool = False
    fault: str = ""
    baseline: str = ""
    known_before: str = ""
    known: dict[str, Cause] = field(default_factory=dict)
    gone: dict[str, list[str]] = field(default_factory=dict)
    started: str = field(default_factory=now)
    tick: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    calls: DirectCalls | None = None
    forwards: Forwards | None = None

    @property
    def judged(self) -> list[CaseResult]:
        """The cases and the direct calls, which are compared with PyTorch."""
        return [*self.cases, *(self.calls.results if self.calls else ())]

    @property
    def results(self) -> list[CaseResult]:
        """The same, and the other forwards of the cases."""
        return [*self.judged, *(self.forwards.results if self.forwards else ())]

    def count(self, status: Status) -> int:
        return sum(1 for case in self.cases if case.status is status)

    def outcomes(self, *outcomes: Outcome) -> list[CaseResult]:
        return [case for case in self.cases if case.outcome in outcomes]

    @property
    def wrong_causes(self) -> list[str]:
        """Ids of the known causes of other numbers, in cases and in direct calls."""
        return self._causes(Outcome.DIVERGES)

    @property
    def refused_causes(self) -> list[str]:
        """Ids of the known causes of refusals."""
        return self._causes(Outcome.REFUSED)

    def _causes(self, outcome: Outcome) -> list[str]:
        known = (case for case in self.judged if case.status is Status.KNOWN)
        return sorted(_ids(case for case in known if case.outcome is outcome))

    @property
    def verdict(self) -> Verdict:
        """FAIL before ERROR before INCONCLUSIVE before KNOWN; ERROR for a run that ended early."""
        if self.fault:
            return Verdict.ERROR
        seen = {case.status for case in self.results}
        if Status.FAIL in seen or self.stale or (self.strict and Status.KNOWN in seen):
            return Verdict.FAIL
        if Status.ERROR in seen:
            return Verdict.ERROR
        # A known refusal compares nothing, and is what was expected.
        nothing = not any(case.compared or case.status is Status.KNOWN for case in self.judged)
        short = any(case.compared < case.expected for case in self.cases)
        if nothing or short or Status.UNMEASURED in seen:
            return Verdict.INCONCLUSIVE
        return Verdict.KNOWN if Status.KNOWN in seen else Verdict.PASS

    def notes(self) -> dict[str, list[str]]:
        """Each note once, with the ids of its cases."""
        notes: dict[str, list[str]] = {}
        for case in self.cases:
            for note in case.notes:
                notes.setdefault(note, []).append(case.id)
        return notes

    def tally(self) -> dict[str, int]:
        """Number of cases by outcome, and of those that did not run; they add up to all cases."""
        counts = {
            "agree": len(self.outcomes(Outcome.AGREES)),
            "other numbers": len(self.outcomes(Outcome.DIVERGES)),
            "refused": len(self.outcomes(Outcome.REFUSED)),
            "crashed": len(self.outcomes(Outcome.CRASHED)),
            "not measured": len(self.outcomes(Outcome.UNMEASURED, Outcome.ABSENT, Outcome.ERROR)),
            "not run": len(self.skipped),
        }
        return {name: count for name, count in counts.items() if count or name != "crashed"}

    def is_right(self) -> str:
        """Does candle-mi compute what PyTorch computes? One sentence with its counts."""
        if not self.judged:
            return "Unknown: no case was judged."
        unknown = dict.fromkeys(Outcome, 0)
        for case in self.cases:
            unknown[case.outcome] += case.status is not Status.KNOWN
        parts = [
            _count(len(self.wrong_causes), "known cause", "gives other numbers", "give other numbers"),
            _count(len(self.refused_causes), "", "is refused", "are refused"),
            _count(unknown[Outcome.DIVERGES], "new case", "differs", "differ"),
            _count(unknown[Outcome.REFUSED], "new case", "is refused", "are refused"),
            _count(unknown[Outcome.CRASHED], "new case", "crashes", "crash"),
            _count(len(self.calls.new) if self.calls else 0, "new direct call", "differs", "differ"),
            _count(len(self.forwards.new) if self.forwards else 0, "case", *_OTHERWISE),
        ]
        tally, calls = self.tally(), self.calls.results if self.calls else []
        unmeasured = f"{tally['not measured']} could not be measured" if tally["not measured"] else ""
        rest = [f"{tally['agree']} of {len(self.cases)} cases agree" if self.cases else "", unmeasured]
        agree = sum(1 for call in calls if call.outcome is Outcome.AGREES)
        rest.append(f"{agree} of {len(calls)} direct calls agree" if calls else "")
        words = "Not everywhere" if any(parts) else "As far as measured" if unmeasured else "Yes"
        return f"{words}: {'; '.join(', '.join(filter(None, group)) for group in (parts, rest) if any(group))}."

    def is_new(self) -> str:
        """Is anything new since the baseline? One sentence."""
        if self.fault:
            return f"Unknown: {self.fault}."
        since = f" since {self.baseline}" if self.baseline else ""
        old, gone = f"of {self.baseline}", f"gone ({', '.join(self.gone)})"
        parts = [
            _count(self.count(Status.FAIL), "case", "fails", "fail"),
            _count(self.count(Status.ERROR), "case", "could not be judged", "could not be judged"),
            _count(len(self.calls.new) if self.calls else 0, "direct call", "fails", "fail"),
            _count(len(self.forwards.new) if self.forwards else 0, "case", *_OTHERWISE),
            _count(len(self.stale), "explanation", "no longer holds", "no longer hold"),
            _count(len(self.gone), "known divergence", f"{old} is {gone}", f"{old} are {gone}"),
        ]
        answer = f"New{since}: {'; '.join(filter(None, parts))}" if any(parts) else f"Nothing new{since}"
        answer += f"; {self.known_before}" if self.known_before else ""
        strict = self.strict and any(case.status is Status.KNOWN for case in self.judged)
        return answer + (", but --strict lets no known divergence pass." if strict else ".")

    def line(self) -> str:
        """The verdict, the cases by outcome, what is new, and how much was compared."""
        cases = ", ".join(f"{count} {name}" for name, count in self.tally().items() if count) or "no case"
        tensors = sum(case.compared for case in self.cases)
        noisy = sum(case.unmeasured for case in self.cases)
        size = f"{tensors} tensors compared" + (f", {noisy} too noisy to judge" if noisy else "")
        return f"{self.verdict.value}: {cases}. {self.is_new()} {size}."


def _ids(cases: Iterable[CaseResult]) -> list[str]:
    return list(dict.fromkeys(name for case in cases if case.explained for name in case.explained.ids))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 or not noun else 's'}".rstrip()


def _count(count: int, noun: str, one: str, several: str) -> str:
    """``1 case fails``, ``2 cases fail``; empty for none."""
    return f"{_many(count, noun)} {one if count == 1 else several}" if count else ""
