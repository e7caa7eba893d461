"""A diff of two candidates: judge both on each case as a run does, then compare their traces."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from candle_mi_parity.candidate import cuda
from candle_mi_parity.candidate.build import changed_since
from candle_mi_parity.candidate.sources import Source, StatelessSource, open_source, refuse_device
from candle_mi_parity.candidate.spelling import Candidate, CandidateError, parse_candidate
from candle_mi_parity.candidate.store import stored_selection
from candle_mi_parity.candidate.tokens import TextIds
from candle_mi_parity.compare.align import align_traces
from candle_mi_parity.compare.diff import CaseDiff, Diff, Side, diff_case, diff_outcome
from candle_mi_parity.compare.run_result import now
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.coverage.calls_judge import diff_calls, expectations, judge_source
from candle_mi_parity.coverage.forwards import judge_forwards
from candle_mi_parity.errors import ParityError
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.judge.explain import explain_new
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.run.options import SEARCH_SECONDS
from candle_mi_parity.run.run import library_versions
from candle_mi_parity.run.sections import judge_classes, judge_tokenizers
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.explanations import Explanations
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import CandleMi, Emitted, Run, Trace
from candle_mi_parity.trace.truth import Truth

SIDES = 2


@dataclass(frozen=True)
class _Emission:
    """One candidate's trace of a case, or the error."""

    trace: Emitted | None = None
    error: ParityError | None = None
    run: Run | None = None


def _emit(source: Source, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> _Emission:
    try:
        trace = source.trace(subject, mode, truth, inputs)
    except ParityError as error:
        return _Emission(error=error)
    return _Emission(trace, run=trace.document.run if isinstance(trace, Trace) else None)


class Pair:
    """Two sources that are asked together; a whole trace is restricted to the part that the other holds.

    :ivar truth: of the current case; None before its first trace.
    :ivar partial: whether one of its traces was restricted.
    """

    def __init__(self, a: Source, b: Source) -> None:
        self.sources = a, b
        self.emissions: list[_Emission] = []
        self.truth: Truth | None = None
        self.partial = False

    def forget(self) -> None:
        """Reset before the next case."""
        self.emissions, self.truth, self.partial = [], None, False

    def emission(self, side: int, subject: PreparedCase, truth: Truth, inputs: Path) -> _Emission:
        if not self.emissions:
            self.emissions = [_emit(source, subject, "free", truth, inputs) for source in self.sources]
            self.truth = truth
            self._align(truth)
        elif self.sources[side].device != "cpu":
            # Distances are measured in the larger noise, that of the GPU.
            self.truth = truth
        return self.emissions[side]

    def _align(self, truth: Truth) -> None:
        one, other = (emission.trace for emission in self.emissions)
        if one is None or other is None:
            return
        names = list(truth.tensors)
        aligned = align_traces(one, other, set(stored_selection(names)), set(names))
        self.partial = aligned[0] is not one or aligned[1] is not other
        self.emissions = [
            _Emission(trace, run=emission.run) for trace, emission in zip(aligned, self.emissions, strict=True)
        ]


class PairedSource(StatelessSource):
    """One side of a pair as a source."""

    def __init__(self, pair: Pair, side: int) -> None:
        self._pair, self._side = pair, side
        self.device = pair.sources[side].device

    @property
    def identity(self) -> CandleMi | None:
        return self._pair.sources[self._side].identity

    def text_ids(self, subject: PreparedCase) -> TextIds:
        return self._pair.sources[self._side].text_ids(subject)

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Emitted:
        """:raises ParityError: the side's error."""
        if mode != "free":
            return self._pair.sources[self._side].trace(subject, mode, truth, inputs)
        found = self._pair.emission(self._side, subject, truth, inputs)
        if found.error is not None:
            raise found.error
        assert found.trace is not None
        return found.trace


def diff(
    specs: tuple[str, str],
    cases: list[Case],
    cache: Path,
    out: Path,
    table: Explanations,
    progress: Progress,
    devices: tuple[str, str] = ("cpu", "cpu"),
    parts: tuple[str, ...] = ("traces",),
) -> Diff:
    """Build or read both candidates and compare them.

    :param out: directory of the traces.
    :param parts: what is asked of both, of :data:`candle_mi_parity.run.options.PARTS`.
    :raises ParityError: a candidate cannot be built or found; a fault of one case is that case's ERROR.
    """
    started, tick = now(), time.monotonic()
    a, b = (_comparable(spec) for spec in specs)
    for candidate, device in zip((a, b), devices, strict=True):
        refuse_device(candidate, device)
    with (
        open_source(a, cache, out / "a", progress.note, devices[0]) as source_a,
        open_source(b, cache, out / "b", progress.note, devices[1]) as source_b,
    ):
        pair = Pair(source_a, source_b)
        end = time.monotonic() + SEARCH_SECONDS
        done = [
            diff_one(case, pair, specs, cache, table, progress, max(0.0, end - time.monotonic())) for case in cases
        ]
        done += _beside(pair, specs, cases, parts, cache, out, table, progress)
        one, other = (
            source.identity.model_dump(exclude_none=True) if source.identity else {} for source in pair.sources
        )
        for candidate, source in zip((a, b), pair.sources, strict=True):
            if reason := changed_since(candidate, source.identity, cache):
                raise CandidateError(f"{reason}; run again")
    return Diff(specs[0], specs[1], one, other, _versions(devices), done, started, time.monotonic() - tick)


def _beside(
    pair: Pair,
    specs: tuple[str, str],
    cases: list[Case],
    parts: tuple[str, ...],
    cache: Path,
    out: Path,
    table: Explanations,
    progress: Progress,
) -> list[CaseDiff]:
    """What both sides were asked beside the cases; what one side was not asked is left out."""
    sides = list(zip(pair.sources, specs, (out / "a", out / "b"), strict=True))
    done: list[CaseDiff] = []
    if "calls" in parts:
        progress.note("direct calls")
        held_to = expectations(cache, note=progress.note)
        judged = [judge_source(source, spec, held_to, cache, at / "calls.json") for source, spec, at in sides]
        done += diff_calls(judged[0], judged[1], held_to)
    found: list[dict[str, CaseResult]] = []
    for source, spec, at in sides:
        progress.note(f"{spec}: other forwards, tokenizers and generic configs")
        release = table.baseline(source.identity.version) if source.identity else ""
        results: list[CaseResult] = []
        if "traces" in parts:
            results += judge_forwards(source, cases, spec, at / "forwards", whole=False).results
        if "tokens" in parts:
            results += judge_tokenizers(source, release, spec, cache, at / "tokens").results
        if "auto-config" in parts:
            results += judge_classes(source, release, spec, cache, at / "auto-config").results
        found.append({result.id: result for result in results})
    return done + [diff_outcome(one, found[1][name]) for name, one in found[0].items() if name in found[1]]


def _versions(devices: tuple[str, str]) -> dict[str, str]:
    a, b = (cuda.versions(device) for device in devices)
    device = a["device"] if a == b else f"{a['device']} against {b['device']}"
    return library_versions() | a | b | {"device": device}


def _comparable(spec: str) -> Candidate:
    candidate = parse_candidate(spec)
    if candidate.kind == "stored" and Path(candidate.target).expanduser().is_file():
        raise CandidateError(f"{spec} is a flat JSON, which holds no trace; `run` judges it")
    return candidate


def diff_one(
    case: Case,
    pair: Pair,
    specs: tuple[str, str],
    cache: Path,
    table: Explanations,
    progress: Progress,
    search: float = SEARCH_SECONDS,
) -> CaseDiff:
    """One case on both sides.

    :param search: seconds for explaining a new divergence of either candidate.
    """
    pair.forget()
    results: list[CaseResult] = []
    for side, spec in enumerate(specs):
        judged = judge_case(case, PairedSource(pair, side), spec, cache, table, progress)
        explain_new([judged], table, cache, search, progress)
        results.append(judged.result)
    sides = [
        Side(result, emission.trace, emission.run)
        for result, emission in zip(results, pair.emissions or [_Emission()] * SIDES, strict=True)
    ]
    try:
        found = diff_case(sides[0], sides[1], pair.truth, pair.partial)
    except Exception as error:  # a bug in the suite fails this case only
        message = str(error) if isinstance(error, ParityError) else f"internal: {type(error).__name__}: {error}"
        for result in results:
            result.status, result.error = Status.ERROR, message
        found = CaseDiff(sides[0], sides[1])
    progress.case_ends(results[-1])
    # The tensors of a large model are not kept for the report.
    return replace(found, a=replace(found.a, trace=None), b=replace(found.b, trace=None))
