"""Sources of traces: a running emitter or a stored release."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, Self

from pydantic import ValidationError

from candle_mi_parity.candidate import cuda
from candle_mi_parity.candidate.branches import Branches
from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.parts import LANES
from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.program import ProgramSource, require_transformer_lens
from candle_mi_parity.candidate.requests import TIMEOUT_SECONDS, check_id, opened, request
from candle_mi_parity.candidate.spelling import Candidate, CandidateError, OutOfReachError, stored_index
from candle_mi_parity.candidate.tokens import TextIds, stored_text_ids, text_ids
from candle_mi_parity.compare.compare import check_header
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.models.indexed import read_digest
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import OUTPUTS
from candle_mi_parity.trace.release import Refusal, StoredRelease, text_name, trace_name
from candle_mi_parity.trace.trace import TOP_LOGITS, CandleMi, Emitted, Header, TensorEntry, Trace
from candle_mi_parity.trace.truth import Truth


class Source(Protocol):
    """Yields a candidate's traces.

    :ivar identity: the candle-mi that made the traces; None if unknown.
    :ivar device: where they are computed, which decides the noise they are judged with.
    """

    @property
    def device(self) -> str: ...

    @property
    def identity(self) -> CandleMi | None: ...

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Emitted:
        """The trace of a case, after its header was checked against the truth.

        :param inputs: the file of input tensors.
        """
        ...

    def text_ids(self, subject: PreparedCase) -> TextIds:
        """The token ids that the candidate's own tokenizer gives for the text of a case."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class NotStoredError(TraceError):
    """Nothing is stored for a case."""


class StatelessSource:
    """A base for sources without resources or a tokenizer, on the CPU by default."""

    device = "cpu"

    def text_ids(self, subject: PreparedCase) -> TextIds:
        return TextIds()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def open_source(
    candidate: Candidate,
    cache: Path,
    out: Path,
    log: Callable[[str], None],
    device: str = "cpu",
    counted: bool = False,
) -> Source:
    """The source of a candidate, which is built if necessary.

    :param device: ``cpu`` or ``cuda:N``; on CUDA the emitter is built with candle's kernels and needs nvcc.
    :param out: the directory for the traces of an emitter.
    :param counted: whether a build counts which branches of candle-mi are taken.
    :raises CandidateError: it cannot be built, or no traces are stored.
    :raises OutOfReachError: the device, nvcc or the network is missing.
    """
    refuse_device(candidate, device)
    if reason := cuda.missing(device):
        raise OutOfReachError(reason)
    if candidate.kind == "torch":
        from candle_mi_parity.candidate.torch_source import TorchSource

        return TorchSource(device)
    if candidate.kind == "stored":
        return StoredSource(stored_index(candidate, OUTPUTS))
    if candidate.kind == "transformer-lens":
        require_transformer_lens()
    if candidate.kind in ("command", "transformer-lens"):
        return ProgramSource(candidate, out, device)
    return LiveSource(candidate, cache, out, log, device, counted)


def refuse_device(candidate: Candidate, device: str) -> None:
    """:raises CandidateError: the device is misspelt, or the candidate is stored and the device is not the CPU."""
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise CandidateError(f"unknown device {device!r}: expected cpu or cuda:N")
    if candidate.kind == "stored" and device != "cpu":
        raise CandidateError(f"{candidate.spec} was emitted on a CPU; --device {device} needs a build")


@dataclass(frozen=True)
class Made:
    """What an emitter was asked for a case, and the trace that it made.

    :ivar inputs: the file of input tensors.
    :ivar digests: SHA-256 of each tensor's bytes.
    """

    subject: PreparedCase
    inputs: Path
    path: Path
    header: Header
    digests: dict[str, str]


class LiveSource:
    """An emitter, built or taken from the cache, one process for all cases.

    :ivar made: the latest trace of each case's whole forward, by the case's id.
    :ivar seconds: time limit of one trace.
    :ivar branches: which branches of candle-mi were taken; None where the build does not count them.
    :ivar emitter: of the build without lanes, see :mod:`parts`.
    """

    seconds = TIMEOUT_SECONDS

    def __init__(
        self,
        candidate: Candidate,
        cache: Path,
        out: Path,
        log: Callable[[str], None],
        device: str,
        counted: bool = False,
    ) -> None:
        self._cuda = ("cuda",) if device.startswith("cuda") else ()
        self._build = partial(build, candidate, cache, log)
        built = self._build(self._cuda, counted=counted)
        self.device = device
        try:
            self.identity = CandleMi.model_validate(built.identity.get("candle_mi"))
        except ValidationError as error:
            raise CandidateError(f"{built.path} does not say which candle-mi it holds") from error
        self._out = out.resolve()
        self._built = built
        self.branches: Branches | None = None
        if counted:
            self._out.mkdir(parents=True, exist_ok=True)
            self.branches = Branches(built.path, self._out / "counters.profraw")
        self.emitter = self._process()
        self._lanes: dict[tuple[str, ...], EmitterProcess | EmitterError] = {}
        self._asked: list[str] = []
        self.made: dict[str, Made] = {}

    def _process(self) -> EmitterProcess:
        environment = self.branches.environment if self.branches is not None else {}
        return EmitterProcess(self._built.path, self._built.missing, environment, self._built.absent)

    def emitter_with(self, features: Sequence[str]) -> EmitterProcess:
        """The emitter of the build that has some features of candle-mi, which is built at first use.

        :raises EmitterError: the candidate does not have them, or they do not compile.
        """
        if absent := [feature for feature in features if feature in self._built.absent]:
            raise EmitterError("absent", f"candle-mi {self.identity.version} has no feature {absent[0]}")
        if broken := [feature for feature in features if feature in self._built.missing]:
            raise EmitterError("not-built", f"feature {broken[0]}: {self._built.missing[broken[0]]}")
        lanes = tuple(sorted(feature for feature in features if feature in LANES))
        if not lanes:
            return self.emitter
        if lanes not in self._lanes:
            self._lanes[lanes] = self._lane(lanes)
        if isinstance(held := self._lanes[lanes], EmitterError):
            raise held
        return held

    def _lane(self, lanes: tuple[str, ...]) -> EmitterProcess | EmitterError:
        try:
            built = self._build((*self._cuda, *lanes))
        except CandidateError as error:  # to build it again for the next case would take minutes
            return EmitterError("not-built", f"with {', '.join(lanes)}: {error}")
        return EmitterProcess(built.path, built.missing, absent=built.absent)

    @property
    def reads_directories(self) -> bool:
        """Whether from_pretrained reads a directory in place of a repository: the downloader is replaced."""
        return bool(self._built.identity.get("patched"))

    @property
    def built_with(self) -> str:
        """The features of candle-mi in this build, and the crates that are not as published."""
        features, patched = (self._built.identity.get(key) for key in ("features", "patched"))
        text = f"features {', '.join(map(str, features))}" if isinstance(features, list) else ""
        if isinstance(patched, list) and patched:
            text += f"; {', '.join(map(str, patched))}, which downloads, is replaced by one that reads directories"
        return text

    @property
    def missing(self) -> Mapping[str, str]:
        """Parts of the emitter that do not compile against the candidate, and their first error."""
        return self._built.missing

    @property
    def build_key(self) -> str:
        """Identifies everything that the emitter was built from."""
        return self._built.path.parent.name

    def fresh(self) -> LiveSource:
        """The same build in a process of its own, which has answered nothing yet."""
        other = copy.copy(self)
        other.emitter, other._asked, other._out = (
            self._process(),
            [],
            self._out / "alone",
        )
        other.made, other._lanes = {}, {}
        return other

    def asked_before(self, case_id: str) -> list[str]:
        """The cases that were asked before a case for the first time, in that order."""
        return self._asked[: self._asked.index(case_id)] if case_id in self._asked else []

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Trace:
        """Emit and open the trace.

        :raises EmitterError: the emitter refused, failed, crashed or hung.
        :raises TraceError: what it wrote is not a trace of this candidate.
        """
        out = self._out / f"{trace_name(subject.case.id, mode)}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        if subject.case.id not in self._asked:
            self._asked.append(subject.case.id)
        emitter = self.emitter_with(subject.case.features)
        try:
            path = emitter.emit(request(subject, mode, inputs, out, self.device), self.seconds)
        except EmitterError as error:
            # Where the model lies is no part of an answer.
            raise EmitterError(error.kind, error.message.replace(f"{subject.given}/", "")) from error
        trace = same_candidate(opened(path, subject, truth, inputs, self.device, read_digest(subject)), self.identity)
        if lacking := set(subject.case.features) - set(trace.header.features):
            raise TraceError(f"{trace.path}: made without the feature {sorted(lacking)[0]}")
        if mode == "free":
            digests = {entry.name: entry.sha256 for entry in trace.entries.values()}
            self.made[subject.case.id] = Made(subject, inputs, trace.path, trace.header, digests)
        return trace

    def text_ids(self, subject: PreparedCase) -> TextIds:
        """Have candle-mi tokenise the text.

        :raises ParityError: see :func:`tokens.text_ids`.
        """
        case = subject.case
        assert case.text is not None
        out = self._out / f"{text_name(case.id)}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        return text_ids(self.emitter_with(case.features), self.identity, subject.given, case.text, out, case.loader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.emitter.close()
        for lane in self._lanes.values():
            if isinstance(lane, EmitterProcess):
                lane.close()


class StoredSource(StatelessSource):
    """The traces of a stored release.

    :param index: see :mod:`candle_mi_parity.trace.release`.
    """

    def __init__(self, index: Path) -> None:
        self.stored = StoredRelease(index)
        self.identity = self.stored.release.candle_mi

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Trace:
        """Open the stored trace.

        :raises EmitterError: the stored outcome is a refusal.
        :raises TraceError: nothing is stored, or the trace is of another candidate or case.
        """
        found = self.stored.trace(subject.case.id, mode)
        if found is None:
            raise NotStoredError(f"nothing is stored for {subject.case.id} ({mode}) in {self.stored.index}")
        if isinstance(found, Refusal):
            if found.case != subject.digest:
                raise TraceError(f"{self.stored.index}: the refusal of {subject.case.id} is of another case")
            raise EmitterError(found.kind, found.error)
        trace = same_candidate(found, self.identity)
        for entry in trace.entries.values():
            if (entry.part is None) != (subject.case.stored == "whole") or not _kept_as_stored(entry):
                raise TraceError(f"{trace.path}: {entry.name} is not kept as this case is ({subject.case.stored})")
        if trace.header.device != "cpu":
            raise TraceError(f"{trace.path}: made on {trace.header.device}, expected cpu")
        check_header(truth, trace, file_digest(inputs), read_digest(subject))
        check_id(trace, subject)
        return trace

    def text_ids(self, subject: PreparedCase) -> TextIds:
        """Read the stored ids.

        :raises TraceError: they are of something else.
        """
        assert subject.case.text is not None
        return stored_text_ids(self.stored, subject.case.id, subject.case.text, subject.model_dir)


def _kept_as_stored(entry: TensorEntry) -> bool:
    """Whether the part is the one that :mod:`store` keeps; any other could leave out a divergence."""
    part = entry.part
    if part is None:
        return True
    if len(part.shape) < 2 or part.rows != [part.shape[-2] - 1]:
        return False
    if not (entry.name == "logits" or entry.name.startswith("lens")):
        return part.columns is None
    columns = part.columns or []
    return len(columns) == min(TOP_LOGITS, part.shape[-1]) and columns == sorted(set(columns))


def same_candidate(trace: Trace, identity: CandleMi) -> Trace:
    """:raises TraceError: the trace was emitted by another candle-mi."""
    found = trace.header.candle_mi
    if found != identity:
        raise TraceError(
            f"{trace.path}: emitted by candle-mi {found.version} ({found.checksum or found.tree_digest}), "
            f"expected {identity.version} ({identity.checksum or identity.tree_digest})"
        )
    return trace
