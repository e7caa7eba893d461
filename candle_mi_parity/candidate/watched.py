"""A source that keeps its traces for further measures, and may be restricted to some hooks."""

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
    """The truth and the trace of a case."""

    subject: PreparedCase
    truth: Truth
    emitted: Emitted


class WatchedSource(StatelessSource):
    """Another, open source.

    Only hooks that match one of ``hooks`` and lie in one of ``layers``, and the logits, are captured and judged.

    :param hooks: globs over hook names; empty for all.
    :param layers: empty for all.
    :ivar seen: case id → what was compared.
    """

    def __init__(self, source: Source, hooks: tuple[str, ...] = (), layers: tuple[int, ...] = ()) -> None:
        self._source, self._hooks, self._layers = source, hooks, tuple(f"blocks.{layer}." for layer in layers)
        self.device, self.identity = source.device, source.identity
        self.seen: dict[str, Seen] = {}

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Emitted:
        """:raises CaseTableError: no hook matches."""
        wanted = self.wanted(subject.captures)
        # A teacher-forced run needs the inputs of every half-layer.
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
        return self._source.text_ids(subject)

    def wanted(self, captures: list[str]) -> list[str]:
        """The hooks to capture, in execution order."""
        found = [name for name in captures if name.startswith(self._layers or "")]
        if self._hooks:
            found = [name for name in found if any(fnmatch.fnmatchcase(name, glob) for glob in self._hooks)]
        if not found:
            layers = f" in layers {', '.join(name.split('.')[1] for name in self._layers)}" if self._layers else ""
            raise CaseTableError(
                f"no hook of this model matches {', '.join(self._hooks) or '*'}{layers}; an example of a hook is "
                f"{captures[1]}"
            )
        return found
