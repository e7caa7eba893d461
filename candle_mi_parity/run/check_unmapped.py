"""A check of a model whose family has no hook map, asked through candle-mi's auto-config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.sources import TIMEOUT_SECONDS
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.compare.check_result import PromptResult
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.coverage.census import Question
from candle_mi_parity.coverage.unmapped import Give, judge_unmapped, unmapped_subject
from candle_mi_parity.judge.case import failure_of
from candle_mi_parity.models.prepared_case import Subject
from candle_mi_parity.run.check_findings import finish, measured
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.trace.dump import as_trace
from candle_mi_parity.trace.trace import CandleMi

if TYPE_CHECKING:
    from candle_mi_parity.run.check import _Check


def judge_unmapped_family(check: _Check, cases: list[Case]) -> None:
    """Judge each prompt by the hook points that the module names tell of, else by its logits.

    :raises ParityError: an input that cannot be used, or a candidate that cannot be built.
    """
    subjects = [unmapped_subject(case, check.options.cache) for case in cases]
    family = subjects[0].model_type
    check.result.notes.append(f"{family} is not among the families whose hooks are mapped: nothing is explained")
    if check.dump is not None:
        dump = check.dump
        _all(check, subjects, lambda subject, truth: as_trace(dump, truth, subject.case.dtype))
    else:
        _ask(check, subjects)
    finish(check, subjects)


def _ask(check: _Check, subjects: list[Subject]) -> None:
    options = check.options
    candidate = parse_candidate(check.result.candidate)
    if candidate.kind in ("stored", "torch"):
        raise CandidateError(
            f"{subjects[0].model_type} has no hook map: it takes a candle-mi to ask, not {candidate.spec}"
        )
    built = build(candidate, options.cache, check.told.line)
    identity = CandleMi.model_validate(built.identity["candle_mi"])
    check.result.identity = identity.model_dump(exclude_none=True)
    out = (options.out / "traces").resolve()
    out.mkdir(parents=True, exist_ok=True)
    with EmitterProcess(built.path) as emitter:
        family = subjects[0].model_type
        question = Question(family, "", emitter, identity, options.cache, out, TIMEOUT_SECONDS)
        try:
            reader = question.reader(subjects[0])
        except EmitterError as error:
            kind = failure_of(error)
            status = Status.FAIL if kind.refused else Status.ERROR
            for subject in subjects:
                refused = CaseResult(subject.case.id, "check", subject.digest, status, options.command())
                refused.error, refused.failure = str(error).replace(str(subject.model_dir), "the model"), kind
                check.result.prompts.append(_prompt(subject, refused))
            return
        if reader == "auto":
            check.result.notes.append(f"candle-mi reads {family} through its auto-config")
        _all(check, subjects, lambda subject, truth: question.emit(subject, reader))


def _all(check: _Check, subjects: list[Subject], give: Give) -> None:
    for subject in subjects:
        check.told.step(f"{subject.case.id.removeprefix('check/')} ({len(subject.tokens[0])} tokens)")
        case, seen, note = judge_unmapped(subject, check.options.cache, give)
        case.reproduce = check.options.command()
        prompt = _prompt(subject, case)
        check.result.prompts.append(prompt)
        if note and note not in check.result.notes:
            check.result.notes.append(note)
        measured(check, prompt, seen)


def _prompt(subject: Subject, case: CaseResult) -> PromptResult:
    tokens = subject.tokens[0]
    text = subject.case.text if subject.case.text is not None else f"{len(tokens)} token ids"
    return PromptResult(subject.case.id.removeprefix("check/"), text, tokens, case)
