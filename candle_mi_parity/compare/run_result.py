"""A whole run: its cases, and the two questions that a reader asks of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status


class Verdict(StrEnum):
    """Of a run, with its exit code. KNOWN: something is wrong, and all of it was known."""

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
class DirectCalls:
    """candle-mi's public functions, called one by one.

    :ivar results: one a call, as of a case; one alone where no call was answered.
    :ivar skipped: why they were not judged; empty where they were.
    """

    results: list[CaseResult] = field(default_factory=list)
    skipped: str = ""

    @property
    def known(self) -> dict[str, list[CaseResult]]:
        """Calls whose divergence or refusal is known, by cause: id and sentence."""
        found: dict[str, list[CaseResult]] = {}
        for call in self.results:
            if call.status is Status.KNOWN and call.explained is not None:
                found.setdefault(f"{', '.join(call.explained.ids)}: {call.explained.says}", []).append(call)
        return found

    @property
    def new(self) -> list[CaseResult]:
        """Calls that neither agree nor are known not to."""
        return [call for call in self.results if call.status not in _RIGHT_AND_KNOWN]

    def line(self) -> str:
        """``75 of 100 direct calls agree, 25 do not for 8 known causes``, and the new ones by name."""
        if self.skipped:
            return f"direct calls were not judged: {self.skipped}"
        agree, known = (sum(1 for call in self.results if call.status is wanted) for wanted in _RIGHT_AND_KNOWN)
        text = f"{agree} of {len(self.results)} direct calls agree"
        text += f", {known} do not for {_many(len(self.known), 'known cause')}" if known else ""
        return text + (f", and new: {', '.join(call.id for call in self.new)}" if self.new else "")


_RIGHT_AND_KNOWN = (Status.PASS, Status.KNOWN)


@dataclass
class RunResult:
    """All cases against one candidate.

    :ivar candidate: as the user spelt it.
    :ivar identity: what the traces say they came from; empty when none was read.
    :ivar baseline: the release whose explanations are listed for the candidate; empty for none.
    :ivar skipped: case id → reason and remedy.
    :ivar gone: id of an explanation of the baseline → the cases that agree though it applies to them; of a candidate
        that was built from source.
    :ivar stale: what is wrong with the explanations themselves, one line each; of a release.
    :ivar calls: direct calls of functions; None where only some cases were asked for.
    :ivar fault: what ended the run before its end, one line; what was judged until then is kept.
    :ivar started: when the run began, ISO 8601.
    :ivar tick: the same on a clock that no change of the date moves, in seconds.
    :ivar seconds: how long the run took until its report was written.
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
    gone: dict[str, list[str]] = field(default_factory=dict)
    started: str = field(default_factory=now)
    tick: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    calls: DirectCalls | None = None

    @property
    def judged(self) -> list[CaseResult]:
        """The cases and the direct calls."""
        return [*self.cases, *(self.calls.results if self.calls else ())]

    def count(self, status: Status) -> int:
        return sum(1 for case in self.cases if case.status is status)

    def outcomes(self, *outcomes: Outcome) -> list[CaseResult]:
        return [case for case in self.cases if case.outcome in outcomes]

    @property
    def wrong_causes(self) -> list[str]:
        """Ids of the known causes of other numbers, in the order in which they are met."""
        return _ids(case for case in self.outcomes(Outcome.DIVERGES) if case.status is Status.KNOWN)

    @property
    def refused_causes(self) -> list[str]:
        """Ids of the known causes of refusals."""
        return _ids(case for case in self.outcomes(Outcome.REFUSED) if case.status is Status.KNOWN)

    @property
    def verdict(self) -> Verdict:
        """FAIL before ERROR before INCONCLUSIVE before KNOWN; a run that broke off is an ERROR whatever it saw."""
        if self.fault:
            return Verdict.ERROR
        seen = {case.status for case in self.judged}
        if Status.FAIL in seen or self.stale or (self.strict and Status.KNOWN in seen):
            return Verdict.FAIL
        if Status.ERROR in seen:
            return Verdict.ERROR
        nothing = not any(case.compared for case in self.judged)
        short = any(case.compared < case.expected for case in self.cases)
        if nothing or short or Status.UNMEASURED in seen:
            return Verdict.INCONCLUSIVE
        return Verdict.KNOWN if Status.KNOWN in seen else Verdict.PASS

    def is_right(self) -> str:
        """Does candle-mi compute what PyTorch computes? One sentence with its counts, which add up to the cases."""
        total, agree = len(self.cases), len(self.outcomes(Outcome.AGREES))
        if not total:
            return "Unknown: no case was judged."
        new = [case for case in self.outcomes(Outcome.DIVERGES, Outcome.CRASHED) if case.status is not Status.KNOWN]
        refused = [case for case in self.outcomes(Outcome.REFUSED) if case.status is not Status.KNOWN]
        parts = []
        if causes := self.wrong_causes:
            parts.append(f"{_many(len(causes), 'known cause')} {_verb(len(causes), 'give')} other numbers")
        if causes := self.refused_causes:
            parts.append(f"{len(causes)} {'is' if len(causes) == 1 else 'are'} refused")
        if new:
            parts.append(f"{_many(len(new), 'case')} {_verb(len(new), 'differ')} in a way that is not known")
        if refused:
            parts.append(
                f"{_many(len(refused), 'case')} {'is' if len(refused) == 1 else 'are'} refused that should not be"
            )
        unmeasured = total - agree - len(self.outcomes(Outcome.DIVERGES, Outcome.CRASHED, Outcome.REFUSED))
        rest = f"{agree} of {total} cases agree" + (f", {unmeasured} could not be measured" if unmeasured else "")
        if self.calls and self.calls.results:
            calls = [call.outcome is Outcome.AGREES for call in self.calls.results]
            rest += f", and {sum(calls)} of {len(calls)} direct calls"
            parts += [] if parts or all(calls) else ["direct calls of functions differ"]
        if parts:
            return f"Not everywhere: {', '.join(parts)}; {rest}."
        return f"Yes: {rest}." if agree == total else f"Where it was measured: {rest}."

    def is_new(self) -> str:
        """Is anything new since the baseline? One sentence."""
        if self.fault:
            return f"Unknown: {self.fault}."
        since = f" since {self.baseline}" if self.baseline else ""
        new = [case for case in self.cases if case.status is Status.FAIL]
        parts = []
        if new:
            parts.append(f"{_many(len(new), 'case')} {_verb(len(new), 'fail')}")
        if self.count(Status.ERROR):
            parts.append(f"{_many(self.count(Status.ERROR), 'case')} could not be judged")
        if self.calls and self.calls.new:
            parts.append(f"{_many(len(self.calls.new), 'direct call')} {_verb(len(self.calls.new), 'fail')}")
        if self.stale:
            parts.append(f"{_many(len(self.stale), 'explanation')} no longer {_verb(len(self.stale), 'hold')}")
        if self.gone:
            gone, verb = len(self.gone), "is" if len(self.gone) == 1 else "are"
            parts.append(f"{_many(gone, 'known divergence')} of {self.baseline} {verb} gone ({', '.join(self.gone)})")
        return f"New{since}: {'; '.join(parts)}." if parts else f"Nothing new{since}."

    def line(self) -> str:
        """Both answers behind the verdict's word, and what was compared."""
        tensors = sum(case.compared for case in self.cases)
        noisy = sum(case.unmeasured for case in self.cases)
        text = f"{self.verdict.value}: {self.is_right()} {self.is_new()} {tensors} tensors compared"
        text += f", {noisy} too noisy to judge" if noisy else ""
        return text + (f", {_many(len(self.skipped), 'case')} not run" if self.skipped else "") + "."


def _ids(cases: Iterable[CaseResult]) -> list[str]:
    return list(dict.fromkeys(name for case in cases if case.explained for name in case.explained.ids))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _verb(count: int, verb: str) -> str:
    return f"{verb}s" if count == 1 else verb
