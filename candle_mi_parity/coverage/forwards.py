"""Forward passes as people run them: without captures, with one, after other prompts, on a model loaded otherwise.

A case's trace captures every hook point, and that trace is what is compared with PyTorch. Here candle-mi is compared
with itself: a new process makes other forwards of a case, and the bytes of their logits and captures must be those of
the trace. Only digests travel, and the values of logits that differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.requests import TIMEOUT_SECONDS, request
from candle_mi_parity.candidate.sources import LiveSource, Made, Source
from candle_mi_parity.compare.run_result import Section
from candle_mi_parity.compare.verdict import CaseResult, Failure, Status, TensorResult
from candle_mi_parity.coverage.forwards_reply import Answered, Document
from candle_mi_parity.errors import ParityError, TraceError
from candle_mi_parity.files.untrusted import read_json, validated
from candle_mi_parity.judge.case import failure_of
from candle_mi_parity.models.checkpoint import weight_files
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.hook_points import place
from candle_mi_parity.spec.paths import command
from candle_mi_parity.trace.release import trace_name
from candle_mi_parity.trace.trace import Tensors, Trace

REQUESTS = 10
"""A case is asked again at the end, when the process has answered at least this number of requests."""
MOST = 6
"""Largest number of failing cases that are asked alone."""
LANES: tuple[tuple[str, ...], ...] = ((), ("mmap",))
"""Features of candle-mi with which from_pretrained is asked; a lane, which needs a build, in whole runs only."""
LARGE, LONG = 64 << 20, 256
"""Bytes of weights, and tokens of a prompt, from which on a case has few forwards, because each takes long."""


@dataclass(frozen=True)
class Forward:
    """One forward pass of a case.

    :ivar name: as in ``llama/hub without captures``.
    :ivar captures: the hook points that are captured.
    :ivar tokens: other token ids [B][T], which are run without edits; None for those of the case.
    :ivar edited: whether the edits of the case are made, and its recurrence.
    :ivar anew: whether the model is loaded from its files before.
    :ivar like: the forward before it whose logits it must have; ``""`` for the trace, None if there is none yet.
    :ivar loader: how the model is loaded; None for as in the case.
    """

    name: str
    captures: list[str] = field(default_factory=list)
    tokens: list[list[int]] | None = None
    edited: bool = True
    anew: bool = False
    like: str | None = ""
    loader: str | None = None

    def row(self) -> dict[str, object]:
        """For the request."""
        return {key: value for key, value in asdict(self).items() if key != "like"}


def plain(made: Made, alone: bool) -> list[Forward]:
    """The forwards of a case without edits.

    :param alone: whether each hook point is captured alone, after all were captured.
    """
    hooks, other = made.subject.captures, _other_ids(made)
    length = [row[:-1] or row * 2 for row in other]
    return [
        *([Forward("with all captures", hooks)] if alone else []),
        Forward("without captures"),
        *(Forward(f"capturing {hook} alone", [hook]) for hook in hooks if alone),
        Forward("of other ids", [], other, False, like=None),
        Forward("of another length", [], length, False, like=None),
        Forward("after other ids", hooks),
        Forward("of another length, model loaded anew", [], length, False, True, "of another length"),
        Forward("after another length"),
        Forward("of other ids again", [], other, False, like="of other ids"),
    ]


def costly(made: Made) -> list[Forward]:
    """The forwards of a case with a large model or a long prompt: as few, and one of them short."""
    few = [row[:8] for row in _other_ids(made)]
    other = Forward("of other ids", [], few, False, like=None)
    return [Forward("without captures"), other, Forward("after other ids")]


def _other_ids(made: Made) -> list[list[int]]:
    """As many ids, all in the vocabulary and others but for the first and last, by which a prompt might be told."""
    return [
        [id if len(row) > 2 and place in (0, len(row) - 1) else id - 1 if id else 1 for place, id in enumerate(row)]
        for row in made.subject.tokens
    ]


def edited(made: Made) -> list[Forward]:
    """The forwards of a case with edits or a recurrence."""
    hooks, changed = made.subject.captures, {edit.hook for edit in made.subject.case.edits}
    return [
        Forward("without its edits", edited=False, like=None),
        Forward("with all captures", hooks),
        Forward("without capturing the edited point", [hook for hook in hooks if hook not in changed]),
        Forward("without captures"),
        Forward("without its edits again", edited=False, like="without its edits"),
    ]


def at_the_end(made: Made) -> list[Forward]:
    """The forwards that are made when the process has answered many requests."""
    return [Forward("at the end", made.subject.captures), Forward("at the end without captures")]


def plan(traces: Iterable[Made]) -> list[tuple[Made, list[Forward]]]:
    """What the process is asked, in order: the cases in the reverse order of the run, then some of them again.

    A plain case stands for all of its model, dtype and shape of prompt, and a large one for all of its architecture.
    The first of each architecture captures each hook point alone. The first of each architecture and of each shape of
    prompt, by dtype, is asked again at the end: what a cache keeps of it may have gone by then.
    """
    found: list[tuple[Made, list[Forward]]] = []
    last: list[tuple[Made, list[Forward]]] = []
    seen: set[object] = set()
    for made in traces:
        subject, ids = made.subject, made.subject.tokens
        size = sum(file.stat().st_size for file in weight_files(subject.model_dir))
        kind = (subject.model_type, subject.case.dtype)
        same = (*kind, size) if size >= LARGE else (*kind, subject.model_digest, len(ids), len(ids[0]))
        if subject.case.changed:
            found.append((made, edited(made)))
        elif same in seen:
            continue
        elif size >= LARGE or len(ids[0]) >= LONG:
            found.append((made, costly(made)))
            seen.add(same)
            if size >= LARGE:
                continue
        else:
            found.append((made, plain(made, subject.model_type not in seen)))
            seen |= {same, subject.model_type}
        kinds = {kind, (len(ids), len(ids[0]), subject.case.dtype)}
        if kinds - seen:
            last.append((made, at_the_end(made)))
            seen |= kinds
    times = -(-(REQUESTS - len(found)) // len(last)) if last else 1
    return [*reversed(found), *last * max(1, times)]


def through_pretrained(traces: Iterable[Made], features: tuple[str, ...]) -> list[tuple[Made, list[Forward]]]:
    """The case of each architecture with the most bytes of weights once more, loaded by ``MIModel::from_pretrained``.

    Of equally many bytes it is the first case. What costs much is left out.

    :param features: of candle-mi; without ``mmap`` it refuses several files of weights.
    """
    found: dict[tuple[str, bool], tuple[int, Made]] = {}
    for made in traces:
        subject, files = made.subject, weight_files(made.subject.model_dir)
        case, size = subject.case, sum(file.stat().st_size for file in files)
        plain = (case.loader, case.dtype) == ("hf", "float32") and not case.changed
        small = size < LARGE and len(subject.tokens[0]) < LONG
        kind = (subject.model_type, len(files) > 1)
        if plain and small and (len(files) == 1 or "mmap" in features) and size > found.get(kind, (-1, made))[0]:
            found[kind] = (size, made)
    name = " ".join(["through from_pretrained", *(f"with {feature}" for feature in features)])
    return [(made, [Forward(name, made.subject.captures, loader="pretrained")]) for _, made in found.values()]


def judge_forwards(source: Source, cases: list[Case], spec: str, out: Path, whole: bool) -> Section:
    """Make the forwards of cases of which the source has just made a trace, and compare them.

    :param spec: the candidate as the user spelt it.
    :param out: the directory of the emitter's answers.
    :param whole: whether all cases were run, so that it is an error if none left a trace.
    """
    if not isinstance(source, LiveSource):
        return Section(
            "other forward", skipped="only a candle-mi that is built can be asked for more than its traces"
        )
    if source.device != "cpu":
        return Section("other forward", skipped=f"equality to the bit is asked on the CPU, not on {source.device}")
    traces = [source.made[case.id] for case in cases if case.id in source.made]
    asked = plan(traces)
    if not asked:
        none = "no case left a trace"
        lost = CaseResult("forwards", "forwards", "", Status.ERROR, command("run", "--candidate", spec), error=none)
        return Section("other forward", [lost]) if whole else Section("other forward", skipped=none)
    results: dict[str, CaseResult] = {}

    def result_of(made: Made) -> CaseResult:
        case = made.subject.case
        again = command("run", "--candidate", spec, "--cases", case.id)
        blank = CaseResult(f"forwards/{case.id}", case.family, made.subject.digest, Status.PASS, again)
        return results.setdefault(case.id, blank)

    source.emitter.restart()
    for made, forwards in asked:
        _make(source, made, forwards, out, result_of(made))
    _tell_state(source, asked, results, spec, out)
    for features in LANES if source.reads_directories else ():
        for made, forwards in through_pretrained(traces, features) if whole or not features else ():
            _make(source, made, forwards, out, result_of(made), features)
    made_of = [results[case.id] for case in cases if case.id in results]
    return Section("other forward", made_of, of_tensors=True)


def _make(
    source: LiveSource,
    made: Made,
    forwards: list[Forward],
    out: Path,
    result: CaseResult,
    features: Sequence[str] = (),
) -> None:
    """Have the forwards made with more features than the case needs, and add what they give to the case's result."""
    features = [*made.subject.case.features, *features]
    try:
        found = judge(made, forwards, ask(source.emitter_with(features), made, forwards, out, features))
    except EmitterError as error:
        failure = failure_of(error)
        # A lane that cannot be built is an ERROR of the cases that need it, and not of every other one.
        if failure in (Failure.ABSENT, Failure.NOT_BUILT) and features != made.subject.case.features:
            result.notes.append(f"not asked {forwards[0].name}: {error.message}")
            return
        _fail(result, f"{made.subject.case.id} in a new process: {error}", failure)
        result.expected += len(forwards)
    except TraceError as error:
        _fail(result, str(error), Failure.INPUT)
        result.expected += len(forwards)
    else:
        result.tensors += found
        result.expected += len(found)
        for tensor in found:
            if tensor.status is Status.FAIL:
                _fail(result, tensor.detail)


def _tell_state(
    source: LiveSource, asked: list[tuple[Made, list[Forward]]], results: dict[str, CaseResult], spec: str, out: Path
) -> None:
    """Ask the first failing cases once more, each alone in a new process: a fault of state is told as such."""
    failing: dict[str, tuple[Made, list[Forward]]] = {}
    for made, forwards in asked:
        if results[made.subject.case.id].status is Status.FAIL:
            failing.setdefault(made.subject.case.id, (made, forwards))
    for id, (made, forwards) in list(failing.items())[:MOST]:
        result = results[id]
        alone = replace(result, status=Status.PASS, tensors=[])
        source.emitter_with(made.subject.case.features).restart()
        _make(source, made, forwards, out, alone)
        if alone.status is Status.PASS:
            result.notes.append("only after other requests in one process: alone in a new one all its forwards agree")
            result.reproduce = command("run", "--candidate", spec, "--only", "traces")


def _fail(result: CaseResult, error: str, failure: Failure | None = None) -> None:
    """Keep the first error; what is of no use says nothing of candle-mi and is an ERROR."""
    if result.status is Status.PASS:
        result.error, result.failure = error, failure
        result.status = Status.ERROR if failure is Failure.INPUT else Status.FAIL


class Answer(Tensors):
    """The answer to one request.

    :param features: of candle-mi in the build that answered, beside those of the trace.
    :raises TraceError: the file is malformed, of another candidate, case or model than the trace, or it answers other
        forwards than those that were asked.
    """

    def __init__(self, path: Path, made: Made, forwards: list[Forward], features: Sequence[str] = ()) -> None:
        document = validated(Document, read_json(path, TraceError), path, TraceError)
        super().__init__(path, document.tensors)
        self.forwards = document.forwards
        theirs, ours = document.header.model_dump(), made.header.model_dump()
        ours["features"] = sorted({*ours["features"], *features})
        if other := [key for key in ours if theirs[key] != ours[key]]:
            raise TraceError(f"{path}: {other[0]} is {theirs[other[0]]}, and of the trace {ours[other[0]]}")
        if [each.name for each in self.forwards] != [forward.name for forward in forwards]:
            raise TraceError(f"{path}: its forwards are not those that were asked")
        for each, forward in zip(self.forwards, forwards, strict=True):
            if each.logits is not None and set(each.captures) != set(forward.captures):
                raise TraceError(f"{path}: captures of the forward {each.name} are not those that were asked")

    def values(self, digest: str, made: Made) -> np.ndarray:
        """The logits of a digest, from the answer or from the trace.

        :raises TraceError: neither holds them any longer.
        """
        if digest == made.digests["logits"]:
            trace = Trace(made.path)
            if trace.entries["logits"].sha256 != digest:
                raise TraceError(f"{made.path} was overwritten")
            return trace.tensor("logits")
        held = {entry.sha256: name for name, entry in self.entries.items()}
        if digest not in held:
            raise TraceError(f"{self.path} does not hold them")
        return self.tensor(held[digest])


def ask(
    emitter: EmitterProcess, made: Made, forwards: list[Forward], out: Path, features: Sequence[str] = ()
) -> Answer:
    """Have the forwards of a case made.

    :param features: see :class:`Answer`.
    :raises EmitterError: the emitter refused the request, crashed or hung.
    :raises TraceError: see :class:`Answer`.
    """
    path = out.resolve() / f"{trace_name(made.subject.case.id, 'free')}.json"
    of_trace = request(made.subject, "free", made.inputs, path, made.header.device)
    kept = ("case", "model_dir", "tokens", "dtype", "device", "sae", "inputs", "edits", "recurrent", "out")
    asked = {
        "format": "candle-mi-parity/forward/1",
        "forwards": [{**row, "loader": row["loader"] or of_trace["loader"]} for row in (f.row() for f in forwards)],
        "known": [made.digests["logits"]],
        **{key: of_trace[key] for key in kept if key in of_trace},
    }
    return Answer(emitter.emit(asked, TIMEOUT_SECONDS), made, forwards, features)


def judge(made: Made, forwards: list[Forward], answer: Answer) -> list[TensorResult]:
    """One result for each forward that has something to be equal to, or that failed."""
    logits = {"": made.digests["logits"]}
    results = []
    for forward, given in zip(forwards, answer.forwards, strict=True):
        name, why = _difference(made, forward, given, logits, answer)
        if why:
            detail = f"{made.subject.case.id} {forward.name}: {why}"
            results.append(TensorResult(f"{name} {forward.name}", Status.FAIL, "bits", detail=detail, exact=True))
        elif forward.like is not None:
            compared = 1 + len(forward.captures)
            results.append(TensorResult(forward.name, Status.PASS, compared=compared, exact=True))
        if forward.like is None and given.logits is not None:
            logits[forward.name] = given.logits
    return results


def _difference(
    made: Made, forward: Forward, given: Answered, logits: dict[str, str], answer: Answer
) -> tuple[str, str]:
    """The first tensor of a forward that is wrong, and why; two empty strings if none is.

    :param logits: digests of the logits of the trace and of the forwards that others are to be equal to.
    """
    if given.logits is None:
        return "logits", given.error or ""
    if forward.like is None:
        own = forward.tokens is not None and given.logits == logits[""]
        return "logits", "the logits are those of the case's own ids" if own else ""
    if (expected := logits.get(forward.like)) is None:
        return "logits", f"nothing can be compared, because the forward {forward.like} failed"
    if given.logits != expected:
        reference = f"the forward {forward.like}" if forward.like else "the captured forward"
        return "logits", f"logits differ from those of {reference} ({_first(answer, made, given.logits, expected)})"
    if other := [hook for hook in forward.captures if given.captures[hook] != made.digests[hook]]:
        return other[0], f"{other[0]} differs from that of the captured forward"
    return "", ""


def _first(answer: Answer, made: Made, digest: str, expected: str) -> str:
    """``first at batch 0, position 17, token 4: -1.23 against 0.5; 96 of 2376``."""
    try:
        got, wanted = answer.values(digest, made), answer.values(expected, made)
    except ParityError as error:
        return f"the values cannot be shown: {error}"
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{got.dtype}{list(got.shape)} against {wanted.dtype}{list(wanted.shape)}"
    bits = f"<u{got.itemsize}"
    places = np.argwhere(np.ascontiguousarray(got).view(bits) != np.ascontiguousarray(wanted).view(bits))
    first = tuple(int(index) for index in places[0])
    values = f"{got[first]:.9g} against {wanted[first]:.9g}"
    return f"first at {place('logits', list(first))}: {values}; {len(places)} of {got.size}"
