"""Options of several commands. Each command imports its sub-packages when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_CANDIDATE = "0.2.2"
OUT = Path("build/parity")

Globs = Annotated[list[str] | None, typer.Argument(help="Globs over case ids; without any, the default lane.")]
CasesOption = Annotated[list[str] | None, typer.Option("--cases", "--case", help="A glob; may be given again.")]
CandidateOption = Annotated[
    str,
    typer.Option(
        help="0.2.2 | path:DIR | git:URL@REV | stored:VERSION_OR_DIR | command:PROGRAM | transformer-lens | torch"
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu | cuda:N (the emitter is then built with CUDA)")]
OnlyOption = Annotated[
    list[str] | None, typer.Option(help="A part: traces, calls, tokens, auto-config; may be given again.")
]
OutOption = Annotated[Path, typer.Option(help="Where traces and reports go.")]


def globs(*given: list[str] | None) -> tuple[str, ...]:
    """All globs of a command line, however they were given."""
    return tuple(pattern for patterns in given for pattern in patterns or ())
