"""What a hunt prints: the counts and what is new. Everything else is on its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from candle_mi_parity.compare.hunt_result import Cause, HuntResult
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.report.hunt_page import PAGE, instead, kinds_shown, largest

MOST_CAUSES, MOST_MESSAGES, MOST_FAULTS = 15, 5, 3


def progress_line(result: HuntResult) -> str:
    """One line after a round."""
    rate = result.tried / max(result.seconds, 1e-9)
    return f"{result.tried} inputs, {rate:.0f} a second, {len(result.causes)} causes that are new"


def hunt_tables(result: HuntResult, console: Console, out: Path) -> None:
    """Print the counts, the most frequent refusals, what is new, and the verdict last: about 40 lines at most."""

    def show(lines: Sequence[str], style: str = "", most: int | None = None) -> None:
        for line in lines[:most]:
            console.print(Text(one_line(line, 400), style), soft_wrap=True)
        if most is not None and len(lines) > most:
            console.print(Text(f"  and {len(lines) - most} more, in {out / PAGE}", style), soft_wrap=True)

    for kind in kinds_shown(result):
        counts = ", ".join(f"{count} {outcome}" for outcome, count in kind.outcomes.items())
        show([f"{kind.title}: {kind.tried} inputs: {counts}"])
    refused = {text: count for tally in result.tallies.values() for text, count in tally.refused.items()}
    show([f"refused {count} times: {text}" for text, count in largest(refused)], "dim", MOST_MESSAGES)
    if result.branches.of:
        never = len(result.branches.never)
        reached = f"{len(result.branches.reached)} of {result.branches.of}"
        show([f"{reached} regions of candle-mi's source were reached; {never} functions were never entered"])
    if result.dead:
        show([f"{len(result.dead)} entries of the menu changed nothing on either side"], "yellow")
    show([f"skipped: {what}: {why}" for what, why in result.skipped.items()], "yellow", MOST_FAULTS)
    faults = [f"a fault of this suite, {count} times: {text}" for text, count in largest(result.faults)]
    show(faults, "bold red", MOST_FAULTS)
    causes = [f"{place}. {cause_line(cause)}" for place, cause in enumerate(result.causes, 1)]
    show(causes, "bold red", MOST_CAUSES)
    show([f"page: {out / PAGE}"])
    show([f"{result.verdict.value}: {progress_line(result)}; {result.seconds:.0f} s, seed {result.seed}"], "bold")


def cause_line(cause: Cause) -> str:
    """A cause in one line."""
    said = instead(cause) or cause.detail
    inputs = f"{cause.count} input{'s' * (cause.count != 1)}"
    return f"{cause.what}: {cause.first} ({cause.reason}), {inputs}: {said}" + (
        f"; see {cause.folder}" if cause.folder else ""
    )
