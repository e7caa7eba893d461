"""What a hunt prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from candle_mi_parity.compare.hunt_result import Cause, HuntResult
from candle_mi_parity.files.escape import cell, printable


def progress_line(result: HuntResult) -> str:
    """One line after a round."""
    rate = result.tried / max(result.seconds, 1e-9)
    return f"{result.tried} inputs, {rate:.0f} a second, {len(result.causes)} causes that are new"


def hunt_tables(result: HuntResult, console: Console, out: Path) -> None:
    """Print the counts, what is new, what the menu never excited, and the verdict last."""
    for kind, tally in result.tallies.items():
        known = sum(tally.known.values())
        refused, no_truth = sum(tally.refused.values()), sum(tally.no_truth.values())
        console.print(
            f"{kind}: {tally.tried} inputs; {tally.agree} agree, {known} known, {refused} refused by candle-mi, "
            f"{no_truth} without a truth, {tally.unmeasured} too noisy to judge",
            highlight=False,
        )
        console.print(_counts(f"Refused by candle-mi ({kind})", tally.refused), end="")
        console.print(_counts(f"Without a truth ({kind})", tally.no_truth, 8), end="")
        console.print(_counts(f"Known ({kind})", tally.known), end="")
    for message, count in result.faults.items():
        console.print(Text(printable(f"a fault of this suite, {count} times: {message}"), "bold red"))
    for what, why in result.skipped.items():
        console.print(Text(printable(f"{what} skipped: {why}"), "yellow"))
    if result.dead:
        console.print(Text(printable(f"changed nothing on either side: {'; '.join(result.dead)}"), "yellow"))
    for number, cause in enumerate(result.causes, 1):
        console.print(Text(printable(f"{number}. {cause_line(cause)}"), "bold red"), soft_wrap=True)
        console.print(Text(printable(f"   {json.dumps(cause.smallest)}")), soft_wrap=True)
    console.print(
        f"{result.verdict.value}: {progress_line(result)}; {result.seconds:.0f} s, seed {result.seed}, in {out}",
        highlight=False,
    )


def cause_line(cause: Cause) -> str:
    """A cause in one line."""
    said = f"computes PyTorch's numbers with {cause.explained}" if cause.explained else cause.detail
    return f"{cause.what}: {cause.first} ({cause.reason}), {cause.count} inputs: {said}"


def _counts(title: str, counts: Mapping[str, int], most: int = 30) -> Table | str:
    """The largest counts; empty without any."""
    if not counts:
        return ""
    table = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left")
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    for message, count in ordered[:most]:
        table.add_row(str(count), cell(message))
    if len(ordered) > most:
        table.add_row(str(sum(count for _, count in ordered[most:])), f"others, of {len(ordered) - most} kinds")
    return table
