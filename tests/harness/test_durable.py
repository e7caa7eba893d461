"""Power loss: whatever is found under a name was flushed to disk before it got the name, and the name after it.

The calls are recorded as the kernel would get them: a file counts as kept with the size that it had when it was
flushed, so that what was written later, or renamed unflushed, is what a power loss would take.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_mi_parity.candidate import build as builder
from candle_mi_parity.candidate.candidate import parse_candidate
from candle_mi_parity.candidate.sources import request
from candle_mi_parity.candidate.store import store_trace
from candle_mi_parity.files import atomic as durable
from candle_mi_parity.files.cache import publish
from candle_mi_parity.files.json_out import ReportError, write_json, write_text
from candle_mi_parity.spec.paths import ROOT, cache_root
from candle_mi_parity.trace.trace import Trace
from tests.harness.test_build import committed
from tests.support.planting import CASES, real

Kept = dict[int, int]


class Disk:
    """What a power loss would leave, from the calls of fsync and rename."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._kept: Kept = {}
        self._unnamed: dict[Path, str] = {}
        """Names whose directory was not flushed since, or whose contents had not been when they got it."""
        fsync, replace, rename = os.fsync, os.replace, os.rename

        def flushed(descriptor: int) -> None:
            fsync(descriptor)
            status = os.fstat(descriptor)
            self._kept[status.st_ino] = status.st_size
            directory = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            for path, why in list(self._unnamed.items()):
                if path.parent == directory and why == "directory":
                    del self._unnamed[path]

        def named(call: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
            def renamed(source: Path, target: Path) -> None:
                lost = self._lost(Path(source))
                call(source, target)
                self._unnamed[Path(target)] = f"not flushed: {lost[0].name}" if lost else "directory"

            return renamed

        monkeypatch.setattr(os, "fsync", flushed)
        monkeypatch.setattr(os, "replace", named(replace))
        monkeypatch.setattr(os, "rename", named(rename))

    def _lost(self, made: Path) -> list[Path]:
        below = [made, *made.rglob("*")] if made.is_dir() else [made]
        return [path for path in below if self._kept.get(path.stat().st_ino) != path.stat().st_size]

    def loss(self, target: Path) -> str:
        """What a power loss would take of a name; empty when it is kept whole."""
        if target in self._unnamed:
            return self._unnamed[target]
        if lost := self._lost(target):
            return f"not flushed: {lost[0].name}"
        return "" if target.stat().st_ino in self._kept else "never renamed"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def make(out: Path) -> None:
    (out / "deep").mkdir()
    (out / "deep" / "weights").write_bytes(b"w" * 5000)
    (out / "config.json").write_text("{}")


def published(tmp_path: Path) -> Path:
    return publish(tmp_path / "models" / "key", make)


def reported(tmp_path: Path) -> Path:
    write_json({"verdict": "PASS"}, tmp_path / "report.json")
    return tmp_path / "report.json"


def installed(tmp_path: Path) -> Path:
    (tmp_path / "made").write_bytes(b"\x7fELF" * 1000)
    builder._install(tmp_path / "made", tmp_path / "emitters" / "parity-emitter")
    return tmp_path / "emitters" / "parity-emitter"


def stored(tmp_path: Path) -> Path:
    source = Trace(ROOT / "rust_outputs" / "0.2.2" / "llama" / "hub.json")
    store_trace(source, CASES["llama/hub"], tmp_path / "llama" / "hub.json")
    return tmp_path / "llama" / "hub.json"


def stored_tensors(tmp_path: Path) -> Path:
    return stored(tmp_path).with_suffix(".safetensors")


def mirrored(tmp_path: Path) -> Path:
    builder._fetch(parse_candidate(committed(tmp_path / "repository")), tmp_path / "cache")
    (mirror,) = (path for path in (tmp_path / "cache" / "git").iterdir() if path.is_dir())
    return mirror


@pytest.mark.parametrize("writer", [published, reported, installed, stored, stored_tensors, mirrored])
def test_what_has_a_name_survives_a_power_loss(disk: Disk, tmp_path: Path, writer: Callable[[Path], Path]) -> None:
    target = writer(tmp_path)
    assert disk.loss(target) == ""


def in_place(made: Path, target: Path) -> None:
    shutil.copytree(made, target)


def unflushed(made: Path, target: Path) -> None:
    made.replace(target)
    durable._flush(target.parent)


def unflushed_directory(made: Path, target: Path) -> None:
    whole_put = durable.put
    elsewhere = made.with_name("elsewhere")
    whole_put(made, elsewhere)
    elsewhere.replace(target)


def flushed_too_early(made: Path, target: Path) -> None:
    durable._flush(made / "config.json")
    (made / "config.json").write_text("{} ")
    for path in (made / "deep" / "weights", made / "deep", made):
        durable._flush(path)
    made.replace(target)
    durable._flush(target.parent)


@pytest.mark.parametrize(
    ("weakness", "taken"),
    [
        (in_place, "not flushed: "),
        (unflushed, "not flushed: "),
        (unflushed_directory, "directory"),
        (flushed_too_early, "not flushed: config.json"),
    ],
)
def test_each_weakness_is_seen(
    disk: Disk, tmp_path: Path, weakness: Callable[[Path, Path], None], taken: str
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    make(made)
    weakness(made, tmp_path / "target")
    assert disk.loss(tmp_path / "target").startswith(taken)


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_what_was_there_stays_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    path = tmp_path / "report.json"
    write_text("whole", path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, point, full)
    with pytest.raises(ReportError, match="No space left on device"):
        write_text("half", path)
    assert path.read_text() == "whole"
    assert [held.name for held in tmp_path.iterdir()] == ["report.json"]


# --- the emitter ----------------------------------------------------------------------------------


def renames_unflushed(calls: str) -> list[str]:
    """Names given, in a log of strace, to what was not flushed since it was opened for writing."""
    path_of: dict[str, str] = {}
    dirty: set[str] = set()
    lost = []
    for line in calls.splitlines():
        if found := re.search(r'openat\(.*?"(.+?)", (\S+?)(?:, \d+)?\) = (\d+)', line):
            path, flags, descriptor = found.groups()
            path_of[descriptor] = path
            if "O_CREAT" in flags or "O_TRUNC" in flags:
                dirty.add(path)
        elif found := re.search(r"f(?:data)?sync\((\d+)\) *= 0", line):
            dirty.discard(path_of.get(found[1], ""))
        elif found := re.search(r'rename\w*\(.*?"(.+?)", .*?"(.+?)".*\) = 0', line):
            lost += [found[2]] if found[1] in dirty else []
    return lost


def traced(program: Path, request: dict[str, object], log: Path) -> str:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace on PATH: it shows what the emitter asks of the kernel")
    command = [strace, "-f", "-o", str(log), "-e", "trace=openat,fsync,fdatasync,rename,renameat,renameat2"]
    done = subprocess.run(
        [*command, str(program)], input=json.dumps(request) + "\n", capture_output=True, text=True, check=False
    )
    assert '"ok"' in done.stdout, done.stderr
    return log.read_text()


CARELESS = """
import json, os, sys
out = json.loads(sys.stdin.readline())["out"]
with open(out + ".tmp", "w") as file:
    file.write("{}")
os.rename(out + ".tmp", out)
print(json.dumps({"ok": True}))
"""


def test_a_rename_of_what_was_not_flushed_is_seen(tmp_path: Path) -> None:
    script = tmp_path / "careless"
    script.write_text(f"#!{sys.executable}\n{CARELESS}")
    script.chmod(0o755)
    calls = traced(script, {"out": str(tmp_path / "o.json")}, tmp_path / "log")
    assert renames_unflushed(calls) == [str(tmp_path / "o.json")]


@pytest.mark.rust
def test_the_emitter_flushes_what_it_renames(tmp_path: Path) -> None:
    there, out = real("llama/hub"), tmp_path / "trace.json"
    asked = request(there.subject, "free", there.inputs, out, "cpu")
    calls = traced(builder.build(parse_candidate("0.2.2"), cache_root(), print).path, asked, tmp_path / "log")
    assert calls.count("rename(") == 2 and Trace(out).entries
    assert renames_unflushed(calls) == []
