"""What a candidate made of a case, in one word, ordered from best to worst; verdicts of two candidates compare by it.

The ledger does not enter: a known divergence is a divergence here.
"""

from __future__ import annotations

from enum import StrEnum

from candle_mi_parity.compare.ledger import is_refusal
from candle_mi_parity.compare.verdict import CaseResult, Status


class Outcome(StrEnum):
    """A refusal stands before a wrong number, which nobody notices.

    ABSENT and ERROR say nothing of the candidate: nothing is stored, or the suite could not do its part.
    """

    AGREES = "agrees"
    UNMEASURED = "unmeasured"
    REFUSED = "refused"
    DIVERGES = "diverges"
    CRASHED = "crashed"
    ABSENT = "absent"
    ERROR = "error"

    @property
    def judged(self) -> bool:
        return self not in (Outcome.ABSENT, Outcome.ERROR)

    @property
    def colour(self) -> str:
        """The class of its cell on a page."""
        return {Outcome.AGREES: "good", Outcome.DIVERGES: "bad", Outcome.CRASHED: "bad"}.get(self, "warn")

    @property
    def rank(self) -> int:
        """0 is best; only of what was judged."""
        return list(Outcome).index(self)


# How an emitter's failure that is no refusal begins, see candidate.EmitterError.
_CRASHES = ("panic:", "crash:", "timeout:", "protocol:", "io:", "request:")
_ABSENT = "nothing is stored for"


def outcome(case: CaseResult) -> Outcome:
    if case.status is Status.PASS:
        return Outcome.AGREES
    if case.status is Status.UNMEASURED:
        # Without a tensor it is a model that the hub did not give.
        return Outcome.UNMEASURED if case.tensors else Outcome.ERROR
    if case.status is Status.FAIL or not case.error:
        return Outcome.DIVERGES
    if is_refusal(case):
        return Outcome.REFUSED
    if case.error.startswith(_CRASHES):
        return Outcome.CRASHED
    return Outcome.ABSENT if case.error.startswith(_ABSENT) else Outcome.ERROR
