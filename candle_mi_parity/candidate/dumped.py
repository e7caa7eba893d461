"""The source for tensors that a user's program dumped, see :mod:`candle_mi_parity.trace.dump`."""

from __future__ import annotations

from pathlib import Path

from candle_mi_parity.candidate.sources import NotStoredError, StatelessSource
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.dump import Dump, as_trace
from candle_mi_parity.trace.trace import CandleMi, InMemory
from candle_mi_parity.trace.truth import Truth


class DumpSource(StatelessSource):
    """One prompt's tensors.

    :param release: the candle-mi whose known divergences are tried first, in any combination, as for a build from
        source.
    """

    def __init__(self, dump: Dump, release: str) -> None:
        self._dump = dump
        self.identity = CandleMi(version=release, source="path", checksum=None, revision=None, tree_digest=None)

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        """:raises TraceError: a tensor has another shape, or the mode is teacher-forced."""
        if mode != "free":
            raise NotStoredError("a dump holds one run of the whole model only")
        return as_trace(self._dump, truth, subject.case.dtype)
