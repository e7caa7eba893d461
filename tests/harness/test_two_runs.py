"""Two runs that share a cache: what both need is made once, and both get it whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from candle_mi_parity.spec.paths import ROOT

TOGETHER = """
import os, sys, time
from pathlib import Path
shared = Path(sys.argv[1])
def note(name, word):
    with (shared / name).open("a") as file:
        file.write(word + "\\n")
def meet():
    note("here", str(os.getpid()))
    while len((shared / "here").read_text().split()) < 2:
        time.sleep(0.005)
"""

PUBLISH = """
from candle_mi_parity.files import cache
from candle_mi_parity.files.cache import publish
patience = 1
if len(sys.argv) > 2:
    patience = 60  # until the other is in as well, however late
    class NoLock:
        def __init__(self, path): pass
        def release(self): pass
        def acquire(self):
            try:
                os.close(os.open(shared / "first", os.O_CREAT | os.O_EXCL))
            except FileExistsError:  # comes in while the first is at work, and not in the same instant
                while not (shared / "made").exists():
                    time.sleep(0.005)
    cache.FileLock = NoLock
def make(out):
    note("made", "once")
    until = time.monotonic() + patience
    while time.monotonic() < until and (shared / "made").read_text().count("once") < 2:
        time.sleep(0.005)
    (out / "weights").write_text("whole")
meet()
print(publish(shared / "cache" / "key", make) / "weights")
"""

BUILD = """
from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.candidate import parse_candidate
meet()
print(build(parse_candidate("0.2.2"), shared / "cache", lambda line: None).path)
"""

CARGO = """#!/bin/sh
echo once >>{shared}/made
sleep 1
mkdir -p "$CARGO_TARGET_DIR/release"
cp {shared}/emitter "$CARGO_TARGET_DIR/release/parity-emitter"
"""


def both(code: str, shared: Path, *arguments: str, path: str = "") -> list[str]:
    """What two processes printed that did the same thing at the same time."""
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", TOGETHER + code, str(shared), *arguments]
    runs = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0] or arguments, told
    return [out.strip() for out, _ in told]


def made(shared: Path) -> int:
    return (shared / "made").read_text().count("once")


def test_an_entry_of_the_cache_is_made_once(tmp_path: Path) -> None:
    told = both(PUBLISH, tmp_path)
    assert made(tmp_path) == 1
    assert [Path(path).read_text() for path in told] == ["whole", "whole"]


def test_without_a_lock_it_would_be_made_twice(tmp_path: Path) -> None:
    both(PUBLISH, tmp_path, "without a lock")
    assert made(tmp_path) == 2


def test_an_emitter_is_built_once(tmp_path: Path) -> None:
    identity = json.loads((ROOT / "rust_outputs" / "0.2.2" / "candidate.json").read_text())
    (tmp_path / "emitter").write_text(f"#!/bin/sh\necho '{json.dumps({'candle_mi': identity})}'\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "cargo").write_text(CARGO.format(shared=tmp_path))
    (tools / "rustc").write_text("#!/bin/sh\necho rustc 9.9.9\n")
    for program in (tmp_path / "emitter", tools / "cargo", tools / "rustc"):
        program.chmod(0o755)
    one, other = both(BUILD, tmp_path, path=str(tools))
    assert made(tmp_path) == 1
    assert one == other and os.access(one, os.X_OK)
