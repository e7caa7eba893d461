"""A source that keeps its traces for later use and may capture some of the hooks only."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from pathlib import Path

from candle_mi_parity.candidate.sources import Source, StatelessSource
from candle_mi_parity.candidate.tokens import TextIds
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import Emitted
from candle_mi_parity.trace.truth import Truth


@dataclass(frozen=True)
class Seen:
    """Both sides of a case's free run."""

    subject: PreparedCase
    truth: Truth
    emitted: Emitted


class WatchedSource(StatelessSource):
    """Wraps another source, which is open.

    :param hooks: globs; only matching hooks and the logits are captured and judged. Empty for all hooks.
    :ivar seen: case id → both sides of the comparison.
    """

    def __init__(self, source: Source, hooks: tuple[str, ...] = ()) -> None:
        self._source, self._hooks = source, hooks
        self.device, self.identity = source.device, source.identity
        self.seen: dict[str, Seen] = {}

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Emitted:
        """The trace of the wrapped source.

        :raises CaseTableError: no hook matches.
        """
        wanted = self.wanted(subject.captures)
        # A teacher-forced run replaces the residual at every half-layer, whichever hooks are captured.
        asked = subject if mode == "forced" else replace(subject, captures=wanted)
        emitted = self._source.trace(asked, mode, truth, inputs)
        left_out = set(subject.captures) - set(wanted)
        if left_out:
            names = {name for name in truth.tensors if name.removeprefix("lens.") not in left_out}
            emitted.asked = names if emitted.asked is None else names & emitted.asked
        if mode == "free":
            self.seen[subject.case.id] = Seen(subject, truth, emitted)
        return emitted

    def text_ids(self, subject: PreparedCase) -> TextIds:
        """The ids of the wrapped source."""
        return self._source.text_ids(subject)

    def wanted(self, captures: list[str]) -> list[str]:
        """The hooks to be captured, in execution order."""
        if not self._hooks:
            return captures
        found = [name for name in captures if any(fnmatch.fnmatchcase(name, glob) for glob in self._hooks)]
        if not found:
            raise CaseTableError(f"no hook of this model matches {', '.join(self._hooks)}; they are as {captures[1]}")
        return found
