"""The source for ``command:PROGRAM ARGS``: any program that answers requests as ``docs/emitter-protocol.md`` says.

:mod:`lens` is such a program, for ``transformer-lens``.
"""

from __future__ import annotations

import shlex
from importlib import metadata
from pathlib import Path
from typing import Self

from candle_mi_parity.candidate.process import EmitterProcess
from candle_mi_parity.candidate.requests import TIMEOUT_SECONDS, opened, request
from candle_mi_parity.candidate.spelling import Candidate, CandidateError
from candle_mi_parity.candidate.tokens import TextIds
from candle_mi_parity.errors import TraceError
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.release import trace_name
from candle_mi_parity.trace.trace import CandleMi, Trace
from candle_mi_parity.trace.truth import Truth

OLDEST_LENS = (4, 3)


def require_transformer_lens() -> None:
    """:raises CandidateError: TransformerLens is not installed, or is too old."""
    remedy = "pip install 'candle-mi-parity[lens]'"
    try:
        found = metadata.version("transformer-lens")
    except metadata.PackageNotFoundError:
        raise CandidateError(f"candidate transformer-lens: TransformerLens is not installed; {remedy}") from None
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_LENS:
        raise CandidateError(
            f"candidate transformer-lens: TransformerLens is {found}, expected 4.3 or later; {remedy}"
        )


def lens_identity() -> CandleMi:
    """The TransformerLens that is installed, as its traces name it."""
    return CandleMi(version=f"TransformerLens {metadata.version('transformer-lens')}", source="program")


class ProgramSource:
    """A process that answers for all cases.

    :ivar identity: of TransformerLens, of which a table says what is known. Nothing is known of any other program, so
        that no divergence is excused: None.
    :ivar seconds: time limit of one trace.
    """

    seconds = TIMEOUT_SECONDS

    def __init__(self, candidate: Candidate, out: Path, device: str) -> None:
        self.device = device
        self._out = out.resolve()
        is_lens = candidate.kind == "transformer-lens"
        self._process = EmitterProcess(
            shlex.split(candidate.target), environment={"HF_HUB_OFFLINE": "1"} if is_lens else {}
        )
        self.identity = lens_identity() if is_lens else None
        self._is = self.identity

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Trace:
        """Have the program write a trace, and open it.

        :raises EmitterError: the program refused, failed, crashed or hung.
        :raises TraceError: what it wrote is no trace of this case, or says of its maker what an earlier one does not.
        """
        out = self._out / f"{trace_name(subject.case.id, mode)}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        path = self._process.emit(request(subject, mode, inputs, out, self.device), self.seconds)
        # A program reads the files that transformers does, where candle-mi may read others.
        trace = opened(path, subject, truth, inputs, self.device, subject.given_digest)
        if unknown := sorted(set(trace.document.absent) - set(subject.captures)):
            raise TraceError(f"{trace.path}: {unknown[0]} is no hook point, and cannot be absent")
        trace.asked = set(truth.tensors) - set(trace.document.absent)
        self._is = self._is or trace.header.candle_mi
        if trace.header.candle_mi != self._is:
            raise TraceError(f"{trace.path}: made by {trace.header.candle_mi}, and earlier traces by {self._is}")
        return trace

    def text_ids(self, subject: PreparedCase) -> TextIds:
        """None: the protocol has no tokenizer, so texts are tokenised by transformers."""
        return TextIds()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()
