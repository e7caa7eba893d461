"""A run: each case judged, new divergences explained, the table of explanations held to what was seen."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from candle_mi_parity import __version__
from candle_mi_parity.candidate import cuda
from candle_mi_parity.candidate.sources import Source, open_source, refuse_device
from candle_mi_parity.candidate.spelling import CandidateError, OutOfReachError, parse_candidate, stored_index
from candle_mi_parity.candidate.store import Storing, StoringSource
from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.verdict import CaseResult, Failure, Status
from candle_mi_parity.coverage.calls_judge import expectations, judge_source, report_outdated
from candle_mi_parity.coverage.flat_json import case_of, judge_reference, read_reference
from candle_mi_parity.errors import HubError, ParityError
from candle_mi_parity.judge.case import Judgement, Progress, judge_case, status_of
from candle_mi_parity.judge.explain import explain_new, hold_table
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.cases import WAITS, Case, load_cases, select
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.paths import OUTPUTS, cache_root, command

NOT_REACHED = "not reached: the run ended before it"
SEARCH_SECONDS = 30.0
"""What a run may spend on explaining its new divergences, all together."""


@dataclass(frozen=True)
class RunOptions:
    """What a run is asked.

    :ivar candidate: as the user spells it.
    :ivar cases: globs over case ids; none for the default lane.
    :ivar out: where traces and reports go.
    :ivar strict: whether known divergences fail too.
    :ivar keep: where what the candidate emits is stored.
    :ivar device: of the candidate; the truth is always the CPU's.
    :ivar search: seconds that explaining new divergences may take; 0 for no search.
    """

    candidate: str
    cases: tuple[str, ...] = ()
    out: Path = Path("build/parity")
    strict: bool = False
    keep: Storing | None = None
    device: str = "cpu"
    search: float = SEARCH_SECONDS
    cache: Path = field(default_factory=cache_root)


def run(options: RunOptions, progress: Callable[[int], Progress], result: RunResult | None = None) -> RunResult:
    """Select the cases and judge a candidate on them.

    :param progress: makes what tells of the work, given the number of cases.
    :param result: an empty one to fill as cases end, so that its owner has them when the run breaks off.
    :raises ParityError: the candidate cannot be built or found; a fault of one case is that case's ERROR. Where
        only network, GPU or nvcc is missing no case runs, each with that reason: INCONCLUSIVE.
    """
    table = load_cases()
    chosen = select(table, list(options.cases))
    again = ("run", "--candidate", options.candidate, "--cases")
    skipped = {
        case.id: f"{WAITS[case.lane]}; run it with {command(*again, case.id)}"
        for case in table
        if not options.cases and case not in chosen
    }
    return run_cases(options, chosen, skipped, progress(len(chosen)), result)


def run_cases(
    options: RunOptions,
    cases: list[Case],
    skipped: dict[str, str],
    progress: Progress,
    result: RunResult | None = None,
) -> RunResult:
    """:func:`run` of cases that were selected.

    :param skipped: cases that do not run, with reason and remedy; they are counted in the report.
    """
    result = result or blank(options)
    candidate = parse_candidate(options.candidate)
    if candidate.kind == "stored" and Path(candidate.target).expanduser().is_file():
        result.cases += run_reference(options, Path(candidate.target).expanduser(), progress).cases
        return result
    try:
        opening = open_source(candidate, options.cache, options.out / "traces", progress.note, options.device)
    except OutOfReachError as error:
        result.skipped = skipped | {case.id: str(error) for case in cases}
        return result
    result.skipped = skipped | {case.id: NOT_REACHED for case in cases}
    known = load_explanations()
    with opening as opened:
        source = StoringSource(opened, options.keep) if options.keep else opened
        if source.identity:
            result.identity = source.identity.model_dump(exclude_none=True)
            result.baseline = known.baseline(source.identity.version)
            result.known = {row.id: row for row in known.explanation}
        # torch's default dtype is the whole process's: beside a truth no float32 model may be loaded in it.
        count = 1 if candidate.kind == "torch" else 2

        def judge(case: Case) -> Judgement:
            return judge_case(case, source, options.candidate, options.cache, known, progress)

        with at_once(count, judge, cases) as futures:
            try:
                for future in futures:
                    judged = future.result()
                    _take(judged.result, result)
                    progress.case_ends(judged.result)
            finally:
                _settle(result, futures, skipped, cases)
        judgements = [future.result() for future in futures]
        explain_new(judgements, known, options.cache, options.search, progress)
        hold_table(judgements, known, source.identity, result, whole=not options.cases)
        if not options.cases:
            _judge_calls(opened, options, result, progress)
    return result


def _judge_calls(source: Source, options: RunOptions, result: RunResult, progress: Progress) -> None:
    """candle-mi's functions called one by one; where the candidate is stored, their answers are too."""
    progress.note("direct calls")
    held_to = expectations(options.cache)
    out = options.out / "traces" / "calls.json"
    judged = judge_source(source, options.candidate, held_to, options.cache, out)
    if options.keep and judged.lost is None:
        options.keep.whole_file("calls", out)
    result.calls = judged.direct
    result.known |= held_to.rows
    if judged.lost is None and source.identity is not None:
        report_outdated(judged, held_to, source.identity, result)


def _take(judged: CaseResult, result: RunResult) -> None:
    if all(judged is not taken for taken in result.cases):
        result.cases.append(judged)


def _settle(result: RunResult, futures: list[Future[Judgement]], skipped: dict[str, str], cases: list[Case]) -> None:
    """What is judged is in the result, and what is not was not reached, at whatever point the run broke off."""
    for future in futures:
        if future.done() and not future.cancelled():
            _take(future.result().result, result)
    reached = {case.id for case in result.cases}
    result.skipped = skipped | {case.id: NOT_REACHED for case in cases if case.id not in reached}


@contextmanager
def at_once(count: int, judge: Callable[[Case], Judgement], cases: list[Case]) -> Iterator[list[Future[Judgement]]]:
    """A future a case, in their order; with two at once, while one is compared the emitter works on the next.

    A run that breaks off does not wait for the cases at work: their emitter, which may hang, is closed after this.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield [pool.submit(judge, case) for case in cases]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def require_selection(options: RunOptions) -> None:
    """Refuse what names nothing, before an earlier report is removed.

    :raises ParityError: a glob that matches no case, or a candidate that is misspelt or not there.
    """
    select(load_cases(), list(options.cases))
    candidate = parse_candidate(options.candidate)
    refuse_device(candidate, options.device)
    if candidate.kind == "stored" and not Path(candidate.target).expanduser().is_file():
        stored_index(candidate, OUTPUTS)
    if candidate.kind == "path" and not (Path(candidate.target).expanduser() / "Cargo.toml").is_file():
        raise CandidateError(f"no Cargo.toml in {candidate.target}; path:DIR is a checkout of candle-mi")


def blank(options: RunOptions) -> RunResult:
    """The result of a run that has judged nothing yet."""
    versions = library_versions() | cuda.versions(options.device)
    return RunResult(options.candidate, {}, versions, [], {}, strict=options.strict)


def run_reference(options: RunOptions, path: Path, progress: Progress) -> RunResult:
    """Judge a flat reference JSON; without provenance even a perfect one is only UNMEASURED.

    :raises ParityError: the file is not such a JSON; what it is about that cannot be had is an ERROR.
    """
    started = time.monotonic()
    reference = read_reference(path)
    case = case_of(reference)
    result = CaseResult(case.id, case.family, "", Status.ERROR, command("run", "--candidate", options.candidate))
    try:
        progress.case_starts(case, "model")
        subject = prepare(case, options.cache)
        result.digest, result.downloads = subject.digest, subject.downloads
        progress.case_starts(case, "truth")
        result.tensors = judge_reference(reference, Oracle(subject, options.cache))
        result.expected = len(result.tensors)
        result.status, result.error = status_of(result.tensors, case, in_part=True)
        if result.status is Status.PASS:
            result.status = Status.UNMEASURED
            result.error = "every number agrees with the truth, but the file does not say what made it"
    except HubError as error:
        result.error, result.failure, result.status = str(error), Failure.INPUT, Status.UNMEASURED
    except ParityError as error:
        result.error, result.failure = str(error), Failure.INPUT
    result.seconds = time.monotonic() - started
    return RunResult(options.candidate, {}, library_versions(), [result], {})


def library_versions() -> dict[str, str]:
    """Versions that decide the truth, and the machine it was computed on."""
    packages = ("torch", "transformers", "numpy", "safetensors")
    return (
        {"candle-mi-parity": __version__}
        | {name: version(name) for name in packages}
        | {
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
        }
    )
