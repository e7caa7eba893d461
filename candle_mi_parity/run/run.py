"""A run: judge each case, explain new divergences, and find explanations that no longer hold."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from candle_mi_parity import __version__
from candle_mi_parity.candidate import cuda
from candle_mi_parity.candidate.build import changed_since
from candle_mi_parity.candidate.sources import LiveSource, Source, open_source, refuse_device
from candle_mi_parity.candidate.spelling import CandidateError, OutOfReachError, parse_candidate, stored_index
from candle_mi_parity.candidate.store import StoringSource
from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.verdict import CaseResult, Failure, Outcome, Status
from candle_mi_parity.coverage.calls_judge import load_known_calls
from candle_mi_parity.coverage.flat_json import case_of, judge_reference, read_reference
from candle_mi_parity.errors import HubError, ParityError
from candle_mi_parity.files.versions import version
from candle_mi_parity.judge.case import Judgement, Progress, judge_case, status_of
from candle_mi_parity.judge.explain import explain_new, hold_table
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.tokenizers import load_tokenizers
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.run.alone import tell_state
from candle_mi_parity.run.at_once import at_once
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.sections import judge_sections
from candle_mi_parity.spec.cases import OPT_IN_LANES, Case, load_cases, select
from candle_mi_parity.spec.expected import ExpectedDivergences, held_to, load_expected
from candle_mi_parity.spec.explanations import Explanations, load_explanations
from candle_mi_parity.spec.paths import OUTPUTS, command

NOT_REACHED = "not reached: the run ended before it"


def run(options: RunOptions, progress: Callable[[int], Progress], result: RunResult | None = None) -> RunResult:
    """Select the cases and judge a candidate on them.

    :param progress: number of cases → the display of progress.
    :param result: an empty result that is filled as cases end, so that a stopped run keeps them.
    :raises ParityError: the candidate cannot be built or found. A fault of one case is that case's ERROR. Where
        network, GPU or nvcc is missing, every case is skipped with that reason, and the run is INCONCLUSIVE.
    """
    table = load_cases()
    chosen = select(table, list(options.cases)) if "traces" in options.parts else []
    # No release stores the cases that need a download or much memory, so that only a build can be asked.
    asked = re.sub(r"^stored:(?=\d+\.\d+\.\d+$)", "", options.candidate)
    again = ("run", "--candidate", asked, "--cases")
    skipped = {case.id: "left out by --only" for case in table if "traces" not in options.parts} or {
        case.id: f"{OPT_IN_LANES[case.lane]}; run it with {command(*again, case.id)}"
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
    """:func:`run` with selected cases.

    :param skipped: cases that do not run → reason and remedy, for the report.
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
    known, expected = _held(options)
    with opening as opened:
        source = StoringSource(opened, options.keep) if options.keep else opened
        if source.identity:
            result.identity = source.identity.model_dump(exclude_none=True)
            result.build = opened.built_with if isinstance(opened, LiveSource) else ""
            result.baseline = known.baseline(source.identity.version)
            result.known = {row.id: row for row in known.explanation}
        # torch's default dtype is shared by all threads: no float32 model may be loaded while a truth is computed.
        count = 1 if candidate.kind == "torch" else 2

        def judge_on(case: Case, asked: Source) -> Judgement:
            return judge_case(case, asked, options.candidate, options.cache, known, progress)

        def judge(case: Case) -> Judgement:
            return judge_on(case, source)

        with at_once(count, judge, cases) as futures:
            try:
                for future in futures:
                    judged = future.result()
                    _take(judged.result, result)
                    progress.case_ends(judged.result)
            finally:
                _settle(result, futures, skipped, cases)
        judgements = [future.result() for future in futures]
        tell_state(judgements, cases, opened, judge_on, options.candidate)
        explain_new(judgements, known, options.cache, options.search, progress)
        hold_table(judgements, known, source.identity, result, whole=not options.cases and "traces" in options.parts)
        judge_sections(opened, cases, options, known, expected, result, progress)
    result.fault = changed_since(candidate, source.identity, options.cache)
    return result


def _held(options: RunOptions) -> tuple[Explanations, ExpectedDivergences | None]:
    """The explanations that the options choose, and the file of expected divergences."""
    others = [*load_known_calls().known, *load_tokenizers().known]
    expected = load_expected(options.known, others) if options.known else None
    table = load_explanations(parse_candidate(options.candidate).table)
    return held_to(table, options.baseline, expected), expected


def _take(judged: CaseResult, result: RunResult) -> None:
    """A case that needs a feature which the candidate does not have was not run."""
    if judged.outcome is Outcome.ABSENT and judged.status is Status.UNMEASURED:
        result.skipped[judged.id] = judged.error
    elif all(judged is not taken for taken in result.cases):
        result.cases.append(judged)


def _settle(result: RunResult, futures: list[Future[Judgement]], skipped: dict[str, str], cases: list[Case]) -> None:
    """Add every finished case to the result of a run that may have been stopped, and mark the others as skipped."""
    for future in futures:
        if future.done() and not future.cancelled():
            _take(future.result().result, result)
    reached = {case.id for case in result.cases}
    waiting = {case.id: result.skipped.get(case.id, NOT_REACHED) for case in cases if case.id not in reached}
    result.skipped = skipped | waiting


def require_selection(options: RunOptions) -> None:
    """Refuse a bad selection before an earlier report is removed.

    :raises ParityError: a glob that matches no case, a wrong baseline or file of expected divergences, or a candidate
        that is misspelt or does not exist.
    """
    select(load_cases(), list(options.cases))
    _held(options)
    _ = options.parts
    candidate = parse_candidate(options.candidate)
    refuse_device(candidate, options.device)
    if candidate.kind == "stored" and not Path(candidate.target).expanduser().is_file():
        stored_index(candidate, OUTPUTS)
    if candidate.kind == "path" and not (Path(candidate.target).expanduser() / "Cargo.toml").is_file():
        raise CandidateError(f"no Cargo.toml in {candidate.target}; path:DIR is a checkout of candle-mi")


def blank(options: RunOptions) -> RunResult:
    """An empty result."""
    versions = library_versions() | cuda.versions(options.device)
    return RunResult(options.candidate, {}, versions, [], {}, strict=options.strict)


def run_reference(options: RunOptions, path: Path, progress: Progress) -> RunResult:
    """Judge a flat reference JSON; without provenance, even one that agrees is UNMEASURED.

    :raises ParityError: the file is not such a JSON. A model that cannot be loaded is an ERROR in the result.
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
    """Versions of the libraries of the truth, and the machine."""
    packages = ("torch", "transformers", "numpy", "safetensors")
    machine = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    return {"candle-mi-parity": __version__} | {name: version(name) for name in packages} | machine
