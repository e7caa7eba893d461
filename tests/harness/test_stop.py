"""A run that is stopped reports its results, leaves no process behind, and removes an older report."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import pytest

from candle_mi_parity.candidate import cargo
from candle_mi_parity.cli import cli
from candle_mi_parity.errors import Stopped
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.release import StoredRelease
from tests.support.stored import INDEX

CASES = [case.id for case in load_cases() if fnmatch(case.id, "[gl]*/hub")]
TOKEN = "PARITY_TEST_TOKEN"

HANGING_TRUTH = """
import itertools, time
from pathlib import Path
from candle_mi_parity.cli.cli import main
from candle_mi_parity.oracle.oracle import Oracle

calls, compute = itertools.count(), Oracle.truth

def truth(self, mode="free"):
    if next(calls) < {done}:
        return compute(self, mode)
    Path({hung!r}).touch()
    time.sleep(600)

Oracle.truth = truth
main()
"""
"""A run that computes ``done`` truths and hangs in the next one."""

HANGING_EMITTER = """
import json
from pathlib import Path
from candle_mi_parity.candidate import sources
from candle_mi_parity.candidate.build import BuiltEmitter
from candle_mi_parity.cli.cli import main

identity = json.loads({identity!r})
sources.build = lambda *_, **__: BuiltEmitter(Path({emitter!r}), {{"candle_mi": identity}})
main()
"""


def alive(token: str) -> list[int]:
    """The processes of a run, itself included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if token.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def kill(token: str) -> None:
    """End what is left of a run; a process may end by itself first."""
    for process in alive(token):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


class Run:
    """A run in a separate process."""

    def __init__(self, directory: Path, code: str, candidate: str) -> None:
        self.out, self.hung, self.token = directory / "out", directory / "hung", uuid.uuid4().hex
        arguments = ["run", "--candidate", candidate, "--cases", "[gl]*/hub", "--out", str(self.out)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "PARITY_CACHE": str(cache_root()), TOKEN: self.token},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            # A background job of a shell ignores SIGINT, which is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )

    def stop(self, number: signal.Signals) -> str:
        """Send a signal to the process group when the run hangs; returns its stderr."""
        until = time.monotonic() + 300
        while not self.hung.exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(self.process.pid, number)
        said = self.process.communicate(timeout=300)[1]
        until = time.monotonic() + 300
        while alive(self.token) and time.monotonic() < until:
            time.sleep(0.05)
        left = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive(self.token)]
        assert not left, "processes were left behind"
        return said

    def check_report(self, said: str) -> int:
        """Check exit code and report; returns the number of judged cases."""
        assert self.process.returncode == 2 and "Traceback" not in said
        report = json.loads((self.out / "report.json").read_text())
        judged = [case["id"] for case in report["cases"]]
        assert report["verdict"] == "ERROR"
        assert report["fault"] == f"interrupted after {len(judged)} of {len(CASES)} cases" and report["fault"] in said
        assert sorted([*judged, *report["skipped"]]) == sorted(CASES)
        assert all(case["status"] == "PASS" and case["compared"] > 40 for case in report["cases"])
        return len(judged)


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """A list of runs whose processes are killed in the end."""
    runs: list[Run] = []
    yield runs
    for run in runs:
        kill(run.token)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_does_not_wait_for_a_truth_and_keeps_the_results(
    runs: list[Run], tmp_path: Path, number: signal.Signals
) -> None:
    done = 2 if number == signal.SIGINT else 0
    runs.append(run := Run(tmp_path, HANGING_TRUTH.format(hung=str(tmp_path / "hung"), done=done), "stored:0.2.2"))
    assert run.check_report(run.stop(number)) <= done


@pytest.mark.parametrize(("number", "hang"), [(signal.SIGTERM, "sleep 600"), (signal.SIGKILL, "cat >&2")])
def test_a_stop_ends_the_emitter_and_leaves_no_older_report(
    runs: list[Run], tmp_path: Path, number: signal.Signals, hang: str
) -> None:
    emitter = tmp_path / "emitter"
    emitter.write_text(f"#!/bin/sh\ntouch {tmp_path / 'hung'}\nexec {hang}\n")
    emitter.chmod(0o755)
    older = [tmp_path / "out" / name for name in ("report.json", "report.html", "junit.xml", "summary.md")]
    (tmp_path / "out").mkdir()
    for path in older:
        path.write_text("PASS")
    identity = StoredRelease(INDEX).release.candle_mi.model_dump_json()
    runs.append(run := Run(tmp_path, HANGING_EMITTER.format(identity=identity, emitter=str(emitter)), "0.2.2"))
    said = run.stop(number)
    if number == signal.SIGTERM:
        assert run.check_report(said) == 0
    else:
        assert not [path.name for path in older if path.exists()]


HUNT = """
import sys
from pathlib import Path
from candle_mi_parity.cli.cli import main
from candle_mi_parity.hunt import hunt

hunt.MEMORY = Path({memory!r})
sys.argv[:1] = ["candle-mi-parity", "hunt", "--candidate", "torch", "--families", "llama", "--inputs", "100000"]
main()
"""
"""A hunt whose processes have their files in a directory of the test."""


def at_work(memory: Path) -> bool:
    """Whether a process of a hunt has written an input; each is removed when it is judged, also during this look."""
    try:
        return bool(list(memory.glob("*/*/inputs/models/*/*.safetensors")))
    except FileNotFoundError:  # Python 3.11 does not skip a directory that is gone when it is listed
        return False


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_hunt_that_is_stopped_twice_leaves_no_process_and_no_file(tmp_path: Path, number: signal.Signals) -> None:
    memory, token = tmp_path / "memory", uuid.uuid4().hex
    memory.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HUNT.format(memory=str(memory)), "--out", str(tmp_path / "out")],
        env={**os.environ, "PARITY_CACHE": str(cache_root()), TOKEN: token},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    try:
        until = time.monotonic() + 300
        while not at_work(memory):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        for _ in range(2):
            process.send_signal(number)
            time.sleep(0.05)
        assert process.wait(300) in (2, -number)
        until = time.monotonic() + 300
        while (alive(token) or any(memory.iterdir())) and time.monotonic() < until:
            time.sleep(0.05)
        assert not alive(token) and not any(memory.iterdir())
    finally:
        kill(token)


WRITING = """
import multiprocessing, threading, time
from itertools import count
from pathlib import Path
from candle_mi_parity.hunt.worker import _end_with_the_hunt

def write():
    threading.Thread(target=_end_with_the_hunt, args=[Path({shared!r})], daemon=True).start()
    for number in count():
        path = Path({shared!r}) / str(number % 50) / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

multiprocessing.get_context("fork").Process(target=write).start()
time.sleep(600)
"""
"""A hunt with one process, which makes its directories again when they are removed."""


def test_a_file_that_is_written_while_a_killed_hunt_is_removed_is_removed_too(tmp_path: Path) -> None:
    shared, token = tmp_path / "shared", uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING.format(shared=str(shared))], env={**os.environ, TOKEN: token}
    )
    until = time.monotonic() + 300
    while not (shared / "49" / "999").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    while alive(token) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(token) and not shared.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_outside_a_run_is_one_line_and_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # a background job may ignore it
    monkeypatch.setattr(cli, "app", lambda: os.kill(os.getpid(), number))
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        signal.signal(number, before)
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip() == f"candle-mi-parity: stopped by {number.name}"


CARGO = """#!/bin/sh
sleep 600 &
echo $$ $! >{pids}
echo "   Compiling candle-core v0.11.0" >&2
wait
"""


def running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_stopped_build_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cargo, "HEARTBEAT_SECONDS", 0.2)
    program, pids = tmp_path / "cargo", tmp_path / "pids"
    program.write_text(CARGO.format(pids=pids))
    program.chmod(0o755)

    def log(line: str) -> None:
        if pids.is_file() and pids.read_text().endswith("\n"):
            raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        cargo.run_cargo([str(program)], os.environ, tmp_path / "build.log", log)
    started = [int(word) for word in pids.read_text().split()]
    until = time.monotonic() + 300
    while any(map(running, started)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not [process for process in started if running(process)]
