"""A run: each case's truth against a candidate's trace, the ledger applied, one :class:`RunResult`."""

from __future__ import annotations

import fnmatch
import platform
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import Lock

import numpy as np

from candle_mi_parity import __version__, cuda
from candle_mi_parity.candidate import OutOfReachError, parse_candidate
from candle_mi_parity.cases import Case
from candle_mi_parity.compare import compare, look
from candle_mi_parity.diagnose import Diagnosis
from candle_mi_parity.errors import HubError, ParityError
from candle_mi_parity.ledger import Ledger, apply_ledger
from candle_mi_parity.look_sae import look_sae
from candle_mi_parity.oracle import Mode, Oracle
from candle_mi_parity.printable import one_line
from candle_mi_parity.reference import case_of, judge_reference, read_reference
from candle_mi_parity.sae import load_sae
from candle_mi_parity.sae_view import SaeView
from candle_mi_parity.sources import Source, open_source
from candle_mi_parity.store import StoringSource, stored_selection
from candle_mi_parity.subject import Subject, prepare
from candle_mi_parity.verdict import CaseResult, RunResult, Status, TensorResult

_TORCH, _EMITTER = Lock(), Lock()
"""One case at a time: torch's default dtype, under which models are made and loaded, is the whole process's, and two
models in memory are one too many; an emitter is one process."""

NOT_REACHED = "not reached: the run ended before it"


class Progress:
    """What a run tells while it works; the terminal overrides it."""

    def case_starts(self, case: Case, step: str) -> None: ...

    def case_ends(self, result: CaseResult) -> None: ...

    def note(self, line: str) -> None: ...


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


def judge_case(case: Case, source: Source, spec: str, cache: Path, ledger: Ledger, progress: Progress) -> CaseResult:
    """One case from its row to its verdict."""
    started = time.monotonic()
    command = f"candle-mi-parity run --candidate {shlex.quote(spec)} --cases {shlex.quote(case.id)}"
    command += "" if source.device == "cpu" else f" --device {source.device}"
    result = CaseResult(case.id, case.family, "", Status.ERROR, command)
    try:
        progress.case_starts(case, "model")
        with _TORCH:
            subject = prepare(case, cache)
            oracle = Oracle(subject, cache, source.device)
        result.digest, result.downloads = subject.digest, subject.downloads
        progress.case_starts(case, "truth")
        result.tensors, result.diagnosis, result.in_part, result.sae = judge_mode(oracle, source, "free", progress)
        result.expected = len(result.tensors)
        result.status, result.error = _status(result.tensors, case, result.in_part)
        if result.status is Status.FAIL and not case.edits:  # edits act on the whole trace
            result.forced, result.known = _forced(oracle, source, progress)
    except HubError as error:  # says nothing of the candidate, and no more of this suite
        result.error, result.status = str(error), Status.UNMEASURED
    except ParityError as error:
        result.error, result.status = str(error), Status.ERROR
    except Exception as error:  # a fault of ours costs its own case, loudly, and not those already judged
        result.error, result.status = f"internal: {type(error).__name__}: {one_line(str(error))}", Status.ERROR
    if source.identity is not None:
        apply_ledger(result, source.identity, ledger)
    result.seconds = time.monotonic() - started
    return result


def _forced(oracle: Oracle, source: Source, progress: Progress) -> tuple[list[TensorResult], str]:
    """The teacher-forced run of a case that diverged; where it cannot be had, the case stays a failure."""
    try:
        return judge_mode(oracle, source, "forced", progress)[0], ""
    except ParityError as error:
        return [], f"no teacher-forced run: {error}"


def judge_mode(
    oracle: Oracle, source: Source, mode: Mode, progress: Progress
) -> tuple[list[TensorResult], Diagnosis | None, bool, list[SaeView]]:
    """Truth, trace and comparison of one mode, a look at the first divergence, whether a part is all there is, and
    a look at the SAE.

    :raises ParityError: whichever of the three cannot be had.
    """
    subject = oracle.subject
    with _TORCH:
        truth = oracle.truth(mode)
        inputs = oracle.inputs(mode)
    with _EMITTER:
        progress.case_starts(subject.case, "candle-mi")
        trace = source.trace(subject, mode, truth, inputs)
    progress.case_starts(subject.case, "compare")
    in_part = any(entry.part is not None for entry in trace.entries.values())
    selection = stored_selection(list(truth.tensors)) if in_part else None
    results = compare(truth, trace, _decoder(subject, mode), selection)
    return results, look(truth, trace, results), in_part, look_sae(truth, trace)


def _decoder(subject: Subject, mode: Mode) -> np.ndarray | None:
    return load_sae(subject.sae_file).decoder if subject.sae_file is not None and mode == "free" else None


def _status(tensors: list[TensorResult], case: Case, in_part: bool) -> tuple[Status, str]:
    """Of a case, and what its row says wrongly of the tensors that are too noisy to judge."""
    if any(tensor.status is Status.FAIL for tensor in tensors):
        return Status.FAIL, ""
    if idle := [tensor.name for tensor in tensors if tensor.status is Status.PASS and not tensor.compared]:
        return Status.UNMEASURED, f"nothing was compared of {', '.join(idle)}"
    unmeasured = {tensor.name for tensor in tensors if tensor.status is Status.UNMEASURED}
    names = [tensor.name for tensor in tensors]
    declared = {name for pattern in case.unmeasured for name in fnmatch.filter(names, pattern)}
    # A part may leave out the very positions that are too noisy.
    if unmeasured == declared or (in_part and unmeasured < declared):
        return Status.PASS, ""
    opened, closed = sorted(unmeasured - declared), sorted(declared - unmeasured)
    said = f"too noisy to judge, and not declared so: {', '.join(opened)}. " if opened else ""
    said += f"declared unmeasured, but measured: {', '.join(closed)}. " if closed else ""
    return Status.UNMEASURED, f"{said}Edit `unmeasured` of this case in fixtures/cases.toml"
