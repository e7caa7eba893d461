"""From a fault to its outcome, judged by the very function that judges a case in a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from candle_mi_parity.candidate.sources import NothingOpen, Source, same_candidate
from candle_mi_parity.compare.compare import check_header
from candle_mi_parity.compare.ledger import Ledger
from candle_mi_parity.compare.verdict import CaseResult
from candle_mi_parity.compare.verdict import Status as CaseStatus
from candle_mi_parity.errors import OracleError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.models.prepared_case import Subject
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import Trace
from candle_mi_parity.trace.truth import Truth
from proof.catalogue import Fault
from proof.io_faults import IO
from proof.plant import EQUAL, difference64, emitted
from tests.support.planting import CASES, RELEASE, real, write

NOTHING_KNOWN = Ledger(format=1, known=[], refused=[])


class Status(StrEnum):
    """Of a fault. A crash or a time-out is no kill: ERROR."""

    KILLED = "KILLED"
    SURVIVED = "SURVIVED"
    EQUIVALENT = "EQUIVALENT"
    ERROR = "ERROR"


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    :ivar found: the first tensor that failed, or the error that refused the trace.
    :ivar right: whether ``found`` is what the row expects.
    :ivar foretold: whether it is what was written down before the first run.
    :ivar ratio: at ``found``, in units in which the gate is 8; 0 without one.
    :ivar forced: the tensors that diverge when every half-layer starts from the truth.
    :ivar detail: of ERROR the reason; of EQUIVALENT the measurement.
    """

    id: str
    kind: str
    case: str
    says: str
    status: Status
    expected: str
    found: str = ""
    right: bool = False
    foretold: bool = False
    ratio: float = 0.0
    reason: str = ""
    forced: list[str] = field(default_factory=list)
    seconds: float = 0.0
    detail: str = ""
    scored: bool = True
    fast: bool = False
    written_before_run: bool = False


class PlantedSource(NothingOpen):
    """A candidate whose every trace has a fault planted in it; None plants nothing: the clean twin."""

    identity = RELEASE

    def __init__(self, fault: Fault | None, directory: Path) -> None:
        self._fault, self._directory = fault, directory

    def trace(self, subject: Subject, mode: Mode, truth: Truth, inputs: Path) -> Trace:
        there = real(subject.case.id, mode)
        dump = there.emitted if self._fault is None else emitted(self._fault, there)
        path = write(self._directory / mode, replace(there, emitted=dump))
        if self._fault is not None and self._fault.io is not None:
            IO[self._fault.io](path)
        trace = same_candidate(Trace(path), self.identity)
        check_header(truth, trace, file_digest(inputs))
        return trace


def judge_with(source: Source, case_id: str) -> CaseResult:
    """A case against a source, as ``run`` judges it; no divergence is known."""
    return judge_case(CASES[case_id], source, "planted", cache_root(), NOTHING_KNOWN, Progress())


def twin_problem(source: Source, case_id: str) -> str:
    """What is wrong with the clean twin of a case; "" when it passes."""
    result = judge_with(source, case_id)
    if result.status is CaseStatus.PASS and not result.forced:
        return ""
    first = result.first_divergence
    return f"the clean twin is {result.status}: {result.error or (first.name if first else '')}"


def outcome(fault: Fault, source: Source, twin: Callable[[str], str], equivalent: bool = True) -> Outcome:
    """Judge a fault.

    :param twin: what is wrong with a case's clean twin, "" for nothing.
    :param equivalent: whether a survivor can be measured in float64.
    """
    started = time.monotonic()
    blank = Outcome(
        fault.id, fault.kind, fault.case, fault.says, Status.ERROR, fault.first,
        scored=fault.scored, fast=fault.fast, written_before_run=fault.written_before_run,
    )  # fmt: skip
    if problem := twin(fault.case):
        return replace(blank, detail=problem, seconds=time.monotonic() - started)
    judged = _of_result(fault, blank, judge_with(source, fault.case))
    if judged.status is Status.SURVIVED and equivalent:
        judged = _measured(fault, judged)
    return replace(judged, seconds=time.monotonic() - started)


def _of_result(fault: Fault, blank: Outcome, result: CaseResult) -> Outcome:
    if result.status is CaseStatus.ERROR:
        if fault.refused and fault.first in result.error:
            told = fault.foretold in result.error
            return replace(
                blank, status=Status.KILLED, found=fault.first, right=True, foretold=told, reason="refused"
            )
        return replace(blank, detail=result.error)
    first = result.first_divergence
    if result.status is not CaseStatus.FAIL or first is None:
        return replace(blank, status=Status.SURVIVED, detail=result.error)
    right = first.name == fault.first and fault.reason in ("", first.reason) and not fault.refused
    return replace(
        blank, status=Status.KILLED, found=first.name, right=right, foretold=first.name == fault.foretold,
        ratio=first.ratio, reason=first.reason, forced=result.forced_divergences,
    )  # fmt: skip


def _measured(fault: Fault, survivor: Outcome) -> Outcome:
    """A survivor is EQUIVALENT where its float64 truth equals the honest one to rounding."""
    if fault.tensor or fault.io or fault.source:
        return survivor
    try:
        moved = difference64(fault, real(fault.case))
    except OracleError as error:  # a narrow format is a difference that float64 cannot show
        return replace(survivor, detail=f"not measured in float64: {error}")
    said = f"in float64 no tensor moves by more than {moved:.1e} of its rms"
    same = moved < EQUAL
    return replace(
        survivor, status=Status.EQUIVALENT if same else Status.SURVIVED, found="nowhere" if same else "",
        right=same and not fault.scored, foretold=same and fault.foretold == "nowhere", detail=said,
    )  # fmt: skip
