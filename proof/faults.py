"""``make faults``: plant every fault of the catalogue, judge it as a run does, and say which were seen; then measure
how small a mistake of each sized kind is still seen.

Exit code 1 when a scored fault survives, shows at another tensor or ends in an error.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.paths import cache_root
from proof import OUT, doses
from proof.catalogue import Fault, load_faults
from proof.judging import Outcome, PlantedSource, Status, outcome, twin_problem
from proof.scores import proved, save, scores
from proof.source import Checkout, check_anchors, released_crate

app = typer.Typer(add_completion=False)


def judge_planted(faults: list[Fault], progress: Progress) -> list[Outcome]:
    """The faults of torch's own run."""
    task = progress.add_task("faults", total=len(faults))
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)

        @functools.cache
        def twin(case_id: str) -> str:
            return twin_problem(PlantedSource(None, root / "twins" / case_id), case_id)

        for fault in faults:
            progress.update(task, description=fault.id)
            found.append(outcome(fault, PlantedSource(fault, root / fault.id), twin))
            progress.advance(task)
    return found


def judge_source(faults: list[Fault], progress: Progress) -> list[Outcome]:
    """The faults of candle-mi's own source, built one by one."""
    check_anchors(faults, released_crate())
    task = progress.add_task("candle-mi's source", total=len(faults) + 1)
    checkout = Checkout(cache_root(), OUT / "traces", lambda line: progress.update(task, description=line[:60]))
    with checkout.candidate(None) as honest:
        twins = {case: twin_problem(honest, case) for case in dict.fromkeys(fault.case for fault in faults)}
    progress.advance(task)
    found = []
    for fault in faults:
        progress.console.print(f"building {fault.id}")
        try:
            with checkout.candidate(fault) as source:
                found.append(outcome(fault, source, lambda case: twins[case], equivalent=False))
        except ParityError as error:
            found.append(_unbuilt(fault, str(error)))
        progress.console.print(f"  {found[-1].status} {found[-1].found} {found[-1].detail}")
        progress.advance(task)
    return found


def measure_doses(progress: Progress) -> list[doses.Dose]:
    """The smallest dose of each sized fault that is killed, free and forced."""
    runs = [(case, mode) for case in doses.CASES for mode in doses.MODES]
    task = progress.add_task("doses", total=len(runs))
    found = []
    for case, mode in runs:
        found += doses.doses(case, mode, lambda step: progress.update(task, description=step))
        progress.advance(task)
    return found


def _unbuilt(fault: Fault, error: str) -> Outcome:
    return Outcome(
        fault.id, fault.kind, fault.case, fault.says, Status.ERROR, fault.first, detail=error,
        scored=fault.scored, fast=fault.fast, written_before_run=fault.written_before_run,
    )  # fmt: skip


@app.command()
def main(
    source: Annotated[bool, typer.Option(help="the faults in candle-mi's own source, a build each")] = False,
    fast: Annotated[bool, typer.Option(help="the fast lane only")] = False,
    only: Annotated[str, typer.Option(help="one fault by its id")] = "",
) -> None:
    console = Console()
    faults = [
        fault
        for fault in load_faults()
        if (fault.source is not None) == source and (fault.fast or not fast) and only in ("", fault.id)
    ]
    if not faults:
        console.print("no such fault")
        raise typer.Exit(2)
    with Progress(console=console) as progress:
        found = judge_source(faults, progress) if source else judge_planted(faults, progress)
        if not only:
            save(found, OUT, "source" if source else "fast" if fast else "faults")
        if not (source or fast or only):
            doses.save(measure_doses(progress), OUT)
    for one in found:
        if not one.right:
            console.print(f"{one.status} {one.id}: expected {one.expected}, {one.found or one.detail}", markup=False)
    for each in scores(found):
        console.print(f"{each.name}: {each.killed}/{each.scored} killed, {each.right}/{each.killed} first right")
    raise typer.Exit(0 if proved(found) else 1)


if __name__ == "__main__":
    app()
