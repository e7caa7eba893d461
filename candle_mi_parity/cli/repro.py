"""``repro``: from a divergence to a folder with a Rust test that fails on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from candle_mi_parity.cli.options import DEFAULT_CANDIDATE, CandidateOption


def repro_command(
    case: Annotated[str | None, typer.Argument(help="Case id or glob; without it, every known divergence.")] = None,
    candidate: CandidateOption = DEFAULT_CANDIDATE,
    out: Annotated[Path, typer.Option(help="Where the folders go.")] = Path("build/repro"),
    prove: Annotated[bool, typer.Option("--prove", help="Run the Rust test; it must fail on the candidate.")] = False,
    fixed: Annotated[str | None, typer.Option(help="A candidate on which the test must pass.")] = None,
) -> None:
    """Shrink a divergence and write its model, expected tensor, Rust test, Python script and issue text."""
    from candle_mi_parity.files.escape import printable
    from candle_mi_parity.report.terminal import one_line_errors, progress_bar
    from candle_mi_parity.repro.command import repro
    from candle_mi_parity.spec.paths import cache_root

    with one_line_errors():
        with progress_bar() as bar:
            task = bar.add_task("starting", total=None)
            tell = lambda line: bar.update(task, description=line)  # noqa: E731
            left: list[str] = []
            found = repro(case, candidate, out, cache_root(), tell, prove, fixed, left.append)
        for reason in left:
            print(printable(f"not reproduced: {reason}"))
        for reproduced in found:
            print(printable(reproduced.line()))
        print(f"{len(found)} reproduced, below {out}")
    raise typer.Exit(0 if all(reproduced.proven for reproduced in found) else 1)
