"""One rule on all dumps: what it kills at its default tolerance, and at the one that honest runs need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from proof.rules import Rule
from tests.support.planting import Arrays, Real

ROOM = 1.5
"""How much more than the honest dumps need a tolerance is given."""
LOWEST, HIGHEST = 2.0**-30, 2.0**50
"""Factors on a default tolerance between which a need is sought."""


@dataclass(frozen=True)
class Faulty:
    """A dump with one mistake in it, and the tensor at which it must first show."""

    id: str
    first: str
    got: Arrays


@dataclass
class Dumps:
    """The dumps of one case.

    :ivar there: the case, its truth, and torch's float32 run, which rules take as the reference.
    """

    there: Real
    honest: dict[str, Arrays]
    faulty: list[Faulty]

    @property
    def case(self) -> str:
        return self.there.subject.case.id


@dataclass(frozen=True)
class Asked:
    """What a rule made of one faulty dump: the tensor that it named first, or None where the fault survived.

    :ivar default: at the rule's default.
    :ivar own: at 1.5 × the need of the dump's own case.
    :ivar joint: at 1.5 × the largest need of all cases.
    """

    fault: str
    case: str
    first: str
    default: str | None
    own: str | None
    joint: str | None


@dataclass
class Score:
    """One rule on all dumps.

    :ivar honest: case → setting → the tensor that it complains of at its default, None where the dump passes.
    :ivar needs: case → factor on its default tolerance with which all honest dumps pass; infinite where none does.
    """

    rule: Rule
    honest: dict[str, dict[str, str | None]] = field(default_factory=dict)
    needs: dict[str, float] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)


def need(rule: Rule, there: Real, honest: Sequence[Arrays]) -> float:
    """The least factor on the rule's tolerance with which all honest dumps pass, to 2 %; infinite where none does."""
    scale = LOWEST
    for got in honest:
        if rule.check(there, got, scale) is None:
            continue
        if rule.check(there, got, HIGHEST) is not None:
            return math.inf
        low, high = math.log2(scale), math.log2(HIGHEST)
        while high - low > 0.02:
            middle = (low + high) / 2
            low, high = (low, middle) if rule.check(there, got, 2**middle) is None else (middle, high)
        scale = 2**high
    return scale


def score(rule: Rule, all_dumps: Sequence[Dumps]) -> Score:
    """Ask one rule about every dump.

    :raises ValueError: no honest or no faulty dump of a case; nothing would be compared.
    """
    found = Score(rule)
    for dumps in all_dumps:
        if not dumps.honest or not dumps.faulty:
            raise ValueError(f"{dumps.case}: no honest or no faulty dump: nothing to compare rules on")
        found.honest[dumps.case] = {name: rule.check(dumps.there, got, 1.0) for name, got in dumps.honest.items()}
        found.needs[dumps.case] = need(rule, dumps.there, list(dumps.honest.values()))
    largest = max(found.needs.values())
    for dumps in all_dumps:
        scales = [1.0, ROOM * found.needs[dumps.case], ROOM * largest]
        for fault in dumps.faulty:
            named = [rule.check(dumps.there, fault.got, scale) if math.isfinite(scale) else None for scale in scales]
            found.asked.append(Asked(fault.id, dumps.case, fault.first, *named))
    return found
