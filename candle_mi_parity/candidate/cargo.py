"""Running cargo: its progress as it comes, its errors as data, and nothing left running when a run is broken off."""

from __future__ import annotations

import contextlib
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
"""After this time without news the last line of progress is said again."""

# Cargo draws its bar into a pipe too when it is told to, and how wide.
_PROGRESS = {"CARGO_TERM_PROGRESS_WHEN": "always", "CARGO_TERM_PROGRESS_WIDTH": "120", "CARGO_TERM_COLOR": "never"}


@dataclass(frozen=True)
class Ran:
    """How a cargo with ``--message-format json`` ended.

    :ivar code: its exit code.
    :ivar lines: its stderr, without the progress bar.
    :ivar messages: what it said as JSON: artifacts, compiler messages, ``build-finished``.
    """

    code: int
    lines: Sequence[str]
    messages: Sequence[Mapping[str, Any]]

    @property
    def compiled(self) -> bool:
        """Whether it came to compiling: every crate was resolved and downloaded."""
        return any(message.get("reason") == "build-finished" for message in self.messages)

    @property
    def diagnostics(self) -> list[Mapping[str, Any]]:
        """The compilers' messages; the text of one as a person reads it is its ``rendered``."""
        return [message["message"] for message in self.messages if message.get("reason") == "compiler-message"]

    @property
    def errors(self) -> str:
        """What is wrong in full: the compilers' errors, or all that cargo said from its first error on."""
        if self.compiled:
            return "\n".join(str(one["rendered"]) for one in self.diagnostics if one["level"] == "error")
        said = [line.startswith("error") for line in self.lines]
        return "\n".join(self.lines[said.index(True) :] if any(said) else self.lines)

    def executable(self, name: str) -> Path | None:
        """Where the binary of a target is."""
        for message in self.messages:
            if message.get("executable") and message["target"]["name"] == name:
                return Path(message["executable"])
        return None

    def reason(self) -> str:
        """One line on why it failed: the first error of a compiler with its place, or cargo's own error."""
        for one in self.diagnostics:
            if one["level"] == "error":
                return _place(one) + condense([f"error: {one['message']}"])
        return condense(self.lines)


def run_cargo(
    command: Sequence[str], environment: Mapping[str, str], full_log: Path, log: Callable[[str], None]
) -> Ran:
    """Run a cargo command that takes ``--message-format json``.

    :param full_log: a file for its stderr and the compilers' messages.
    :param log: called with a line at each step, and at least every ten seconds.
    :raises FileNotFoundError: there is no cargo.
    """
    lines: list[str] = []
    with tempfile.TemporaryFile() as stdout, full_log.open("w", encoding="utf-8") as file:
        # A group of its own, which can be ended with the compilers in it; a killed cargo leaves them at work.
        cargo = subprocess.Popen(
            [*command, "--message-format", "json"],
            env={**environment, **_PROGRESS},
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
        finally:  # a full disk, Ctrl-C; of a cargo that has ended there is no group any more
            if cargo.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(cargo.pid, signal.SIGKILL)
                cargo.wait()
            cargo.stderr.close()
        stdout.seek(0)
        ran = Ran(code, lines, list(_messages(stdout)))
        file.writelines(str(one["rendered"]) for one in ran.diagnostics)
    return ran


def _with_heartbeat(stderr: IO[bytes], log: Callable[[str], None]) -> Iterator[str]:
    """The whole lines of cargo's stderr; its progress goes to ``log``."""
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
            # What cargo does before there is a bar may wait for the network, or for another cargo.
            before = re.match(r"\s+(Updating|Downloading|Blocking)\b", line)
            news = f"cargo: {line.strip()}" if before and bar is None else bar
            if news and (news != said or time.monotonic() - at > HEARTBEAT_SECONDS):
                tell(news)
        if not chunk:
            return


def _progress(line: str) -> str | None:
    """What a state of cargo's bar says; ``None`` for any other line."""
    found = re.match(r"\s+(Building|Downloading|Fetch)\b.*?\[[=> ]*\]\s*(.*)", line)
    if found is None:
        return None
    step = re.match(r"(\d+)/(\d+): (.+)", found[2])
    return f"cargo: step {step[1]} of {step[2]}: {step[3]}" if step else f"cargo: {found[1].lower()} {found[2]}"


def _messages(stdout: IO[bytes]) -> Iterator[Mapping[str, Any]]:
    for line in stdout:
        # A build script may print what is not JSON.
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                yield message


def _place(message: Mapping[str, Any]) -> str:
    """``src/lib.rs:12:5: `` of a compiler's message."""
    spans = [span for span in message["spans"] if span["is_primary"]]
    return "".join(f"{span['file_name']}:{span['line_start']}:{span['column_start']}: " for span in spans[:1])


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
