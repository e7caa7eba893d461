"""A run: each case's truth against a candidate's trace, the ledger applied, one :class:`RunResult`."""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from candle_mi_parity import __version__
from candle_mi_parity.candidate import cuda
from candle_mi_parity.candidate.candidate import OutOfReachError, parse_candidate
from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.candidate.store import StoringSource
from candle_mi_parity.compare.ledger import Ledger
from candle_mi_parity.compare.verdict import CaseResult, RunResult, Status
from candle_mi_parity.coverage.flat_json import case_of, judge_reference, read_reference
from candle_mi_parity.errors import HubError, ParityError
from candle_mi_parity.judge.case import Progress, _status, judge_case
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.cases import Case

NOT_REACHED = "not reached: the run ended before it"


def run(
    spec: str,
    cases: list[Case],
    skipped: dict[str, str],
    cache: Path,
    out: Path,
    ledger: Ledger,
    progress: Progress,
    strict: bool = False,
    keep: Path | None = None,
    device: str = "cpu",
    result: RunResult | None = None,
) -> RunResult:
    """Judge a candidate on cases.

    :param skipped: cases that do not run, with reason and remedy; they are counted in the report.
    :param out: where traces and reports go.
    :param device: of the candidate; the truth is always the CPU's.
    :param keep: store what the candidate emits in this directory, see :mod:`store`.
    :param result: an empty one to fill as cases end, so that its owner has them when the run breaks off.
    :raises ParityError: the candidate cannot be built or found; a fault of one case is that case's ERROR. Where
        only network, GPU or nvcc is missing no case runs, each with that reason: INCONCLUSIVE.
    """
    result = result or blank(spec, strict, device)
    candidate = parse_candidate(spec)
    if candidate.kind == "stored" and Path(candidate.target).expanduser().is_file():
        result.cases += run_reference(spec, Path(candidate.target).expanduser(), cache, progress).cases
        return result
    try:
        opening = open_source(candidate, cache, out / "traces", progress.note, device)
    except OutOfReachError as error:
        result.skipped = skipped | {case.id: str(error) for case in cases}
        return result
    result.skipped = skipped | {case.id: NOT_REACHED for case in cases}
    with opening as opened:
        source = StoringSource(opened, keep) if keep else opened
        if source.identity:
            result.identity = source.identity.model_dump(exclude_none=True)
        # torch's default dtype is the whole process's: beside a truth no float32 model may be loaded in it.
        count = 1 if candidate.kind == "torch" else 2
        with at_once(count, lambda case: judge_case(case, source, spec, cache, ledger, progress), cases) as futures:
            try:
                for future in futures:
                    judged = future.result()
                    _take(judged, result)
                    progress.case_ends(judged)
            finally:
                _settle(result, futures, skipped, cases)
                if source.identity:
                    result.stale = [line for case in result.cases for line in ledger.stale(case, source.identity)]
    return result


def _take(judged: CaseResult, result: RunResult) -> None:
    if all(judged is not taken for taken in result.cases):
        result.cases.append(judged)


def _settle(result: RunResult, futures: list[Future[CaseResult]], skipped: dict[str, str], cases: list[Case]) -> None:
    """What is judged is in the result, and what is not was not reached, at whatever point the run broke off."""
    for future in futures:
        if future.done() and not future.cancelled():
            _take(future.result(), result)
    reached = {case.id for case in result.cases}
    result.skipped = skipped | {case.id: NOT_REACHED for case in cases if case.id not in reached}


@contextmanager
def at_once(count: int, judge: Callable[[Case], CaseResult], cases: list[Case]) -> Iterator[list[Future[CaseResult]]]:
    """A future a case, in their order; with two at once, while one is compared the emitter works on the next.

    A run that breaks off does not wait for the cases at work: their emitter, which may hang, is closed after this.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield [pool.submit(judge, case) for case in cases]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def blank(spec: str, strict: bool = False, device: str = "cpu") -> RunResult:
    """The result of a run that has judged nothing yet."""
    return RunResult(spec, {}, library_versions() | cuda.versions(device), [], {}, [], strict)


def run_reference(spec: str, path: Path, cache: Path, progress: Progress) -> RunResult:
    """Judge a flat reference JSON; without provenance even a perfect one is only UNMEASURED.

    :raises ParityError: the file is not such a JSON; what it is about that cannot be had is an ERROR.
    """
    started = time.monotonic()
    reference = read_reference(path)
    case = case_of(reference)
    command = f"candle-mi-parity run --candidate {shlex.quote(spec)}"
    result = CaseResult(case.id, case.family, "", Status.ERROR, command)
    try:
        progress.case_starts(case, "model")
        subject = prepare(case, cache)
        result.digest, result.downloads = subject.digest, subject.downloads
        progress.case_starts(case, "truth")
        result.tensors = judge_reference(reference, Oracle(subject, cache))
        result.expected = len(result.tensors)
        result.status, result.error = _status(result.tensors, case, in_part=True)
        if result.status is Status.PASS:
            result.status = Status.UNMEASURED
            result.error = "every number agrees with the truth, but the file does not say what made it"
    except HubError as error:
        result.error, result.status = str(error), Status.UNMEASURED
    except ParityError as error:
        result.error = str(error)
    result.seconds = time.monotonic() - started
    return RunResult(spec, {}, library_versions(), [result], {}, [])


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
