"""One case from its row to its verdict: truth, trace, comparison."""

from __future__ import annotations

import fnmatch
import shlex
import time
from pathlib import Path
from threading import Lock

import numpy as np

from candle_mi_parity.candidate.sources import Source
from candle_mi_parity.candidate.store import stored_selection
from candle_mi_parity.compare.compare import compare, look
from candle_mi_parity.compare.diagnose_sae import look_sae
from candle_mi_parity.compare.ledger import Ledger, apply_ledger
from candle_mi_parity.compare.verdict import CaseResult, Diagnosis, SaeView, Status, TensorResult
from candle_mi_parity.errors import HubError, ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.models.prepared_case import Subject, prepare
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.hook_points import Mode

_TORCH, _EMITTER = Lock(), Lock()
"""One case at a time: torch's default dtype, under which models are made and loaded, is the whole process's, and two
models in memory are one too many; an emitter is one process."""


class Progress:
    """What a run tells while it works; the terminal overrides it."""

    def case_starts(self, case: Case, step: str) -> None: ...

    def case_ends(self, result: CaseResult) -> None: ...

    def note(self, line: str) -> None: ...


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
