"""One case from its row to its verdict: truth, trace, comparison, and what is known of a divergence."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import NotStoredError, Source
from candle_mi_parity.candidate.store import stored_selection
from candle_mi_parity.compare.compare import compare, first_diagnosis
from candle_mi_parity.compare.diagnose_sae import summarize_saes
from candle_mi_parity.compare.sae_view import SaeView
from candle_mi_parity.compare.unmeasurable import UNMEASURABLE
from candle_mi_parity.compare.verdict import (
    TOO_NOISY,
    CaseResult,
    Diagnosis,
    Explained,
    Failure,
    Status,
    TensorResult,
)
from candle_mi_parity.errors import HubError, LibraryError, NoTruthError, OutOfRangeError, ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.judge.known import Evidence, decoder_of, facts_of, known_divergence, known_refusal
from candle_mi_parity.judge.notes import (
    absent_notes,
    edits_before,
    other_ids,
    padding_notes,
    truncation_notes,
    truth_notes,
    unexercised,
    version_notes,
)
from candle_mi_parity.judge.reproducible import not_reproducible
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.torch_state import TORCH
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.explanations import Explanations
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import command

EMITTER = Lock()
"""Held while the emitter, which is one process, is at work."""


class Progress:
    """Where a run reports its progress; this one is silent, the terminal overrides it."""

    def case_starts(self, case: Case, step: str) -> None: ...

    def case_ends(self, result: CaseResult) -> None: ...

    def note(self, line: str) -> None:
        """Show what is being done, until the next note."""

    def keep(self, line: str) -> None:
        """Show a line that stays."""


@dataclass(frozen=True)
class Judged:
    """One mode of a case compared; ``in_part`` says that the trace was stored in part."""

    tensors: list[TensorResult]
    diagnosis: Diagnosis | None
    in_part: bool
    sae: list[SaeView]
    evidence: Evidence


@dataclass(frozen=True)
class Judgement:
    """A case judged.

    :ivar evidence: what a new divergence can be explained from; None for any other case.
    :ivar applicable: ids of the explanations that apply to the case in the candidate's baseline.
    """

    result: CaseResult
    evidence: Evidence | None = None
    applicable: tuple[str, ...] = ()


def judge_case(
    case: Case, source: Source, spec: str, cache: Path, table: Explanations, progress: Progress
) -> Judgement:
    """One case from its row to its verdict."""
    started = time.monotonic()
    result = CaseResult(case.id, case.family, "", Status.ERROR, reproduce_command(case, source, spec))
    evidence: Evidence | None = None
    applicable: tuple[str, ...] = ()
    try:
        progress.case_starts(case, "model")
        with TORCH:
            subject = prepare(case, cache)
            oracle = Oracle(subject, cache, source.device)
        result.digest, result.downloads = subject.digest, subject.downloads
        release = table.baseline(source.identity.version) if source.identity is not None else ""
        if release:
            applicable = tuple(row.id for row in table.applicable(facts_of(subject), release))
        result.notes = padding_notes(subject) + version_notes(subject)
        try:
            if case.text is None or _same_ids(result, subject, source, progress):
                evidence = _judge(result, oracle, source, table, release, progress)
                if result.status is Status.FAIL:
                    _offer_test(result, case, spec)
        except EmitterError as error:
            result.error, result.failure = str(error), failure_of(error)
            if result.failure is Failure.ABSENT:
                result.status, result.error = Status.UNMEASURED, error.message
            elif result.failure.refused and source.identity is not None:
                result.explained, result.unexplained = known_refusal(error, subject, table, release)
                result.status = Status.FAIL if result.explained is None else Status.KNOWN
    except (HubError, OutOfRangeError) as error:  # neither the candidate nor the suite is at fault
        result.error, result.failure, result.status = str(error), Failure.INPUT, Status.UNMEASURED
    except LibraryError as error:
        result.error, result.failure, result.status = str(error), Failure.ABSENT, Status.UNMEASURED
    except NotStoredError as error:
        result.error, result.failure = str(error), Failure.ABSENT
    except ParityError as error:
        result.error, result.failure = str(error), Failure.INPUT
    except Exception as error:  # a bug in the suite fails this case only
        result.error, result.failure = f"internal: {type(error).__name__}: {one_line(str(error))}", Failure.INTERNAL
    result.seconds = time.monotonic() - started
    return Judgement(result, evidence if result.status is Status.FAIL else None, applicable)


def reproduce_command(case: Case, source: Source, spec: str) -> str:
    """The command that judges a case again."""
    device = () if source.device == "cpu" else ("--device", source.device)
    return command("run", "--candidate", spec, "--cases", case.id, *device)


def _offer_test(result: CaseResult, case: Case, spec: str) -> None:
    """The command that makes a failing Rust test of a divergence, or a note on why there is none.

    A candidate that cannot be built gets neither.
    """
    first = result.first_divergence
    if not (spec.startswith(("path:", "git:")) or spec[:1].isdecimal()):
        return
    if why := not_reproducible(case, first.name if first else ""):
        result.notes.append(f"`repro` makes no Rust test of this: {why}")
    else:
        result.shrink = command("repro", case.id, "--candidate", spec)


def _same_ids(result: CaseResult, subject: PreparedCase, source: Source, progress: Progress) -> bool:
    """Whether the candidate's tokenizer gives the case's ids for its text; otherwise nothing else is judged.

    :raises EmitterError: the candidate refuses the text.
    """
    progress.case_starts(subject.case, "tokenizer")
    with EMITTER:
        asked = source.text_ids(subject)
    if asked.ids is None:
        result.notes += [f"candle-mi's tokenizer was not asked: {asked.why}"] if asked.why else []
        return True
    if failure := other_ids(subject, asked.ids):
        result.tensors, result.expected, result.status = [failure], 1, Status.FAIL
    else:
        result.notes += truncation_notes(subject)
    return failure is None


def _judge(
    result: CaseResult, oracle: Oracle, source: Source, table: Explanations, release: str, progress: Progress
) -> Evidence | None:
    """Fill the result of a case; None where the case has no truth."""
    case = oracle.subject.case
    progress.case_starts(case, "truth")
    try:
        with TORCH:
            oracle.truth()
    except NoTruthError as error:
        _ask_without_truth(result, oracle, source, progress, error)
        return None
    judged = judge_mode(oracle, source, "free", progress)
    result.tensors, result.diagnosis, result.sae = judged.tensors, judged.diagnosis, judged.sae
    result.expected, result.in_part = len(result.tensors), judged.in_part
    result.status, result.error = status_of(result.tensors, case, result.in_part)
    result.notes += truth_notes(oracle.truth(), case) + absent_notes(judged.evidence.trace)
    if result.status is not Status.FAIL and (reason := unexercised(oracle.truth())):
        result.status, result.error = Status.UNMEASURED, reason
    if result.status is not Status.FAIL:
        return judged.evidence
    evidence = replace(judged.evidence, release=release)
    result.edited = edits_before(result.first_divergence, oracle.subject)
    if source.identity is not None:
        with TORCH:
            found = known_divergence(evidence, table, source.identity)
        if isinstance(found, Explained):
            result.explained = found
        else:
            result.unexplained, result.beyond_known = found.why, found.first
    if result.explained is not None:
        result.status = Status.KNOWN
    elif not case.changed:  # a change affects the whole trace
        result.teacher_forced = _teacher_forced(result, oracle, source, progress)
    return evidence


def _ask_without_truth(
    result: CaseResult, oracle: Oracle, source: Source, progress: Progress, error: NoTruthError
) -> None:
    """Ask the candidate about a case whose SAE has no truth: a refusal is a result.

    :raises EmitterError: the candidate refuses.
    :raises ParityError: the model has no truth either.
    """
    subject = oracle.subject
    with TORCH:
        model = oracle.without_sae()
        truth, inputs = model.truth(), model.inputs("free")
    asked = {"case": subject.digest, "sae": str(subject.sae_digest)}
    with EMITTER:
        progress.case_starts(subject.case, "candle-mi")
        source.trace(subject, "free", replace(truth, meta=truth.meta | asked), inputs)
    result.status, result.failure = Status.UNMEASURED, Failure.INPUT
    result.error = f"candle-mi computes something, but {error}"


@contextmanager
def taking_errors(result: CaseResult) -> Iterator[None]:
    """Put the error of an answer into its result: a refusal by candle-mi is a FAIL, anything else an ERROR."""
    try:
        yield
    except EmitterError as error:
        result.error, result.failure = str(error), failure_of(error)
        result.status = Status.FAIL if result.failure.refused else Status.ERROR
    except ParityError as error:
        result.error, result.status = str(error), Status.ERROR


def failure_of(error: EmitterError) -> Failure:
    """The kind of an emitter's failure; an unknown kind breaks the protocol."""
    return Failure(error.kind) if error.kind in set(Failure) else Failure.PROTOCOL


def _teacher_forced(result: CaseResult, oracle: Oracle, source: Source, progress: Progress) -> list[TensorResult]:
    """The teacher-forced run of a case that diverged; empty, with a note, where it fails."""
    try:
        return judge_mode(oracle, source, "forced", progress).tensors
    except ParityError as error:
        result.notes.append(f"no teacher-forced run, which shows whether each half-layer alone is right: {error}")
        return []


def judge_mode(oracle: Oracle, source: Source, mode: Mode, progress: Progress) -> Judged:
    """Truth, trace and comparison of one mode.

    :raises ParityError: one of the three fails.
    """
    subject = oracle.subject
    with TORCH:
        truth = oracle.truth(mode)
        inputs = oracle.inputs(mode)
    with EMITTER:
        progress.case_starts(subject.case, "candle-mi")
        trace = source.trace(subject, mode, truth, inputs)
    progress.case_starts(subject.case, "compare")
    in_part = any(entry.part is not None for entry in trace.entries.values())
    selection = stored_selection(list(truth.tensors)) if in_part else trace.asked
    results = compare(truth, trace, decoder_of(subject) if mode == "free" else None, selection)
    evidence = Evidence(oracle, trace, selection, declared_unmeasured(results, subject.case))
    return Judged(results, first_diagnosis(truth, trace, results), in_part, summarize_saes(truth, trace), evidence)


def declared_unmeasured(tensors: list[TensorResult], case: Case) -> set[str]:
    """The tensors that the case declares too noisy to judge."""
    names = [tensor.name for tensor in tensors]
    return {name for pattern in case.unmeasured for name in fnmatch.filter(names, pattern)}


def status_of(tensors: list[TensorResult], case: Case, in_part: bool) -> tuple[Status, str]:
    """The status of a case, and an error where its row declares other tensors unmeasured than the comparison."""
    if any(tensor.status is Status.FAIL for tensor in tensors):
        return Status.FAIL, ""
    if idle := [tensor.name for tensor in tensors if tensor.status is Status.PASS and not tensor.compared]:
        return Status.UNMEASURED, f"nothing was compared of {', '.join(idle)}"
    unmeasured = {tensor.name for tensor in tensors if tensor.status is Status.UNMEASURED}
    if case.unmeasured == ["*"]:
        noisy = f"{len(unmeasured)} of {len(tensors)} {TOO_NOISY} {case.dtype} to judge"
        return (Status.UNMEASURED, noisy) if unmeasured else (Status.PASS, "")
    declared = declared_unmeasured(tensors, case)
    # A trace that was stored in part may lack the positions that are too noisy.
    if unmeasured == declared or (in_part and unmeasured < declared):
        return Status.PASS, ""
    if far := [tensor for tensor in tensors if tensor.reason == UNMEASURABLE and tensor.name not in declared]:
        more = f"; and {len(far) - 1} more" if len(far) > 1 else ""
        return Status.UNMEASURED, f"{far[0].name}: {far[0].detail}{more}"
    opened, closed = sorted(unmeasured - declared), sorted(declared - unmeasured)
    message = f"{', '.join(opened)}: too noisy to judge, but missing from `unmeasured`. " if opened else ""
    message += f"{', '.join(closed)}: in `unmeasured`, but can be judged. " if closed else ""
    return Status.UNMEASURED, f"{message}Edit `unmeasured` of this case in fixtures/cases.toml"
