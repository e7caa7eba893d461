"""Two candidates compared with each other and with the truth: which tensors moved, and whether they became worse.

A tensor is worse only by the gate. Changes that rounding can explain are counted and not reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from candle_mi_parity.compare.align import INFINITE, Distance, figure_distance, tensor_distance
from candle_mi_parity.compare.gate import POSITION_GATE
from candle_mi_parity.compare.run_result import Verdict, now
from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status, TensorResult
from candle_mi_parity.files.escape import number
from candle_mi_parity.trace.trace import Emitted, Run
from candle_mi_parity.trace.truth import Truth

LEAK_CHANGE = 1e-3
"""Relative change of the sum of masked entries that counts as neither worse nor better."""


class Kind(StrEnum):
    """What happened to a tensor. APART: not comparable, for example because each side kept another part of it."""

    IDENTICAL = "identical"
    ROUNDING = "rounding"
    MOVED = "moved"
    APPEARED = "appeared"
    VANISHED = "vanished"
    APART = "apart"


class Direction(StrEnum):
    """Where a tensor moved with respect to PyTorch; SIDEWAYS: it is as far from it as before."""

    TOWARDS = "towards"
    AWAY = "away"
    SIDEWAYS = "sideways"


@dataclass(frozen=True)
class Side:
    """A case of one candidate.

    :ivar trace: None if there is none; the result says why.
    :ivar run: how the emission went; None if it was not recorded.
    """

    result: CaseResult
    trace: Emitted | None
    run: Run | None = None

    @property
    def outcome(self) -> Outcome:
        return self.result.outcome


@dataclass(frozen=True)
class TensorDiff:
    """One tensor, scalar or set of decisions on both sides; the result of a side without it is None.

    :ivar worse: why it is worse; empty if it is not. ``better`` likewise.
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
    :ivar worse: every reason; the change of outcome comes first.
    :ivar partial: one side is stored in part, and the other was restricted to that part.
    :ivar note: what each side computes instead of the truth, if that differs.
    :ivar outcomes: only the two outcomes are compared, because the sides have no tensors in common.
    """

    a: Side
    b: Side
    rows: list[TensorDiff] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    partial: bool = False
    note: str = ""
    outcomes: bool = False

    @property
    def id(self) -> str:
        return self.a.result.id

    @property
    def judged(self) -> bool:
        return self.a.outcome.judged and self.b.outcome.judged

    @property
    def compared(self) -> int:
        return sum(1 for row in self.rows if row.distance is not None)

    def moved(self) -> list[TensorDiff]:
        return [row for row in self.rows if row.kind in (Kind.MOVED, Kind.APPEARED, Kind.VANISHED)]

    def count(self, kind: Kind) -> int:
        return sum(1 for row in self.rows if row.kind is kind)


@dataclass
class Diff:
    """All cases of two candidates.

    :ivar a: as the user spelt it; ``identity_a`` as its traces say, empty if they do not.
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
        if not changed and not any(case.compared or case.outcomes for case in self.cases):
            return Verdict.INCONCLUSIVE
        return Verdict.PASS

    def line(self) -> str:
        word = {
            Verdict.FAIL: f"WORSE: {len(self.worse)} of {len(self.cases)} cases",
            Verdict.ERROR: "ERROR: nothing worse, but not every case could be compared",
            Verdict.INCONCLUSIVE: "INCONCLUSIVE: nothing was compared",
            Verdict.PASS: "NOTHING WORSE",
        }[self.verdict]
        return f"{word}; {len(self.better)} better, {sum(case.compared for case in self.cases)} tensors compared"


def diff_case(a: Side, b: Side, truth: Truth | None, partial: bool = False) -> CaseDiff:
    """Compare two judged sides of a case.

    :param truth: None if it could not be computed; then neither side has a trace.
    :raises TraceError: the bytes are not those that the trace declares.
    """
    case = CaseDiff(a, b, partial=partial)
    if truth is not None and a.trace is not None and b.trace is not None:
        results, others = ({result.name: result for result in side.result.tensors} for side in (a, b))
        for name in dict.fromkeys([*results, *others]):
            row = _tensor_diff(name, truth, a.trace, b.trace, results.get(name), others.get(name))
            case.rows += [row] if row else []
    return _concluded(case)


def diff_call(a: CaseResult, b: CaseResult, distances: dict[str, Distance]) -> CaseDiff:
    """Compare two judged answers of a direct call.

    :param distances: between the two, of each result that both have.
    """
    results, others = ({result.name: result for result in side.tensors} for side in (a, b))
    rows = [
        _moved(name, result, others[name], distances.get(name)) for name, result in results.items() if name in others
    ]
    return _concluded(CaseDiff(Side(a, None), Side(b, None), rows))


def diff_outcome(a: CaseResult, b: CaseResult) -> CaseDiff:
    """Compare what two candidates made of the same question, each judged by itself."""
    return _concluded(CaseDiff(Side(a, None), Side(b, None), outcomes=True))


def _concluded(case: CaseDiff) -> CaseDiff:
    """Fill in what became worse, what became better, and what is computed instead."""
    if case.judged:
        _verdict_change(case)
        if not _same_explanation(case.a, case.b):  # else both are equal to one truth, and differ by rounding
            _tensor_changes(case)
        _explanation_change(case)
    return case


def _tensor_diff(
    name: str, truth: Truth, a: Emitted, b: Emitted, one: TensorResult | None, other: TensorResult | None
) -> TensorDiff | None:
    """None if both sides lack the tensor."""
    in_a, in_b = _present(one), _present(other)
    if in_a and in_b:
        assert one is not None and other is not None
        return _moved(name, one, other, _distance(name, truth, a, b, one, other))
    if not in_a and not in_b:
        return None
    present = one if in_a else other
    unexpected = present is not None and present.reason == "unexpected"
    kind = Kind.VANISHED if in_a else Kind.APPEARED
    message = f"{name} {kind.value}" + (", which the truth does not have" if unexpected else "")
    if unexpected != in_a:  # an expected tensor vanished, or an unexpected one appeared
        return TensorDiff(name, kind, one, other, worse=message)
    return TensorDiff(name, kind, one, other, better=message)


def _present(result: TensorResult | None) -> bool:
    return result is not None and result.reason != "missing"


def _distance(
    name: str, truth: Truth, a: Emitted, b: Emitted, one: TensorResult, other: TensorResult
) -> Distance | None:
    if {one.reason, other.reason} & {"shape", "dtype", "unexpected"}:
        return INFINITE if one != other else None
    if name in a.entries and name in b.entries:
        return tensor_distance(name, truth, a, b)
    return figure_distance(one, other)


def _moved(name: str, one: TensorResult, other: TensorResult, distance: Distance | None) -> TensorDiff:
    """What happened to a tensor that both sides have."""
    change = _change(one, other)
    # Another decision is a movement if both sides are wrong; if both are right it is a tie.
    decided = distance is not None and distance.decisions > 0 and _fails(one) and _fails(other)
    if change or decided or (distance is not None and not distance.inside):
        direction = Direction.AWAY if change > 0 else Direction.TOWARDS if change < 0 else Direction.SIDEWAYS
        message = f"{name} diverges by {shown(other)}, before by {shown(one)}"
        if _fails(one) != _fails(other):
            message = f"{name} {'now diverges' if _fails(other) else 'agrees now'} ({shown(one)} → {shown(other)})"
        worse, better = message if change > 0 else "", message if change < 0 else ""
        return TensorDiff(name, Kind.MOVED, one, other, distance, direction, worse, better)
    kind = Kind.APART if distance is None else Kind.IDENTICAL if distance.same else Kind.ROUNDING
    return TensorDiff(name, kind, one, other, distance)


def _fails(result: TensorResult) -> bool:
    return result.status is Status.FAIL


def size(result: TensorResult) -> float:
    """Distance of a result from the truth: its ratio, gate 8; infinite if there is no number to compare."""
    if result.reason in ("shape", "dtype", "missing", "unexpected"):
        return math.inf
    return result.ratio


def shown(result: TensorResult) -> str:
    """The distance as text; of decisions, how many differ from the truth's."""
    if result.reason == "masked":
        return f"{result.past} forbidden entries that hold {number(result.leaked)}"
    return number(size(result)) if result.worst or not result.detail else result.detail


def _change(one: TensorResult, other: TensorResult) -> float:
    """How much further from the truth the second result is, as the gate sees it; 0 if rounding can explain it."""
    if _fails(one) != _fails(other):
        return math.inf if _fails(other) else -math.inf
    if not _fails(one):
        return 0.0
    if one.reason == other.reason == "masked":
        # Masked entries have no noise: their number is compared, then their sum.
        mass = other.leaked - one.leaked
        return other.past - one.past or (mass if abs(mass) > LEAK_CHANGE * one.leaked else 0.0)
    change = size(other) - size(one)
    return change if abs(change) >= POSITION_GATE else 0.0  # NaN if both are infinite


def _verdict_change(case: CaseDiff) -> None:
    before, after = case.a.outcome, case.b.outcome
    if before is after:
        return
    first = case.b.result.first_divergence or case.a.result.first_divergence
    where = f" at {first.name} ({shown(first)})" if first and Outcome.DIVERGES in (before, after) else ""
    why = f": {case.b.result.error}" if after in (Outcome.REFUSED, Outcome.CRASHED) else ""
    (case.worse if after.rank > before.rank else case.better).append(f"{before.value} → {after.value}{where}{why}")


def _tensor_changes(case: CaseDiff) -> None:
    """Report the first tensor only: those that follow may have inherited the change."""
    for messages, into in (
        ([row.worse for row in case.rows if row.worse], case.worse),
        ([row.better for row in case.rows if row.better], case.better),
    ):
        if messages and into:  # the change of outcome names the first tensor
            into.append(f"in {len(messages)} tensors")
        elif messages:
            into.append(messages[0] + (f", and {len(messages) - 1} more" if len(messages) > 1 else ""))


def _explanation_change(case: CaseDiff) -> None:
    """Compare what each side computes instead, if both diverge; a divergence without an explanation is worse."""
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
