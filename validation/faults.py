"""``python -m validation.faults``: plant every fault of the catalogue and judge it as ``run`` judges a case.

``--source`` plants the faults in candle-mi's own source, with one build for each. Exit code 1 if a fault is not
detected where it was planted.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from candle_mi_parity.candidate.sources import Source, StatelessSource, same_candidate
from candle_mi_parity.compare.compare import check_header
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.judge.case import Judgement, Progress, judge_case
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.explanations import NOTHING_KNOWN, combined, load_explanations
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import Trace
from candle_mi_parity.trace.truth import Truth
from tests.support.planting import CASES, RELEASE, known_real, real, write
from validation.catalogue import NOWHERE, Fault, load_faults
from validation.plant import emitted
from validation.source_faults import Checkout, check_anchors, released_crate
from validation.trace_faults import IO


@dataclass(frozen=True)
class Detection:
    """What was detected of a fault.

    :ivar found: the first tensor that failed, the expected part of an error, or :data:`NOWHERE` if the case passed.
    :ivar reason: why that tensor failed.
    :ivar error: why nothing could be judged; a crash does not count as detected.
    """

    fault: Fault
    found: str = ""
    reason: str = ""
    error: str = ""

    @property
    def right(self) -> bool:
        """Whether it was detected exactly where the catalogue says."""
        return self.found == self.fault.first and self.fault.reason in ("", self.reason) and not self.error


KNOWN = {
    "llama/hub": "llama/v5",
    "mistral/hub": "mistral/v5",
    "starcoder2/hub": "starcoder2/v5",
    "gemma/hub": "gemma/rope-parameters",
    "gemma2/hub": "gemma2/window",
    "phi3/hub": "phi3/rope-parameters",
    "qwen2/hub": "qwen2/window",
    "qwen3/hub": "qwen3/window",
}
"""Case → a case of the same family, without an SAE, in which 0.2.2 is known to diverge."""

SAME = ("theta-default",)
"""Faults that are the known divergence itself."""


class PlantedSource(StatelessSource):
    """A candidate with a fault in every trace; without one if ``fault`` is None (the clean twin).

    :param known: whether the candidate also diverges as 0.2.2 is known to.
    """

    identity = RELEASE

    def __init__(self, fault: Fault | None, directory: Path, known: bool = False) -> None:
        self._fault, self._directory, self._real = fault, directory, known_real if known else real

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Trace:
        there = self._real(subject.case.id, mode)
        dump = there.emitted if self._fault is None else emitted(self._fault, there)
        path = write(self._directory / mode, replace(there, emitted=dump))
        if self._fault is not None and self._fault.io is not None:
            IO[self._fault.io](path)
        trace = same_candidate(Trace(path), self.identity)
        check_header(truth, trace, file_digest(inputs))
        return trace


def _judge(source: Source, case_id: str, known: bool) -> Judgement:
    """Judge a case as ``run`` does.

    :param known: whether the known divergences of 0.2.2 apply.
    """
    table = load_explanations() if known else NOTHING_KNOWN
    return judge_case(CASES[case_id], source, "planted", cache_root(), table, Progress())


def twin_problem(source: Source, case_id: str, known: bool = False) -> str:
    """Why the clean twin of a case does not pass; "" if it passes, or is known."""
    result = _judge(source, case_id, known).result
    if result.status is (Status.KNOWN if known else Status.PASS):
        return ""
    return f"the clean twin is {result.message()}"


def detect(fault: Fault, source: Source, twin: Callable[[str], str]) -> Detection:
    """Judge a fault; on top of a known divergence, against the truth of its counterfactual.

    :param twin: case id → why its clean twin does not pass.
    """
    if problem := twin(fault.case):
        return Detection(fault, error=problem)
    judged = _judge(source, fault.case, fault.known)
    first = judged.result.first_divergence
    if first is None or judged.evidence is None:
        return _without_numbers(fault, judged.result)
    if fault.known:
        rows = [row for row in load_explanations().explanation if row.id in judged.applicable and row.change]
        first = next(result for result in judged.evidence.under(combined(rows))[1] if result.status is Status.FAIL)
    return Detection(fault, first.name, first.reason)


def judge_planted(faults: list[Fault], directory: Path) -> Iterator[Detection]:
    """Judge the faults in torch's run.

    :param directory: for the faulty traces.
    """

    @functools.cache
    def twin(case_id: str, known: bool) -> str:
        return twin_problem(PlantedSource(None, directory / "twins" / case_id, known), case_id, known)

    for fault in faults:
        source = PlantedSource(fault, directory / fault.id, fault.known)
        yield detect(fault, source, functools.partial(twin, known=fault.known))


def on_top(fault: Fault) -> Fault:
    """The same fault on top of a known divergence of its family."""
    return fault.model_copy(update={"case": KNOWN[fault.case], "known": True})


def _without_numbers(fault: Fault, result: CaseResult) -> Detection:
    """The result of a case that passed, is known, or ended with an error."""
    if result.status in (Status.PASS, Status.KNOWN):
        return Detection(fault, found=NOWHERE)
    refused = fault.refused and fault.first in result.error
    return Detection(fault, found=fault.first) if refused else Detection(fault, error=result.error)


def judge_source(faults: list[Fault], directory: Path) -> Iterator[Detection]:
    """Judge the faults in candle-mi's own source, with one build for each."""
    check_anchors([fault.source for fault in faults if fault.source], released_crate())
    checkout = Checkout(cache_root())
    with checkout.candidate("twin", None, directory) as honest:
        twins = {fault.case: twin_problem(honest, fault.case, fault.known) for fault in faults}
    for fault in faults:
        try:
            with checkout.candidate(fault.id, fault.source, directory) as source:
                yield detect(fault, source, twins.__getitem__)
        except ParityError as error:  # it does not build
            yield Detection(fault, error=str(error))


def main(
    source: Annotated[bool, typer.Option(help="the faults in candle-mi's own source, a build each")] = False,
    known: Annotated[bool, typer.Option(help="plant each on top of a known divergence of its family")] = False,
    only: Annotated[str, typer.Option(help="one fault by its id")] = "",
) -> None:
    """Judge the faults of the catalogue; exit code 1 unless each is detected where it was planted."""
    console = Console(soft_wrap=True)
    faults = [
        fault
        for fault in load_faults()
        if (fault.source is not None) == source
        and only in ("", fault.id)
        and (not known or (fault.case in KNOWN and fault.kind != "sae" and fault.id not in SAME))
    ]
    faults = [on_top(fault) for fault in faults] if known else faults
    if not faults:
        console.print("no such fault")
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory() as scratch:
        judging = (judge_source if source else judge_planted)(faults, Path(scratch))
        detections = list(track(judging, "seeded faults", total=len(faults), console=Console(stderr=True)))
    totals = Counter(found.fault.kind for found in detections)
    right = Counter(found.fault.kind for found in detections if found.right)
    for kind, count in totals.items():
        console.print(f"{kind}: {right[kind]} of {count} detected where they were planted", highlight=False)
    for wrong in (found for found in detections if not found.right):
        text = f"expected {wrong.fault.first}, found {wrong.error or f'{wrong.found} {wrong.reason}'}"
        console.print(f"{wrong.fault.id} ({wrong.fault.case}): {text}", markup=False)
    console.print(f"all: {right.total()} of {len(detections)}", highlight=False)
    raise typer.Exit(0 if right.total() == len(detections) else 1)


if __name__ == "__main__":
    typer.run(main)
