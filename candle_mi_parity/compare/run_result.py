"""A whole run: its cases, and the answers to the two questions of a reader."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status
from candle_mi_parity.files.escape import few
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
class Section:
    """A part of a run beside the table's cases: direct calls, other forwards, tokenizers, generic configs.

    :ivar noun: of one result, as in ``direct call``.
    :ivar results: one for each; a single one if nothing was answered.
    :ivar skipped: why nothing was judged; empty if it was.
    :ivar left_out: what could not be judged → reason and remedy.
    :ivar asked_for: whether this part was named, so that leaving anything out is no answer.
    :ivar of_tensors: whether the noun stands for the tensors of a result, as a forward of a case does.
    """

    noun: str
    results: list[CaseResult] = field(default_factory=list)
    skipped: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    of_tensors: bool = False
    asked_for: bool = False

    @property
    def new(self) -> list[CaseResult]:
        """Results that neither agree nor are known to differ."""
        return [case for case in self.results if case.status not in _RIGHT_AND_KNOWN]

    @property
    def failing(self) -> list[CaseResult]:
        return [case for case in self.results if case.status is Status.FAIL]

    @property
    def not_judged(self) -> str:
        """``7 tokenizers could not be judged``, for a fault that may be the suite's; empty where all were."""
        return _count(len(self.new) - len(self.failing), self.noun, "could not be judged", "could not be judged")

    @property
    def agree(self) -> str:
        """``75 of 100 direct calls agree``; empty where nothing was judged."""
        if self.of_tensors:
            agree, every = (sum(getattr(case, name) for case in self.results) for name in ("compared", "expected"))
        else:
            agree, every = sum(1 for case in self.results if case.status is Status.PASS), len(self.results)
        return f"{agree} of {every} {self.noun}s agree" if self.results else ""

    def line(self) -> str:
        """``75 of 100 direct calls agree, 25 do not for 8 known causes``, what is new, and what is left out."""
        if self.skipped:
            return f"no {self.noun} was judged: {self.skipped}"
        known = [case for case in self.results if case.status is Status.KNOWN]
        text = self.agree
        if known:
            text += f", {len(known)} do{'es' * (len(known) == 1)} not for {_many(len(_ids(known)), 'known cause')}"
        text += f", and new: {few([case.id for case in self.new], 3)}" if self.new else ""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        return text + "".join(f"; not asked: {', '.join(names)}: {reason}" for reason, names in reasons.items())


_RIGHT_AND_KNOWN = (Status.PASS, Status.KNOWN)
FORWARDS = "forwards"
"""Key of the section in which candle-mi is compared with itself."""


@dataclass
class RunResult:
    """All cases against one candidate.

    :ivar candidate: as the user spelt it.
    :ivar identity: the candidate as its traces name it; empty if none was read.
    :ivar build: what the candidate was built with, and what in it is not as published; empty if nothing was built.
    :ivar baseline: the release whose explanations apply to the candidate; empty if there is none.
    :ivar skipped: case id → reason and remedy.
    :ivar known: id → cause, for all listed releases.
    :ivar gone: id of an explanation of the baseline → cases to which it applies and that agree; only for a candidate
        that was built from source.
    :ivar known_before: how many cases diverge as in the baseline, for a candidate that is not the baseline itself.
    :ivar stale: explanations of a release that no longer hold, one line each.
    :ivar sections: what was asked beside the cases, by key: ``calls``, ``forwards``, ``tokens``, ``auto-config``.
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
    build: str = ""
    baseline: str = ""
    known_before: str = ""
    known: dict[str, Cause] = field(default_factory=dict)
    gone: dict[str, list[str]] = field(default_factory=dict)
    started: str = field(default_factory=now)
    tick: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    sections: dict[str, Section] = field(default_factory=dict)

    @property
    def judged(self) -> list[CaseResult]:
        """The cases and the parts of sections that are compared with PyTorch."""
        return [*self.cases, *(one for key, part in self.sections.items() if key != FORWARDS for one in part.results)]

    @property
    def results(self) -> list[CaseResult]:
        """The same, and the other forwards of the cases."""
        return [*self.cases, *(one for part in self.sections.values() for one in part.results)]

    @property
    def not_run(self) -> dict[str, str]:
        """What did not run, cases and parts of sections → reason and remedy."""
        left = {f"{key}/{id}": why for key, part in self.sections.items() for id, why in part.left_out.items()}
        return self.skipped | left

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
        short = short or any(part.asked_for and (part.skipped or part.left_out) for part in self.sections.values())
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
            *(_count(len(part.failing), f"new {part.noun}", "differs", "differ") for part in self.sections.values()),
        ]
        tally = self.tally()
        unmeasured = f"{tally['not measured']} could not be measured" if tally["not measured"] else ""
        rest = [f"{tally['agree']} of {len(self.cases)} cases agree" if self.cases else "", unmeasured]
        rest += [text for part in self.sections.values() for text in (part.agree, part.not_judged)]
        lost = unmeasured or any(part.not_judged for part in self.sections.values())
        words = "Not everywhere" if any(parts) else "As far as measured" if lost else "Yes"
        return f"{words}: {'; '.join(', '.join(filter(None, group)) for group in (parts, rest) if any(group))}."

    def is_new(self) -> str:
        """Is anything new since the baseline? One sentence."""
        if self.fault:
            return f"Unknown: {self.fault}."
        if not self.judged:
            return "Unknown: no case was judged."
        since = f" since {self.baseline}" if self.baseline else ""
        old, gone = f"of {self.baseline}", f"gone ({', '.join(self.gone)})"
        parts = [
            _count(self.count(Status.FAIL), "case", "fails", "fail"),
            _count(self.count(Status.ERROR), "case", "could not be judged", "could not be judged"),
            *(_count(len(part.failing), part.noun, "fails", "fail") for part in self.sections.values()),
            *(part.not_judged for part in self.sections.values()),
            _count(len(self.stale), "explanation", "no longer holds", "no longer hold"),
            _count(len(self.gone), "known divergence", f"{old} is {gone}", f"{old} are {gone}"),
        ]
        answer = f"New{since}: {'; '.join(filter(None, parts))}" if any(parts) else f"Nothing new{since}"
        answer += f"; {self.known_before}" if self.known_before else ""
        if self.identity and not self.baseline:
            answer += "; no explanation was expected to hold: the candidate is older than every known release"
        strict = self.strict and any(case.status is Status.KNOWN for case in self.judged)
        return answer + (", but --strict lets no known divergence pass." if strict else ".")

    def line(self) -> str:
        """The verdict, the cases by outcome, what is new, and how much was compared."""
        cases = ", ".join(f"{count} {name}" for name, count in self.tally().items() if count) or "no case"
        for part in self.sections.values():
            left = f"{_many(len(part.left_out), part.noun)} not asked" if part.left_out else ""
            cases += "".join(f"; {text}" for text in ("" if self.cases else part.agree, left) if text)
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
