"""The options of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from candle_mi_parity.candidate.store import Storing
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.spec.paths import cache_root

PARTS = ("traces", "calls", "tokens", "auto-config")
"""What a run asks: the cases with their other forwards, direct calls, tokenizers, the generic config reader."""
SEARCH_SECONDS = 30.0
"""Time limit for explaining the new divergences of a run."""


@dataclass(frozen=True)
class RunOptions:
    """The options of a run.

    :ivar cases: globs over case ids; none for the default lane.
    :ivar out: directory of traces and reports.
    :ivar strict: whether known divergences fail too.
    :ivar keep: where the candidate's traces are stored.
    :ivar device: of the candidate; the truth is always computed on the CPU.
    :ivar baseline: the release whose known divergences are expected; empty for the newest that is not newer.
    :ivar known: a file of expected divergences, in place of those of the baseline.
    :ivar only: the parts of a run, of :data:`PARTS`; none for all, or for traces alone where cases are chosen.
    :ivar search: seconds for explaining new divergences; 0 for no search.
    """

    candidate: str
    cases: tuple[str, ...] = ()
    out: Path = Path("build/parity")
    strict: bool = False
    keep: Storing | None = None
    device: str = "cpu"
    baseline: str = ""
    known: Path | None = None
    only: tuple[str, ...] = ()
    search: float = SEARCH_SECONDS
    cache: Path = field(default_factory=cache_root)

    @property
    def parts(self) -> tuple[str, ...]:
        """:raises CaseTableError: a part that does not exist, or cases without traces."""
        if unknown := [part for part in self.only if part not in PARTS]:
            raise CaseTableError(f"there is no part {one_line(unknown[0])!r} of a run; there are {', '.join(PARTS)}")
        if self.cases and self.only and "traces" not in self.only:
            raise CaseTableError("cases are chosen, and --only leaves out their traces")
        return self.only or (("traces",) if self.cases else PARTS)
