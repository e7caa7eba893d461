"""Two candidates compared with each other and both with the truth: what moved, which way, and whether it is worse.

Worse is always said by the gate. Numbers that moved by no more than rounding can explain are counted, no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from candle_mi_parity.compare.align import ENDLESS, Distance, figure_distance, tensor_distance
from candle_mi_parity.compare.gate import POSITION_GATE
from candle_mi_parity.compare.run_result import Verdict, now
from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status, TensorResult
from candle_mi_parity.files.escape import number
from candle_mi_parity.trace.trace import Emitted, Run
from candle_mi_parity.trace.truth import Truth

LEAK_CHANGE = 1e-3
"""Part of what forbidden entries hold that may change without being worse or better."""


class Kind(StrEnum):
    """What became of one tensor. APART: nothing to compare, as where each side kept another part of it."""

    IDENTICAL = "identical"
    ROUNDING = "rounding"
    MOVED = "moved"
    APPEARED = "appeared"
    VANISHED = "vanished"
    APART = "apart"


class Direction(StrEnum):
    """Of a tensor that moved, with respect to PyTorch; SIDEWAYS: as far from it as before."""

    TOWARDS = "towards"
    AWAY = "away"
    SIDEWAYS = "sideways"


@dataclass(frozen=True)
class Side:
    """One candidate's part of a case.

    :ivar trace: None where there is none, which the result explains.
    :ivar run: how the emission went; None where it was not recorded.
    """

    result: CaseResult
    trace: Emitted | None
    run: Run | None = None

    @property
    def outcome(self) -> Outcome:
        return self.result.outcome


@dataclass(frozen=True)
class Row:
    """One tensor, scalar or set of decisions on both sides; a side's result is None where it has none.

    :ivar worse: why it is worse; empty when it is not. ``better`` likewise.
    """

    name: str
    kind: Kind
    a: TensorResult | None
    b: TensorResult | None
    distance: Distance | None = None
    direction: Direction | None = None
    worse: str = ""
    better: str = ""


@dataclass
class CaseDiff:
    """One case.

    :ivar rows: in execution order.
    :ivar worse: every reason, the verdict's first.
    :ivar cut: one side kept the case in part, and the other was cut to that.
    :ivar note: what each side computes instead, where they differ in that.
    """

    a: Side
    b: Side
    rows: list[Row] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    cut: bool = False
    note: str = ""

    @property
    def id(self) -> str:
        return self.a.result.id

    @property
    def judged(self) -> bool:
        return self.a.outcome.judged and self.b.outcome.judged

    @property
    def compared(self) -> int:
        return sum(1 for row in self.rows if row.distance is not None)

    def moved(self) -> list[Row]:
        return [row for row in self.rows if row.kind in (Kind.MOVED, Kind.APPEARED, Kind.VANISHED)]

    def count(self, kind: Kind) -> int:
        return sum(1 for row in self.rows if row.kind is kind)


@dataclass
class Diff:
    """All cases of two candidates.

    :ivar a: as the user spelt it; ``identity_a`` what its traces say, empty when they say nothing.
    :ivar started: when it began, ISO 8601; ``seconds`` is how long it took.
    """

    a: str
    b: str
    identity_a: dict[str, str]
    identity_b: dict[str, str]
    versions: dict[str, str]
    cases: list[CaseDiff]
    started: str = field(default_factory=now)
    seconds: float = 0.0

    @property
    def worse(self) -> list[CaseDiff]:
        return [case for case in self.cases if case.worse]

    @property
    def better(self) -> list[CaseDiff]:
        return [case for case in self.cases if case.better and not case.worse]

    @property
    def verdict(self) -> Verdict:
        """FAIL: something got worse. Then ERROR, INCONCLUSIVE (nothing compared), PASS."""
        if self.worse:
            return Verdict.FAIL
        if any(Outcome.ERROR in (case.a.outcome, case.b.outcome) for case in self.cases):
            return Verdict.ERROR
        changed = any(case.judged and case.a.outcome is not case.b.outcome for case in self.cases)
        if not changed and not any(case.compared for case in self.cases):
            return Verdict.INCONCLUSIVE
        return Verdict.PASS

    def line(self) -> str:
        said = {
            Verdict.FAIL: f"WORSE: {len(self.worse)} of {len(self.cases)} cases",
            Verdict.ERROR: "ERROR: nothing worse, but not every case could be compared",
            Verdict.INCONCLUSIVE: "INCONCLUSIVE: nothing was compared",
            Verdict.PASS: "NOTHING WORSE",
        }[self.verdict]
        return f"{said}; {len(self.better)} better, {sum(case.compared for case in self.cases)} tensors compared"


def diff_case(a: Side, b: Side, truth: Truth | None, cut: bool = False) -> CaseDiff:
    """Compare two judged sides of a case.

    :param truth: None where it could not be had, and then neither side has a trace.
    :raises TraceError: bytes that are not what a trace declares.
    """
    case = CaseDiff(a, b, cut=cut)
    if truth is not None and a.trace is not None and b.trace is not None:
        case.rows = _rows(truth, a, b)
    return _concluded(case)


def diff_call(a: CaseResult, b: CaseResult, distances: dict[str, Distance]) -> CaseDiff:
    """Compare two judged answers of a direct call.

    :param distances: between the two, of each result that both have.
    """
    ours, theirs = ({result.name: result for result in side.tensors} for side in (a, b))
    names = [name for name in ours if name in theirs]
    return _concluded(
        CaseDiff(
            Side(a, None),
            Side(b, None),
            [_moved(name, ours[name], theirs[name], distances.get(name)) for name in names],
        )
    )


def _concluded(case: CaseDiff) -> CaseDiff:
    """With what got worse, what got better, and what is computed instead."""
    if case.judged:
        _verdict_change(case)
        if not _same_explanation(case.a, case.b):  # both are equal to one truth, and differ by rounding
            _tensor_changes(case)
        _explanation_change(case)
    return case


def _rows(truth: Truth, a: Side, b: Side) -> list[Row]:
    assert a.trace is not None and b.trace is not None
    ours = {result.name: result for result in a.result.tensors}
    theirs = {result.name: result for result in b.result.tensors}
    found = [
        _row(name, truth, a.trace, b.trace, ours.get(name), theirs.get(name))
        for name in dict.fromkeys([*ours, *theirs])
    ]
    return [row for row in found if row is not None]


def _row(
    name: str, truth: Truth, a: Emitted, b: Emitted, one: TensorResult | None, other: TensorResult | None
) -> Row | None:
    """None for what both sides lack."""
    here, there = _there(one), _there(other)
    if here and there:
        assert one is not None and other is not None
        return _both_there(name, truth, a, b, one, other)
    if not here and not there:
        return None
    given = one if here else other
    unasked = given is not None and given.reason == "unexpected"
    kind = Kind.VANISHED if here else Kind.APPEARED
    bad = unasked != here  # a hook that is wanted vanished, or one that nobody knows appeared
    said = f"{name} {kind.value}" + (", which the truth does not have" if unasked else "")
    return Row(name, kind, one, other, worse=said if bad else "", better="" if bad else said)


def _there(result: TensorResult | None) -> bool:
    return result is not None and result.reason != "missing"


def _both_there(name: str, truth: Truth, a: Emitted, b: Emitted, one: TensorResult, other: TensorResult) -> Row:
    broken = {one.reason, other.reason} & {"shape", "dtype", "unexpected"}
    distance: Distance | None
    if broken:
        distance = ENDLESS if one != other else None
    elif name in a.entries and name in b.entries:
        distance = tensor_distance(name, truth, a, b)
    else:
        distance = figure_distance(name, a, b, one, other)
    return _moved(name, one, other, distance)


def _moved(name: str, one: TensorResult, other: TensorResult, distance: Distance | None) -> Row:
    """What became of a tensor that both sides have."""
    worse, better = _by_the_gate(one, other)
    # Where both go wrong, another decision is a movement too; where both are right it is a tie.
    decided = distance is not None and distance.decisions > 0 and _fails(one) and _fails(other)
    if worse or better or decided or (distance is not None and not distance.inside):
        return Row(name, Kind.MOVED, one, other, distance, _direction(one, other), worse, better)
    kind = Kind.APART if distance is None else Kind.IDENTICAL if distance.same else Kind.ROUNDING
    return Row(name, kind, one, other, distance)


def _fails(result: TensorResult) -> bool:
    return result.status is Status.FAIL


def size(result: TensorResult) -> float:
    """How far a result is from the truth: its ratio, gate 8; endless where there is no number to compare."""
    if result.reason in ("shape", "dtype", "missing", "unexpected"):
        return math.inf
    return result.ratio


def shown(result: TensorResult) -> str:
    """The size for a reader; of decisions, which have none, how many differ from the truth's."""
    if result.reason == "masked":
        return f"{result.past} forbidden entries that hold {number(result.leaked)}"
    return number(size(result)) if result.worst or not result.detail else result.detail


def _by_the_gate(one: TensorResult, other: TensorResult) -> tuple[str, str]:
    """Why B is worse than A at a tensor, and why it is better; both empty when it is neither."""
    name = one.name
    if _fails(one) != _fails(other):
        said = f"{name} {'now diverges' if _fails(other) else 'agrees now'} ({shown(one)} → {shown(other)})"
        return (said, "") if _fails(other) else ("", said)
    if not _fails(one) or (change := _further(one, other)) == 0:
        return "", ""
    said = f"{name} diverges by {shown(other)}, before by {shown(one)}"
    return (said, "") if change > 0 else ("", said)


def _further(one: TensorResult, other: TensorResult) -> float:
    """By how much the second of two diverging results is further from the truth; 0 where rounding could make it."""
    if one.reason == other.reason == "masked":
        # What a mask forbids has no noise: entries are counted, then what they hold is compared.
        mass = other.leaked - one.leaked
        return other.past - one.past or (mass if abs(mass) > LEAK_CHANGE * one.leaked else 0)
    change = size(other) - size(one)
    return change if abs(change) >= POSITION_GATE else 0  # NaN where both are endless


def _direction(one: TensorResult, other: TensorResult) -> Direction:
    if _fails(one) != _fails(other):
        return Direction.AWAY if _fails(other) else Direction.TOWARDS
    change = _further(one, other) if _fails(one) else 0
    return Direction.AWAY if change > 0 else Direction.TOWARDS if change < 0 else Direction.SIDEWAYS


def _verdict_change(case: CaseDiff) -> None:
    before, after = case.a.outcome, case.b.outcome
    if before is after:
        return
    first = case.b.result.first_divergence or case.a.result.first_divergence
    where = f" at {first.name} ({shown(first)})" if first and Outcome.DIVERGES in (before, after) else ""
    why = f": {case.b.result.error}" if after in (Outcome.REFUSED, Outcome.CRASHED) else ""
    said = f"{before.value} → {after.value}{where}{why}"
    (case.worse if after.rank > before.rank else case.better).append(said)


def _tensor_changes(case: CaseDiff) -> None:
    """The first of each kind stands for the rest: what follows it is inherited until shown otherwise."""
    for rows, into in (
        ([row.worse for row in case.rows if row.worse], case.worse),
        ([row.better for row in case.rows if row.better], case.better),
    ):
        if rows and into:  # the verdict's line has named the first
            into.append(f"in {len(rows)} tensors")
        elif rows:
            into.append(rows[0] + (f", and {len(rows) - 1} more" if len(rows) > 1 else ""))


def _explanation_change(case: CaseDiff) -> None:
    """What each side computes instead, where both diverge: what is no longer explained is worse."""
    if not (case.a.outcome is case.b.outcome is Outcome.DIVERGES):
        return
    one, other = case.a.result.explained, case.b.result.explained
    if one and not other:
        case.worse.append(f"before: {one.line()}; now it is not explained: {case.b.result.unexplained}")
    elif other and not one:
        case.better.append(f"now explained: {other.line()}")
    elif one and other and one.change != other.change:
        case.note = f"A: {one.change}; B: {other.change}"


def _same_explanation(a: Side, b: Side) -> bool:
    """Whether both sides are equal to PyTorch under one and the same counterfactual."""
    one, other = a.result.explained, b.result.explained
    return bool(one and other and one.change and one.change == other.change)
