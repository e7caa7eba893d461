"""Who answers generated calls: candle-mi through its emitter, or PyTorch in float32 as a control."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import LiveSource
from candle_mi_parity.coverage.calls import TIMEOUT_SECONDS, Answer, Answered, CallRow, CallTable, read_calls
from candle_mi_parity.coverage.calls_compare import Results, answer_of
from candle_mi_parity.coverage.calls_judge import PANICKED
from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.calls_truth import REFUSALS, computation, finish
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.json_out import plain
from candle_mi_parity.trace.truth import TruthTensor

_FAULTS_OF_OURS = ("request", "protocol", "io")


class Callee(Protocol):
    """Answers the only call of a table.

    :param directory: where the table's inputs were written.
    """

    def answer(self, table: CallTable, directory: Path) -> Answered: ...


class Emitted:
    """candle-mi's own functions."""

    def __init__(self, source: LiveSource, out: Path) -> None:
        self._source, self._out = source, out

    def answer(self, table: CallTable, directory: Path) -> Answered:
        """:raises EmitterError: the request was refused, which is a fault of this package.
        :raises TraceError: the answer is to something else.
        """
        (row,) = table.call
        try:
            found = read_calls(self._source.emitter.emit(table.request(directory, self._out), TIMEOUT_SECONDS))
        except EmitterError as error:
            if error.kind in _FAULTS_OF_OURS:
                raise
            return refused(error.message if error.kind in ("sae", "forward") else f"{PANICKED}: {error}")
        if found.candle_mi != self._source.identity or found.case.digest != table.digest():
            raise TraceError(f"{self._out}: the answer is of another candle-mi or to another call")
        if found.inputs_digest != table.inputs_digest() or [each.id for each in found.calls] != [row.id]:
            raise TraceError(f"{self._out}: the answer is to other inputs or to another call")
        return found.calls[0]


class TorchCallee:
    """The functions of :mod:`candle_mi_parity.coverage.calls_truth` in float32, without float64 or noise.

    :param formulas: known wrong formulas that are computed instead.
    """

    def __init__(self, formulas: Collection[Formula] = ()) -> None:
        self._formulas = formulas

    def answer(self, table: CallTable, directory: Path) -> Answered:
        (row,) = table.call
        try:
            once = computation(row, table.arrays(), directory, self._formulas, torch.float32, table)
            values = finish(row, once(), self._formulas)
        except REFUSALS as error:
            return refused(str(error) or type(error).__name__)
        return answered(_results(row, values))


def _results(row: CallRow, values: Named) -> Results:
    found = {name: TruthTensor(value.double().numpy(), np.zeros(value.shape)) for name, value in values.items()}
    if row.fn == "encode_sparse":
        features = found["features"].value
        order = [at for at in np.argsort(-features, kind="stable") if features[at] != 0]
        return {"indices": np.array(order, dtype=np.float64), "values": features[order]}
    return answer_of(row, found)


def answered(results: Results) -> Answered:
    """An answer with results."""
    each = [
        Answer(name=name, shape=list(value.shape), values=plain(value.ravel().tolist()))
        for name, value in results.items()
    ]
    return Answered(id="generated", outcome="results", results=each, error=None)


def refused(message: str) -> Answered:
    """An answer with an error."""
    return Answered(id="generated", outcome="error", results=[], error=message)


def write_inputs(table: CallTable, scratch: Path) -> Path:
    """The directory with the inputs of a table, which replaces that of the last one."""
    directory = scratch / "call"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    table.write(directory, directory)
    return directory
