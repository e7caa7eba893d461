"""The auto-config census: what candle-mi does with every causal language model that transformers has.

Each class for which a tiny model can be made is read by its family's own parser (``from_hf_config``) or, if that does
not know the model type, by ``from_hf_config_auto``. The outcome is one of:

``refused``    candle-mi raises an error.
``same``       it computes what transformers computes, by the gate.
``different``  it loads the model without an error and computes something else.
``not-asked``  unknown: there is no tiny model or no truth, or candle-mi crashed.

``config.json`` has the rotary base at its top level (dialect ``hub``), because candle-mi does not read the spelling
of transformers 5; sliding windows are longer than the prompt.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.compare.compare import check_header, compare
from candle_mi_parity.coverage.auto_config import emit_class, judged
from candle_mi_parity.coverage.census_models import Tiny, load_table, mapped_classes, tiny_model
from candle_mi_parity.coverage.census_record import FORMAT, Census, Entry, Reader, count
from candle_mi_parity.coverage.census_truth import truth_of
from candle_mi_parity.coverage.unmapped import unmapped_subject
from candle_mi_parity.errors import CensusError, ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.isolated import Lost, each
from candle_mi_parity.models.prepared_case import PreparedCase, random_tokens
from candle_mi_parity.spec.cases import Case, LocalModel, RandomTokens
from candle_mi_parity.trace.trace import CandleMi, Trace
from candle_mi_parity.trace.truth import Truth

TOKENS = RandomTokens(random=24)
SECONDS = 60.0
"""Time limit for one class."""
WORKERS = 2


def take_census(
    binary: Path, identity: CandleMi, pattern: str, cache: Path, out: Path, progress: Callable[[Entry, int], None]
) -> Census:
    """Ask an emitter about every class whose model type matches a glob.

    :param out: where the emitter writes its traces.
    :param progress: called with each entry as it is known, and the number of classes.
    :raises CensusError: no model type matches.
    """
    names = {name: kind for name, kind in mapped_classes().items() if fnmatch.fnmatchcase(name, pattern)}
    if not names:
        raise CensusError(f"no causal language model of transformers {transformers.__version__} matches {pattern!r}")
    out.mkdir(parents=True, exist_ok=True)
    items = [(name, kind, binary, identity, cache, out.resolve()) for name, kind in names.items()]
    entries = []
    for (name, kind), answer in zip(names.items(), each(ask_class, items, WORKERS, SECONDS), strict=True):
        if isinstance(answer, Lost) and answer.code is not None and answer.code >= 0:
            # Errors of a class are caught in its process, so that this one is a bug of the census.
            raise CensusError(f"{name}: the census process ended with code {answer.code}")
        if isinstance(answer, Lost):
            why = f"its process was killed, or took more than {SECONDS:g} s"
            entry = Entry(model_type=name, class_name=kind, outcome="not-asked", reason=why)
        else:
            entry = Entry.model_validate(answer)
        progress(entry, len(names))
        entries.append(entry)
    return Census(
        format=FORMAT,
        candle_mi=identity,
        transformers=transformers.__version__,
        counts=count(entries),
        classes=entries,
    )


def ask_class(
    model_type: str, class_name: str, binary: Path, identity: CandleMi, cache: Path, out: Path
) -> dict[str, object]:
    """The entry of one class, as JSON-ready data; runs in a process of its own."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with EmitterProcess(binary) as emitter:
        return Question(model_type, class_name, emitter, identity, cache, out).ask().model_dump()


@dataclass(frozen=True)
class Question:
    """What candle-mi makes of one class.

    :ivar out: where the emitter writes its traces.
    :ivar seconds: time limit for one answer of the emitter.
    """

    model_type: str
    class_name: str
    emitter: EmitterProcess
    identity: CandleMi
    cache: Path
    out: Path
    seconds: float = SECONDS

    def ask(self) -> Entry:
        """The entry of the class; never raises."""
        entry = Entry(model_type=self.model_type, class_name=self.class_name, outcome="not-asked")
        try:
            tiny = tiny_model(entry.model_type, self.cache)
            entry = entry.model_copy(update={"dialect": tiny.dialect})
            subject = subject_of(entry.model_type, tiny, self.cache)
            try:
                reader = self.reader(subject)
            except EmitterError as error:
                return self._unanswered(entry, error, tiny)
            entry = entry.model_copy(update={"reader": reader})
            truth = truth_of(subject, self.cache)
            return self.judge(entry, subject, reader, truth)
        except Exception as error:  # whatever the class's own code raises is its line in the table
            loads = "candle-mi computes it, unjudged: " if entry.reader else ""
            return entry.model_copy(update={"reason": loads + reason(error)})

    def reader(self, subject: PreparedCase) -> Reader:
        """candle-mi's parser that reads the model: ``auto`` only if ``hf`` does not know the model type.

        :raises EmitterError: neither can read it.
        """
        try:
            self.emit(subject, "hf")
        except EmitterError as error:
            if "unsupported model_type" not in error.message:
                raise
            self.emit(subject, "auto")
            return "auto"
        return "hf"

    def emit(self, subject: PreparedCase, reader: Reader) -> Trace:
        """The hooks of a subject's captures, and the logits.

        :raises EmitterError: candle-mi refuses, or gives no clear answer.
        """
        out = self.out / f"{subject.model_type}.json"
        return emit_class(self.emitter, self.identity, subject, reader, out, seconds=self.seconds)

    def judge(self, entry: Entry, subject: PreparedCase, reader: Reader, truth: Truth) -> Entry:
        captures = [name for name in truth.tensors if name != "logits"]
        trace = self.emit(replace(subject, captures=captures), reader)
        check_header(truth, trace, None)
        return judged(entry, compare(truth, trace, None, None), truth, trace)

    @staticmethod
    def _unanswered(entry: Entry, error: EmitterError, tiny: Tiny) -> Entry:
        """``model`` and ``forward`` are candle-mi's own errors; a panic, crash or time-out says nothing clearly."""
        why = reason(error).replace(str(tiny.directory), "the model")
        if error.kind in ("model", "forward"):
            return entry.model_copy(update={"outcome": "refused", "reason": why})
        return entry.model_copy(update={"reason": f"the emitter gave no clear answer: {why}"})


def subject_of(model_type: str, tiny: Tiny, cache: Path) -> PreparedCase:
    """What both sides are given of a class."""
    [tokens] = random_tokens(TOKENS, int(load_table().shrink["vocab_size"]))  # type: ignore[arg-type]
    model = LocalModel(source="local", path=str(tiny.directory))
    case = Case(id=f"census/{model_type}", model=model, tokens=tokens)
    return replace(unmapped_subject(case, cache), model_type=model_type)


def reason(error: BaseException) -> str:
    """The message of an exception in one line of at most 240 characters."""
    return one_line(str(error) if isinstance(error, ParityError) else f"{type(error).__name__}: {error}", 240)
