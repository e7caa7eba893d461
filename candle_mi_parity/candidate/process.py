"""The emitter as a process: it is kept at arm's length.

It may crash, hang or answer nonsense, and each of those costs the case at hand and nothing else.
"""

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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from candle_mi_parity.errors import ParityError

# How long a killed process is waited for before it is left to the system.
_REAP_SECONDS = 5.0


class EmitterError(ParityError):
    """One request did not yield a trace.

    ``kind`` is the emitter's own word (``request``, ``model``, ``sae``, ``forward``, ``io``, ``panic``), or
    ours for a process that did not answer as agreed: ``crash``, ``timeout``, ``protocol``.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


class _Pipes:
    """One running emitter and the threads that serve its pipes.

    Threads, because a pipe can block in either direction: a process that does not read stalls the writer, one
    that does not write stalls the reader, and neither must stall the suite.
    """

    def __init__(self, command: list[str]) -> None:
        # One line per message is the contract; a backtrace would be noise.
        environment = {**os.environ, "RUST_BACKTRACE": "0"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            process_group=0,  # Ctrl-C is for the run, which ends its emitter; a case must not read as a crash
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
        # Broken pipe: the reader notices that the process is gone.
        with contextlib.suppress(OSError, ValueError):
            while (line := self._requests.get()) is not None:
                pipe.write(line)
                pipe.flush()
        with contextlib.suppress(OSError, ValueError):
            pipe.close()

    def _collect(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in pipe:
                self.replies.put(line)
        self.replies.put(None)

    def _keep_last_lines(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in pipe:
                if line.strip():
                    self._last_lines.append(line)

    def send(self, line: bytes) -> None:
        self._requests.put(line)

    def last_line(self) -> str:
        """The last line on stderr, cut to a readable length; empty when there was none."""
        self._stderr_thread.join(timeout=1.0)
        words = self._last_lines
        return words[-1].decode("utf-8", "replace").strip()[:400] if words else ""

    def end(self, patience: float) -> int | None:
        """Let the process finish for ``patience`` seconds, then kill it; its exit code, if it can be had."""
        self._requests.put(None)
        try:
            return self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
        try:
            return self.process.wait(timeout=_REAP_SECONDS)
        except subprocess.TimeoutExpired:  # stuck in the kernel; daemon threads do not keep us either
            return None


class EmitterProcess:
    """A running emitter that answers many requests, started when first needed and again after a failure.

    >>> with EmitterProcess(built.path) as emitter:            # doctest: +SKIP
    ...     trace = emitter.emit(request, timeout=600)
    """

    def __init__(self, binary: Path) -> None:
        self._command = [str(binary)]
        self._pipes: _Pipes | None = None
        self._closed = False
        self._starting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, also under a request of another thread; it is given a second to do so by itself."""
        with self._starting:
            self._closed = True
        self._abandon(patience=1.0)

    def emit(self, request: Mapping[str, object], timeout: float) -> Path:
        """Run one request (see the trace contract) and return the path of its trace.

        ``timeout`` is in seconds and covers loading the model. Raises :class:`EmitterError`; where the
        process can no longer be trusted it is killed, and the next request gets a new one.
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
            answer = pipes.replies.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self._abandon(patience=0.0)
            said = f"no reply within {timeout:g} s{_quoted(pipes.last_line())}"
            raise EmitterError("timeout", said) from None
        except BaseException:  # Ctrl-C: a late reply must not be taken for the next request's
            self._abandon(patience=0.0)
            raise
        if answer is None:
            code = self._abandon(patience=1.0)
            raise EmitterError("crash", f"emitter {_ending(code)}{_quoted(pipes.last_line())}")
        reply = _parse_reply(answer)
        if reply is None or reply.get("case") not in (case_id, None):
            self._abandon(patience=0.0)
            shown = answer[:200].decode("utf-8", "replace").strip()
            raise EmitterError("protocol", f"not a reply to case {case_id}: {shown!r}")
        if reply["ok"] is not True:
            raise EmitterError(str(reply.get("kind", "protocol")), str(reply.get("error", "no reason given")))
        # Compared with what lay there before: a trace of an earlier run must not pass for this one's.
        after = _stamp(out)
        named = Path(str(reply.get("trace")))
        if reply.get("case") != case_id or named != out or after is None or after == before:
            self._abandon(patience=0.0)
            raise EmitterError("protocol", f"emitter replied ok but wrote no new trace at {out}")
        return out

    def _running(self) -> _Pipes:
        if self._pipes is not None and self._pipes.process.poll() is not None:
            self._abandon(patience=0.0)
        with self._starting:
            if self._closed:
                raise EmitterError("crash", "emitter is not started again: the run has ended")
            if self._pipes is None:
                try:
                    self._pipes = _Pipes(self._command)
                except OSError as error:
                    raise EmitterError("crash", f"emitter cannot be started: {error}") from error
            return self._pipes

    def _abandon(self, patience: float) -> int | None:
        pipes, self._pipes = self._pipes, None
        return pipes.end(patience) if pipes is not None else None


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes whenever a file is replaced by renaming another over it."""
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
        return "closed its output and could not be killed"
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"exited with code {code} before it replied"


def _quoted(last_line: str) -> str:
    return f"; last line on stderr: {last_line}" if last_line else ""
