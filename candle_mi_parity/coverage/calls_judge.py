"""Judge direct calls by the gate; known wrong results are compared with their stated formula by the same gate."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import NotStoredError, Source
from candle_mi_parity.compare.diff import CaseDiff, diff_call
from candle_mi_parity.compare.run_result import RunResult, Section
from candle_mi_parity.compare.verdict import CaseResult, Explained, Failure, Outcome, Status, TensorResult
from candle_mi_parity.coverage.calls import CallRow, Calls, CallTable, answers, load_calls
from candle_mi_parity.coverage.calls_compare import CallTruth, Results, answer_of, compare_call, distance
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.errors import CaseTableError, ExplanationError, OracleError, TraceError
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.judge.case import failure_of
from candle_mi_parity.oracle.provenance import library_versions, rules_digest
from candle_mi_parity.spec.explanations import Cause, Pattern, baseline, check_unique
from candle_mi_parity.spec.paths import FIXTURES, command
from candle_mi_parity.spec.table import TableRow, read_toml
from candle_mi_parity.trace.trace import CandleMi
from candle_mi_parity.trace.truth import TruthTensor

CALL = "direct call"
PANICKED = "panicked"
"""The emitter's message for a call that panicked, which is never right."""
TruthKey = tuple[str, Formula | None]
"""A call, and the wrong formula; None for the truth."""


class KnownCall(Cause):
    """One cause.

    :ivar calls: globs over calls; each of these calls must need it.
    :ivar formula: computed instead of the truth.
    :ivar refuses: a regular expression for the whole message of a refusal or of a function's absence.
    """

    id: Annotated[str, Field(pattern=r"^CMI[12]\d\d$")]
    calls: Annotated[list[str], Field(min_length=1)]
    formula: Annotated[Formula | None, Field(strict=False)] = None
    refuses: Pattern = ""

    @model_validator(mode="after")
    def _one_answer(self) -> KnownCall:
        if (self.formula is None) == (not self.refuses) or (self.kind == "refusal") != bool(self.refuses):
            raise ValueError(f'{self.id}: give `formula`, or `refuses` and the kind "refusal"')
        return self


class KnownCalls(TableRow):
    """The whole table."""

    format: Literal[1] = 1
    known: list[KnownCall] = []

    @model_validator(mode="after")
    def _unique(self) -> KnownCalls:
        check_unique(self.known)
        return self

    def matches(self, table: CallTable) -> Iterator[tuple[KnownCall, str]]:
        """Each row with each of its calls.

        :raises ExplanationError: a glob matches no call, or two rows explain a call in one release.
        """
        owners: dict[tuple[str, str], str] = {}
        for row in self.known:
            for glob in row.calls:
                if not (found := fnmatch.filter([call.id for call in table.call], glob)):
                    raise ExplanationError(f"{row.id}: there is no call {glob}")
                for call in found:
                    for release in row.releases:
                        if (other := owners.setdefault((call, release), row.id)) != row.id:
                            raise ExplanationError(f"{other} and {row.id} overlap: both explain {call} in {release}")
                    yield row, call


def load_known_calls(path: Path = FIXTURES / "known_calls.toml") -> KnownCalls:
    """:raises ExplanationError: the table is malformed, or has an id or name twice."""
    return read_toml(path, KnownCalls, ExplanationError)


@dataclass(frozen=True)
class Expectations:
    """The tables and truths that answers are compared with.

    :ivar matches: each known cause with each of its calls.
    :ivar truths: the truth of each call, and the values of each formula of a call.
    :ivar chosen: the release that every candidate is held to; empty for the newest that is not newer.
    :ivar exactly: whether its rows are all that is expected, also of a build from source.
    """

    table: CallTable
    matches: list[tuple[KnownCall, str]]
    truths: dict[TruthKey, CallTruth]
    chosen: str = ""
    exactly: bool = False

    @property
    def rows(self) -> dict[str, KnownCall]:
        """Id → known cause, for every release."""
        return {row.id: row for row, _ in self.matches}

    def release(self, version: str) -> str:
        """The release that a version is held to: the chosen one, or the newest that is not newer."""
        return self.chosen or baseline(self.rows.values(), version)

    def known(self, version: str) -> dict[str, KnownCall]:
        """Call → known cause in the release that a version is held to."""
        release = self.release(version)
        return {call: row for row, call in self.matches if release in row.releases}


def expectations(
    cache: Path, known: KnownCalls | None = None, note: Callable[[str], None] = lambda line: None
) -> Expectations:
    """The tables and their truths, from the cache or computed.

    :param known: None for ``fixtures/known_calls.toml``.
    :param note: called with what is being computed, as it takes minutes.
    :raises ExplanationError: a row has no call, two rows have the same, or a formula gives the right value.
    """
    table = load_calls()
    rows = {row.id: row for row in table.call}
    matches = list((known or load_known_calls()).matches(table))
    asked: dict[TruthKey, str] = {(call, None): "" for call in rows}
    asked |= {(call, row.formula): row.id for row, call in matches if row.formula}
    truths = _truths(table, asked, cache, note)
    for row, call in matches:
        right, wrong = truths[call, None], truths[call, row.formula]
        if row.formula and not rows[call].raises and not _differs(rows[call], right, wrong):
            raise ExplanationError(f"{row.id} explains nothing: {row.formula} gives the right value of {call}")
    return Expectations(table, matches, truths)


def _differs(row: CallRow, right: CallTruth, wrong: CallTruth) -> bool:
    """Whether a formula gives another value, or the same with twice the noise, as an order of operations does that
    cancels."""
    if _status(compare_call(row, answer_of(row, wrong), right)) is Status.FAIL:
        return True
    return any(np.square(wrong[name].noise).sum() > 4 * np.square(right[name].noise).sum() for name in right)


def _truths(
    table: CallTable, asked: dict[TruthKey, str], cache: Path, note: Callable[[str], None]
) -> dict[TruthKey, CallTruth]:
    """The truths and formula values, from the cache or computed.

    :param asked: each with the id of the row that has the formula.
    :raises ExplanationError: the call's function does not have this formula.
    :raises OracleError: the cached file is unreadable.
    """

    def compute(out: Path) -> None:
        # Imported here, because cached truths are read without torch.
        from candle_mi_parity.coverage.calls_truth import truth_of

        rows, arrays = {row.id: row for row in table.call}, {}
        for index, ((call, formula), owner) in enumerate(asked.items()):
            note(f"truth of direct call {index + 1} of {len(asked)}: {call}")
            try:
                truth = truth_of(rows[call], table, cache, formula)
            except CaseTableError as error:
                raise ExplanationError(f"{owner or FIXTURES / 'calls.toml'}: {error}") from error
            for place, (name, tensor) in enumerate(truth.items()):
                # Of a transposed array safetensors would write the numbers in the order of memory.
                pair = np.ascontiguousarray(np.stack([tensor.value, tensor.noise]))
                arrays[f"{index:04}.{place:03}.{name}"] = pair
        save_file(arrays, out / "truth.safetensors")

    judges = {Path(__file__), Path(__file__).with_name("calls_compare.py")}  # of which no truth depends
    code = digest_files([path for path in Path(__file__).parent.glob("calls*.py") if path not in judges])
    key = content_key(table.digest(), list(asked), code, rules_digest(), library_versions())
    path = publish(cache / "truth" / f"calls-{key}", compute) / "truth.safetensors"
    truths: dict[TruthKey, dict[str, TruthTensor]] = {key: {} for key in asked}
    try:
        arrays = load_file(path)
        for place, pair in sorted(arrays.items()):
            index, _, name = place.split(".", 2)
            truths[list(asked)[int(index)]][name] = TruthTensor(pair[0, ...], pair[1, ...])
    except (OSError, SafetensorError) as error:
        raise OracleError(f"cached truth {path} is unreadable ({error}); delete it") from error
    return dict(truths)


@dataclass(frozen=True)
class JudgedCalls:
    """The answers of one candidate, judged.

    :ivar results: one for each call.
    :ivar answers: arrays of the calls that were answered.
    :ivar lost: why there are no answers; its outcome is ABSENT if none are stored.
    """

    results: list[CaseResult]
    answers: dict[str, Results]
    lost: CaseResult | None = None

    @property
    def direct(self) -> Section:
        """For a run's report."""
        if self.lost is None:
            return Section(CALL, self.results)
        absent = self.lost.outcome is Outcome.ABSENT
        return Section(CALL, skipped=self.lost.error) if absent else Section(CALL, [self.lost])


def judge_source(source: Source, spec: str, held_to: Expectations, cache: Path, out: Path) -> JudgedCalls:
    """Get a candidate's answers and judge them.

    :param spec: the candidate as the user spelt it.
    :param out: the JSON file that a live candidate writes.
    """
    again = command("run", "--only", "calls", "--candidate", spec)
    lost = CaseResult("calls", "calls", held_to.table.digest(), Status.ERROR, again)
    try:
        found = answers(source, held_to.table, cache, out)
        if found.candle_mi != source.identity:
            raise TraceError(f"the calls were answered by candle-mi {found.candle_mi.version}, not by this candidate")
        return judge_calls(found, held_to, again)
    except NotStoredError as error:
        lost.error, lost.failure = str(error), Failure.ABSENT
    except EmitterError as error:
        lost.error, lost.failure = str(error), failure_of(error)
    except TraceError as error:
        lost.error, lost.failure = str(error), Failure.INPUT
    return JudgedCalls([], {}, lost)


def judge_calls(calls: Calls, held_to: Expectations, again: str = "") -> JudgedCalls:
    """One result for each row of the table.

    :param again: the command that repeats them.
    :raises TraceError: another table, other inputs, or a call missing, unknown or answered twice.
    """
    table = held_to.table
    digest = table.digest()
    if calls.case.digest != digest:
        raise TraceError("the calls are of another table; emit them again")
    if calls.inputs_digest != table.inputs_digest():
        raise TraceError("the calls were answered on other inputs than the table's; emit them again")
    counts = Counter(answer.id for answer in calls.calls)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise TraceError(f"calls answered twice: {', '.join(twice)}")
    if wrong := sorted({row.id for row in table.call} ^ set(counts)):
        raise TraceError(f"calls missing or unknown: {', '.join(wrong)}")
    found, known = {answer.id: answer for answer in calls.calls}, held_to.known(calls.candle_mi.version)
    results, arrays = [], {}
    for row in table.call:
        result = CaseResult(f"calls/{row.id}", "calls", digest, Status.FAIL, again)
        answer, cause = found[row.id], known.get(row.id)
        if answer.outcome == "results":
            arrays[row.id] = {each.name: each.array() for each in answer.results}
            _judge_values(result, row, arrays[row.id], held_to, cause)
        elif row.raises and answer.outcome == "error" and answer.error != PANICKED:
            result.status = Status.PASS
        else:
            absent = f"candle-mi {calls.candle_mi.version} has no {row.fn}"
            _judge_refusal(result, absent if answer.outcome == "absent" else answer.error or "", cause)
        results.append(result)
    return JudgedCalls(results, arrays)


def _judge_values(
    result: CaseResult, row: CallRow, got: Results, held_to: Expectations, cause: KnownCall | None
) -> None:
    if row.raises:
        detail = "PyTorch raises, and there are results"
        result.tensors = [TensorResult("results", Status.FAIL, "values", detail=detail)]
    else:
        result.tensors = compare_call(row, got, held_to.truths[row.id, None])
    result.expected, result.status = len(result.tensors), _status(result.tensors)
    if result.status is not Status.FAIL or cause is None:
        return
    if cause.formula is None:
        result.unexplained = f"not {cause.id}: it is not refused"
        return
    # A formula determines which of equal features are kept.
    strict = row.model_copy(update={"ties": False})
    under = compare_call(strict, got, held_to.truths[row.id, cause.formula])
    if _status(under) is Status.PASS:
        ratios = {each.name: each.ratio for each in under}
        change = f"the formula {cause.formula}"
        result.explained = Explained([cause.id], cause.says, change, ratios, cause.remedy)
        result.status = Status.KNOWN
    else:
        first = next(each for each in under if each.status is not Status.PASS)
        size = first.detail or f"{first.ratio:.3g} of 8"
        result.unexplained = f"not {cause.id}: with the formula {cause.formula}, {first.name} differs ({size})"


def _judge_refusal(result: CaseResult, message: str, cause: KnownCall | None) -> None:
    result.error, result.failure = message, Failure.FORWARD
    if cause is None:
        result.unexplained = "this refusal is not known"
    elif not (cause.refuses and re.fullmatch(cause.refuses, message)):
        result.unexplained = f"not {cause.id}: it refuses with another message"
    else:
        result.explained, result.status = Explained([cause.id], cause.says, remedy=cause.remedy), Status.KNOWN


def _status(tensors: list[TensorResult]) -> Status:
    found = {tensor.status for tensor in tensors}
    return next((status for status in (Status.FAIL, Status.UNMEASURED) if status in found), Status.PASS)


def report_outdated(judged: JudgedCalls, held_to: Expectations, identity: CandleMi, result: RunResult) -> None:
    """Report known causes whose calls agree: ``stale`` for the release that they are of, ``gone`` for others."""
    agree = {call.id for call in judged.results if call.outcome is Outcome.AGREES}
    agreeing: dict[str, list[str]] = {}
    needed: set[str] = set()
    for call, row in held_to.known(identity.version).items():
        if f"calls/{call}" in agree:
            agreeing.setdefault(row.id, []).append(f"calls/{call}")
        else:
            needed.add(row.id)
    itself = identity.source == "registry" and identity.version == held_to.release(identity.version)
    if not itself and not held_to.exactly:
        result.gone |= {id: calls for id, calls in agreeing.items() if id not in needed}
        return
    listed = "expected" if held_to.exactly else f"listed for candle-mi {identity.version}"
    result.stale += [
        f"{id} is {listed}, but {', '.join(calls)} agree: remove them or the release"
        for id, calls in agreeing.items()
    ]


def diff_calls(a: JudgedCalls, b: JudgedCalls, held_to: Expectations) -> list[CaseDiff]:
    """Compare the calls one by one; a single line if a side has no answers."""
    if a.lost or b.lost:
        whole = CaseResult("calls", "calls", held_to.table.digest(), Status.PASS, "")
        return [diff_call(a.lost or whole, b.lost or whole, {})]
    found = []
    for row, one, other in zip(held_to.table.call, a.results, b.results, strict=True):
        ours, theirs = a.answers.get(row.id, {}), b.answers.get(row.id, {})
        truth = held_to.truths[row.id, None]
        apart = {name: distance(row, ours[name], theirs[name], truth.get(name)) for name in ours if name in theirs}
        found.append(diff_call(one, other, apart))
    return found
