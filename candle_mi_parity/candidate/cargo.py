"""Running cargo with progress messages and parsed errors; a run that is stopped leaves no process behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HEARTBEAT_SECONDS = 10.0
"""After this time without progress the last line is repeated."""

# cargo draws its progress bar into a pipe only with these variables.
_PROGRESS = {"CARGO_TERM_PROGRESS_WHEN": "always", "CARGO_TERM_PROGRESS_WIDTH": "120", "CARGO_TERM_COLOR": "never"}


@dataclass(frozen=True)
class Ran:
    """The result of a cargo command with ``--message-format json``.

    :ivar code: its exit code.
    :ivar lines: its stderr, without the progress bar.
    :ivar messages: its JSON messages: artifacts, compiler messages, ``build-finished``.
    """

    code: int
    lines: Sequence[str]
    messages: Sequence[Mapping[str, Any]]

    @property
    def compiled(self) -> bool:
        """Whether compilation started: every crate was resolved and downloaded."""
        return any(message.get("reason") == "build-finished" for message in self.messages)

    @property
    def diagnostics_by_target(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The compiler's messages, each with the name of the target; ``rendered`` holds the text for people."""
        found = [message for message in self.messages if message.get("reason") == "compiler-message"]
        return [(str(message.get("target", {}).get("name", "")), message["message"]) for message in found]

    @property
    def diagnostics(self) -> list[Mapping[str, Any]]:
        """The compiler's messages."""
        return [message for _, message in self.diagnostics_by_target]

    @property
    def broken(self) -> str:
        """The name of the target in which the compiler found its first error; empty if it found none."""
        return next((target for target, one in self.diagnostics_by_target if one["level"] == "error"), "")

    @property
    def errors(self) -> str:
        """The compiler's errors, or cargo's output from its first error on."""
        if self.compiled:
            return "\n".join(str(one["rendered"]) for one in self.diagnostics if one["level"] == "error")
        first = next((i for i, line in enumerate(self.lines) if line.startswith("error")), 0)
        return "\n".join(self.lines[first:])

    def executable(self, name: str) -> Path | None:
        """The binary of a target."""
        for message in self.messages:
            if message.get("executable") and message["target"]["name"] == name:
                return Path(message["executable"])
        return None

    def reason(self) -> str:
        """One line on why it failed: the compiler's first error with its place, or cargo's own error."""
        for one in self.diagnostics:
            if one["level"] == "error":
                spans = [span for span in one["spans"] if span["is_primary"]]
                place = [f"{span['file_name']}:{span['line_start']}:{span['column_start']}: " for span in spans[:1]]
                defined = [
                    f"{each['message']} at {span['file_name']}:{span['line_start']}"
                    for each in one.get("children", [])
                    for span in each["spans"][:1]
                    if span["file_name"] != (spans[0]["file_name"] if spans else "")
                ]
                return "".join(place) + condense([f"error: {'; '.join([one['message'], *defined[:1]])}"])
        return condense(self.lines)


def run_cargo(
    command: Sequence[str],
    environment: Mapping[str, str],
    full_log: Path,
    log: Callable[[str], None],
    place: Path | None = None,
) -> Ran:
    """Run a cargo command that takes ``--message-format json``.

    :param full_log: a file for its stderr and the compiler's messages.
    :param log: called with a line at each step, and at least every ten seconds.
    :param place: the directory in which cargo runs; None for the current one.
    :raises FileNotFoundError: cargo is not on PATH.
    """
    lines: list[str] = []
    with tempfile.TemporaryFile() as stdout, full_log.open("w", encoding="utf-8") as file:
        # A process group, which can be killed with the compilers in it.
        cargo = subprocess.Popen(
            [*command, "--message-format", "json"],
            env={**environment, **_PROGRESS},
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        assert cargo.stderr is not None
        try:
            for line in _with_heartbeat(cargo.stderr, log):
                file.write(f"{line}\n")
                lines.append(line)
            code = cargo.wait()
        finally:
            if cargo.poll() is None:  # after a full disk or Ctrl-C
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(cargo.pid, signal.SIGKILL)
                cargo.wait()
            cargo.stderr.close()
        stdout.seek(0)
        ran = Ran(code, lines, list(_messages(stdout)))
        file.writelines(str(one["rendered"]) for one in ran.diagnostics)
    return ran


def _with_heartbeat(stderr: IO[bytes], log: Callable[[str], None]) -> Iterator[str]:
    """Yield the lines of cargo's stderr; its progress goes to ``log``."""
    said, at, rest = "cargo starts", time.monotonic(), b""

    def tell(line: str) -> None:
        nonlocal said, at
        said, at = line, time.monotonic()
        log(said)

    while True:
        if not select.select([stderr], [], [], HEARTBEAT_SECONDS)[0]:
            tell(said)
            continue
        chunk = os.read(stderr.fileno(), 1 << 16)
        *parts, rest = re.split(rb"[\r\n]", rest + chunk)
        for part in parts if chunk else [rest]:
            line = part.decode("utf-8", "replace").rstrip()
            bar = _progress(line)
            if bar is None and line:
                yield line
            # Before the bar is drawn, cargo may wait for the network or for another cargo.
            before = re.match(r"\s+(Updating|Downloading|Blocking)\b", line)
            news = f"cargo: {line.strip()}" if before and bar is None else bar
            if news and (news != said or time.monotonic() - at > HEARTBEAT_SECONDS):
                tell(news)
        if not chunk:
            return


def _progress(line: str) -> str | None:
    """The progress in a line of cargo's bar; ``None`` for any other line."""
    found = re.match(r"\s+(Building|Downloading|Fetch)\b.*?\[[=> ]*\]\s*(.*)", line)
    if found is None:
        return None
    step = re.match(r"(\d+)/(\d+): (.+)", found[2])
    return f"cargo: step {step[1]} of {step[2]}: {step[3]}" if step else f"cargo: {found[1].lower()} {found[2]}"


def _messages(stdout: IO[bytes]) -> Iterator[Mapping[str, Any]]:
    for line in stdout:
        # A build script may print other text.
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                yield message


def condense(lines: Sequence[str]) -> str:
    """One line of cargo's or rustc's output: the first error, and the last "Caused by" after it."""
    said = [line.strip() for line in lines if line.strip()]
    first = next((i for i, line in enumerate(said) if re.match(r"error(\[E\d+\])?:", line)), None)
    if first is None:
        return said[-1] if said else "no reason given"
    causes = [after for line, after in itertools.pairwise(said[first:]) if line == "Caused by:"]
    return ": ".join([said[first], *causes[-1:]])[:400]
