"""A run that is stopped reports its results, leaves no process behind, and removes an older report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from candle_mi_parity.candidate import cargo
from candle_mi_parity.cli import cli
from candle_mi_parity.errors import Stopped
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.release import StoredRelease
from tests.support.stored import INDEX, as_emitted

HUB = [case.id for case in load_cases() if fnmatch(case.id, "[gl]*/hub")]
TOKEN = "PARITY_TEST_TOKEN"

EMITTER = """#!{python}
import json, shutil, sys, time
from pathlib import Path
for _ in range(2):
    request = json.loads(sys.stdin.readline())
    out, kept = Path(request["out"]), Path({stored!r}) / request["case"]["id"]
    for end in (".safetensors", ".json"):
        shutil.copy(f"{{kept}}{{end}}", f"{{out}}.new")
        Path(f"{{out}}.new").rename(out.with_suffix(end))
    print(json.dumps({{"case": request["case"]["id"], "ok": True, "trace": str(out)}}), flush=True)
sys.stdin.readline()
Path({hung!r}).touch()
{hang}
"""

COMMAND = """
import json
from pathlib import Path
from candle_mi_parity.candidate import sources
from candle_mi_parity.candidate.build import BuiltEmitter
from candle_mi_parity.cli.cli import main

identity = json.loads({identity!r})
sources.build = lambda *_: BuiltEmitter(Path({emitter!r}), {{"candle_mi": identity}})
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


def gone(token: str) -> bool:
    for _ in range(100):
        if not alive(token):
            return True
        time.sleep(0.05)
    return False


SLOW = """
import time
from pathlib import Path
from candle_mi_parity.cli.cli import main
from candle_mi_parity.oracle.oracle import Oracle

def truth(self, mode="free"):
    Path({hung!r}).touch()
    time.sleep(600)

Oracle.truth = truth
main()
"""
"""A run in which computing a truth takes ten minutes."""


class Run:
    """A run in a process of its own.

    :param code: of the process.
    :param candidate: what it judges.
    """

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

    def wait_for_the_hang(self) -> None:
        until = time.monotonic() + 120
        while not self.hung.exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)

    def ends(self) -> str:
        """Wait for the end of the process; returns its stderr."""
        return self.process.communicate(timeout=60)[1]


def run_of_an_emitter(directory: Path, hang: str) -> Run:
    """A run whose emitter answers two cases and hangs in the third; by then one of the others is judged."""
    emitter, stored, hung = directory / "emitter", str(directory / "stored"), str(directory / "hung")
    for case_id in HUB:
        as_emitted(directory / "stored", case_id)
    emitter.write_text(EMITTER.format(python=sys.executable, stored=stored, hung=hung, hang=hang))
    emitter.chmod(0o755)
    identity = StoredRelease(INDEX).release.candle_mi.model_dump_json()
    return Run(directory, COMMAND.format(identity=identity, emitter=str(emitter)), "0.2.2")


@pytest.fixture
def leave_nothing() -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for run in runs:
        for process in alive(run.token):
            os.kill(process, signal.SIGKILL)


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_a_hung_case_ends_the_run_and_keeps_its_results(
    leave_nothing: list[Run], tmp_path: Path, number: signal.Signals
) -> None:
    run = run_of_an_emitter(tmp_path, "time.sleep(600)")
    leave_nothing.append(run)
    run.wait_for_the_hang()
    os.killpg(run.process.pid, number)
    said = run.ends()
    assert run.process.returncode == 2
    assert "Traceback" not in said
    told = json.loads((run.out / "report.json").read_text())
    assert told["verdict"] == "ERROR" and told["fault"] in said
    judged = {case["id"]: case for case in told["cases"]}
    assert told["fault"] == f"interrupted after {len(judged)} of {len(judged) + len(told['skipped'])} cases"
    assert judged and all(case["status"] == "PASS" and case["compared"] > 40 for case in judged.values())
    assert not set(judged) & set(told["skipped"])
    assert gone(run.token), "a process was left behind"


def test_a_stop_does_not_wait_for_a_truth(leave_nothing: list[Run], tmp_path: Path) -> None:
    run = Run(tmp_path, SLOW.format(hung=str(tmp_path / "hung")), "stored:0.2.2")
    leave_nothing.append(run)
    run.wait_for_the_hang()
    os.kill(run.process.pid, signal.SIGTERM)
    said = run.ends()
    assert run.process.returncode == 2 and "Traceback" not in said
    told = json.loads((run.out / "report.json").read_text())
    assert told["fault"] == f"interrupted after 0 of {len(HUB)} cases" and told["fault"] in said
    assert gone(run.token), "a process was left behind"


def test_a_killed_run_leaves_no_older_report(leave_nothing: list[Run], tmp_path: Path) -> None:
    run = run_of_an_emitter(tmp_path, "sys.stdin.read()")
    leave_nothing.append(run)
    run.out.mkdir()
    older = [run.out / name for name in ("report.json", "report.html", "junit.xml", "summary.md")]
    for path in older:
        path.write_text("PASS")
    run.wait_for_the_hang()
    os.kill(run.process.pid, signal.SIGKILL)
    run.ends()
    assert not [path.name for path in older if path.exists()]
    assert gone(run.token), "the emitter outlived the run that it served"


@pytest.fixture
def handlers() -> Iterator[None]:
    """Default signal handlers, also in a background job."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_outside_a_run_is_one_line_and_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    monkeypatch.setattr(cli, "app", lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        cli.main()
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
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        cargo.run_cargo([str(program)], os.environ, tmp_path / "build.log", log)
    started = [int(word) for word in pids.read_text().split()]
    until = time.monotonic() + 5
    while any(map(running, started)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not [process for process in started if running(process)]
