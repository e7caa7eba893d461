"""The emitter process: if it crashes, hangs or sends an invalid reply, only the current case fails."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from candle_mi_parity.compare.verdict import Failure
from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line

_REAP_SECONDS = 5.0
"""How long to wait for a killed process."""
_POLL_SECONDS = 0.5
"""How often to look whether a process has ended whose pipe another one holds open."""
_LONGEST = 1 << 20
"""Bytes of a line that are read at once, so that output without an end does not fill the memory."""
_MOST_REPLIES = 64
"""Replies without a request after which no more is read."""
_LONGEST_ERROR = 1000
"""Characters of a program's own words; the emitter gives no more than 600."""
KINDS = (
    Failure.ABSENT, Failure.REQUEST, Failure.MODEL, Failure.SAE, Failure.FORWARD, Failure.IO, Failure.PANIC,
    Failure.NOT_BUILT,
)  # fmt: skip
"""Every kind of failure that a reply may name."""
_BACKTRACE = b"note: run with `RUST_BACKTRACE"
"""Rust's last line after most faults, which says nothing of them."""


class EmitterError(ParityError):
    """A request did not yield a trace.

    :ivar kind: as the emitter reports it (``request``, ``model``, ``sae``, ``forward``, ``io``, ``panic``,
        ``not-built``), ``absent`` for a feature that the candidate does not have, or ``crash``, ``timeout`` or
        ``protocol`` for a process without a valid reply.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


class _Pipes:
    """A running emitter, with a thread for each pipe, since reading and writing may block."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "RUST_BACKTRACE": "0", **environment},
            process_group=0,  # Ctrl-C must reach the run only, which ends the emitter
        )
        self.replies: queue.Queue[bytes | None] = queue.Queue()
        self._requests: queue.Queue[bytes | None] = queue.Queue()
        self._last_lines: deque[bytes] = deque(maxlen=20)
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self._stderr_thread = self._serve(self._keep_last_lines, self.process.stderr)
        self._serve(self._collect, self.process.stdout)
        self._serve(self._feed, self.process.stdin)

    @staticmethod
    def _serve(work: Callable[[IO[bytes]], None], pipe: IO[bytes]) -> threading.Thread:
        thread = threading.Thread(target=work, args=(pipe,), daemon=True)
        thread.start()
        return thread

    def _feed(self, pipe: IO[bytes]) -> None:
        # After a broken pipe, the reading thread detects the end of the process.
        with contextlib.suppress(OSError, ValueError):
            while (line := self._requests.get()) is not None:
                pipe.write(line)
                pipe.flush()
        with contextlib.suppress(OSError, ValueError):
            pipe.close()

    def _collect(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            while self.replies.qsize() < _MOST_REPLIES and (line := pipe.readline(_LONGEST)):
                self.replies.put(line)
        self.replies.put(None)

    def _keep_last_lines(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := pipe.readline(_LONGEST):
                if line.strip() and not line.startswith(_BACKTRACE):
                    self._last_lines.append(line)

    def send(self, line: bytes) -> None:
        self._requests.put(line)

    def answer(self, deadline: float) -> bytes | None:
        """The next line on stdout; None at its end, also where a child of an ended process holds it open.

        :raises queue.Empty: there is none before the deadline.
        """
        while True:
            ended = self.process.poll() is not None
            try:
                return self.replies.get(timeout=max(0.0, min(_POLL_SECONDS, deadline - time.monotonic())))
            except queue.Empty:
                if ended:
                    return None
                if time.monotonic() >= deadline:
                    raise

    def last_line(self) -> str:
        """The last line on stderr, formatted for an error message; empty if there is none."""
        self._stderr_thread.join(timeout=1.0)
        if not self._last_lines:
            return ""
        return f"; last line on stderr: {self._last_lines[-1].decode('utf-8', 'replace').strip()[:400]}"

    def end(self, patience: float) -> int | None:
        """Wait ``patience`` seconds for the process to end, then kill it; its exit code if it ended by itself.

        Processes that it started are killed too.
        """
        self._requests.put(None)
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout=patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # blocked in the kernel
            self.process.wait(timeout=_REAP_SECONDS)
        return code


class EmitterProcess:
    """An emitter that answers many requests; it is started at first use and again after a failure.

    :param command: the binary, or a program with its arguments.
    :param missing: parts that do not compile against the candidate → their first error.
    :param absent: parts for which the candidate has no feature.
    :param environment: variables for the process, beside those of this one.

    >>> with EmitterProcess(built.path) as emitter:            # doctest: +SKIP
    ...     trace = emitter.emit(request, timeout=600)
    """

    def __init__(
        self,
        command: Path | Sequence[str],
        missing: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        absent: Collection[str] = (),
    ) -> None:
        self._command = [str(command)] if isinstance(command, Path) else list(command)
        self._missing = missing or {}
        self._absent = absent
        self._environment = environment or {}
        self._pipes: _Pipes | None = None
        self._newest: _Pipes | None = None  # also while another thread ends it
        self._closed = False
        self._starting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process within a second, even while another thread waits for a reply."""
        with self._starting:
            self._closed = True
        self._abandon(patience=1.0)
        if self._newest is not None:
            self._newest.end(patience=0.0)

    def restart(self) -> None:
        """End the process, so that the next request is the first of a new one."""
        self._abandon(patience=1.0)

    def emit(self, request: Mapping[str, object], timeout: float) -> Path:
        """Send one request and return the path of its trace.

        :param timeout: in seconds, including the time to load the model.
        :raises EmitterError: there is no trace. After a crash, timeout or invalid reply the next request starts a
            new process.
        """
        case = request.get("case")
        case_id = case.get("id") if isinstance(case, Mapping) else None
        out = Path(str(request.get("out")))
        before = _stamp(out)
        try:
            line = json.dumps(request, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise EmitterError("request", f"cannot be written as JSON: {error}") from error
        deadline = time.monotonic() + timeout
        pipes = self._running()
        pipes.send(line)
        try:
            answer = pipes.answer(deadline)
        except queue.Empty:
            self._abandon(patience=0.0)
            raise EmitterError("timeout", f"no reply within {timeout:g} s{pipes.last_line()}") from None
        except BaseException:  # Ctrl-C; a late reply must not be read as that of the next request
            self._abandon(patience=0.0)
            raise
        if answer is None:
            code = self._abandon(patience=1.0)
            raise EmitterError("crash", f"emitter {_ending(code)} before it replied{pipes.last_line()}")
        reply = _parse_reply(answer)
        if reply is None or reply.get("case") not in (case_id, None):
            self._abandon(patience=0.0)
            shown = answer[:200].decode("utf-8", "replace").strip()
            raise EmitterError("protocol", f"invalid reply to case {case_id}: {shown!r}")
        if reply["ok"] is not True:
            kind, told = reply.get("kind"), reply.get("error")
            if not (isinstance(kind, str) and kind in KINDS and isinstance(told, str)):
                raise EmitterError(
                    "protocol",
                    f"the reply to case {case_id} has the kind {one_line(repr(kind))} and the error "
                    f"{one_line(repr(told))}, expected one of {', '.join(KINDS)} and a text",
                )
            told = one_line(told, _LONGEST_ERROR)
            raise self._of_part(told) if kind == "not-built" else EmitterError(kind, told)
        # The trace of an earlier run must not pass for this one.
        after = _stamp(out)
        named = Path(str(reply.get("trace")))
        if reply.get("case") != case_id or named != out or after is None or after == before:
            self._abandon(patience=0.0)
            raise EmitterError("protocol", f"emitter replied ok but wrote no new trace at {out}")
        return out

    def _of_part(self, told: str) -> EmitterError:
        """Why a part was left out of the build is known only here."""
        if absent := [part for part in self._absent if f"`{part}`" in told]:
            return EmitterError("absent", f"this candle-mi has no feature {absent[0]}")
        why = next((error for part, error in self._missing.items() if f"`{part}`" in told), "")
        return EmitterError(
            "not-built", told + (f", which does not compile against this candle-mi: {why}" if why else "")
        )

    def _running(self) -> _Pipes:
        if (pipes := self._pipes) is not None and pipes.process.poll() is not None:
            code = self._abandon(patience=0.0)
            raise EmitterError(
                "crash", f"emitter {_ending(code)} after it replied to another case{pipes.last_line()}"
            )
        with self._starting:
            if self._closed:
                raise EmitterError("crash", "emitter is not started again: the run has ended")
            if self._pipes is None:
                try:
                    self._pipes = self._newest = _Pipes(self._command, self._environment)
                except OSError as error:
                    raise EmitterError("crash", f"emitter cannot be started: {error}") from error
            return self._pipes

    def _abandon(self, patience: float) -> int | None:
        pipes, self._pipes = self._pipes, None
        return pipes.end(patience) if pipes is not None else None


def _stamp(path: Path) -> tuple[int, int] | None:
    """Inode and mtime, which change when another file is renamed over it."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _parse_reply(line: bytes) -> dict[str, object] | None:
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(reply, dict) and isinstance(reply.get("ok"), bool) and "case" in reply:
        return reply
    return None


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its output without ending, and was killed"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"
