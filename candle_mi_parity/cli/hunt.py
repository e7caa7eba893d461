"""``hunt``: look for divergences that no case has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from candle_mi_parity.cli.options import DEFAULT_CANDIDATE


def _more_than_none(minutes: float | None) -> float | None:
    if minutes is not None and not minutes > 0:
        raise typer.BadParameter("must be more than 0")
    return minutes


def hunt_command(
    candidate: Annotated[str, typer.Option(help="0.2.2 | path:DIR | git:URL@REV | torch")] = DEFAULT_CANDIDATE,
    minutes: Annotated[
        float | None, typer.Option(callback=_more_than_none, help="How long, more than 0; 5 without --inputs.")
    ] = None,
    inputs: Annotated[int | None, typer.Option(min=1, help="How many inputs, in place of a time.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same inputs.")] = 0,
    families: Annotated[str, typer.Option(help="A glob over the families.")] = "*",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the hunt in --out.")] = False,
    branches: Annotated[
        bool, typer.Option(help="Build candle-mi so that its branches are counted, which takes minutes once.")
    ] = True,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/hunt"),
) -> None:
    """Generate inputs and judge them. Exit code 0 nothing new, 1 something new, 2 ERROR, 3 out of reach."""
    from candle_mi_parity.report.hunt_tables import hunt_tables, progress_line
    from candle_mi_parity.report.tables import stdout
    from candle_mi_parity.report.terminal import Terminal, one_line_errors, progress_bar
    from candle_mi_parity.run.hunt import HuntOptions, hunt

    with one_line_errors():
        options = HuntOptions(candidate, minutes, inputs, seed, families, resume, branches, out)
        with progress_bar() as bar:
            terminal = Terminal(bar)
            result = hunt(options, terminal.note, lambda found: terminal.note(progress_line(found)))
        hunt_tables(result, stdout(), out)
    raise typer.Exit(result.verdict.exit_code)
