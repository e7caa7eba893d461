"""Whether a candidate gives the same bytes in every run, which a GPU may not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from candle_mi_parity.candidate.sources import Source, open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.spec.cases import Case, load_cases, select
from candle_mi_parity.trace.trace import Emitted


@dataclass(frozen=True)
class RepeatedCase:
    """One case.

    :ivar differing: tensors and scalars that are not bitwise equal in all runs.
    :ivar error: why the case could not be run, or empty.
    """

    id: str
    tensors: int
    differing: list[str]
    error: str = ""

    @property
    def status(self) -> str:
        return "ERROR" if self.error or not self.tensors else "other bytes" if self.differing else "PASS"

    @property
    def line(self) -> str:
        return self.error or f"{len(self.differing)} of {self.tensors} differ {', '.join(self.differing[:3])}".strip()


@dataclass(frozen=True)
class Repeated:
    """``repeat.json``."""

    candidate: str
    device: str
    times: int
    cases: list[RepeatedCase]

    @property
    def line(self) -> str:
        same = sum(1 for case in self.cases if case.status == "PASS")
        return f"{same} of {len(self.cases)} cases gave the same bytes {self.times} times on {self.device}"


def repeat(options: RunOptions, times: int, progress: Callable[[int], Progress]) -> Repeated:
    """Run each case several times in one process of the candidate.

    :raises ParityError: the candidate cannot be built or found.
    """
    done = []
    cases = select(load_cases(), list(options.cases))
    terminal = progress(len(cases))
    candidate = parse_candidate(options.candidate)
    with open_source(candidate, options.cache, options.out / "repeat", terminal.note, options.device) as source:
        for case in cases:
            terminal.case_starts(case, "repeat")
            try:
                done.append(_case(case, source, times, options.cache))
            except ParityError as error:
                done.append(RepeatedCase(id=case.id, tensors=0, differing=[], error=one_line(str(error))))
    return Repeated(candidate=options.candidate, device=options.device, times=times, cases=done)


def _case(case: Case, source: Source, times: int, cache: Path) -> RepeatedCase:
    subject = prepare(case, cache)
    oracle = Oracle(subject, cache, source.device)
    truth, inputs = oracle.truth(), oracle.inputs("free")
    # Digested before the next run overwrites the files.
    runs = [digests(source.trace(subject, "free", truth, inputs)) for _ in range(times)]
    names = dict.fromkeys(name for run in runs for name in run)
    differing = [name for name in names if len({run.get(name) for run in runs}) > 1]
    return RepeatedCase(id=case.id, tensors=len(names), differing=differing)


def digests(trace: Emitted) -> dict[str, str]:
    """Name → sha256 of a tensor's bytes, or a scalar's value."""
    arrays = {name: np.ascontiguousarray(trace.tensor(name)) for name in trace.entries}
    found = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    return found | {name: repr(value) for name, value in trace.scalars.items()}
