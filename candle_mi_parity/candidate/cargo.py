"""Running cargo: its progress passed on as it comes, and nothing left running when the run is broken off."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def run_cargo(
    command: Sequence[str], environment: Mapping[str, str], full_log: Path, log: Callable[[str], None]
) -> tuple[int, list[str]]:
    """Cargo's exit code and the lines of its stderr, which are kept in ``full_log`` too.

    :param log: called with each line that a person waits for.
    :raises FileNotFoundError: there is no cargo.
    """
    lines: list[str] = []
    # A group of its own, which can be ended with the compilers in it; a killed cargo leaves them at work.
    cargo = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    assert cargo.stderr is not None
    try:
        with full_log.open("w", encoding="utf-8") as file:
            for raw in cargo.stderr:
                line = raw.decode("utf-8", "replace")
                file.write(line)
                lines.append(line.rstrip())
                if re.match(r"\s+(Compiling|Downloading|Updating|Finished)\b", line):
                    log(f"cargo: {line.strip()}")
        return cargo.wait(), lines
    finally:  # a full disk, Ctrl-C; of a cargo that has ended there is no group any more
        if cargo.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(cargo.pid, signal.SIGKILL)
            cargo.wait()
        cargo.stderr.close()


def condense(lines: Sequence[str]) -> str:
    """One line out of cargo's or rustc's output: the first error, and the deepest cause that follows it."""
    said = [line.strip() for line in lines]
    errors = [index for index, line in enumerate(said) if re.match(r"error(\[E\d+\])?:", line)]
    if not errors:
        return next((line for line in reversed(said) if line), "no reason given")
    first = errors[0]
    causes = [
        following
        for line, following in zip(said[first:], said[first + 1 :], strict=False)
        if line == "Caused by:" and following
    ]
    text = said[first] if not causes else f"{said[first]}: {causes[-1]}"
    return text[:400]
