"""Faults half-way: a killed emitter, a full disk, a truncated file; and two runs on one cache.

The case is one line of ERROR, nothing half-written is read as whole, and the next case and the next run are right.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_mi_parity.candidate import sources
from candle_mi_parity.candidate.build import BuiltEmitter, build
from candle_mi_parity.candidate.sources import LiveSource, Source, open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.files.cache import publish
from candle_mi_parity.files.json_out import ReportError, write_text
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.paths import cache_root
from tests.support.full_disk import largest_file
from tests.support.planting import CASES, real
from tests.support.stored import stored_copy

CASE = CASES["llama/hub"]
SPEC = "0.2.2"


def judged(source: Source, cache: Path | None = None) -> CaseResult:
    return judge_case(CASE, source, SPEC, cache or cache_root(), NOTHING_KNOWN, Progress()).result


def error_of(result: CaseResult) -> str:
    assert result.status is Status.ERROR, result.message()
    assert result.error and "\n" not in result.error, result.error
    assert not result.tensors, "it was judged in spite of the error"
    return result.error


def right(result: CaseResult) -> None:
    assert result.status is Status.PASS, result.message()
    assert result.compared == 44


# --- the emitter ----------------------------------------------------------------------------------

WRAPPER = """#!/bin/sh
# The first start is limited, the next is not.
if [ -e {limit} ]; then
    {first}
    ulimit -f "$(cat {limit})"
    rm {limit}
fi
exec {emitter}
"""


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], Source]:
    """The live source, whose first emitter cannot write a file longer than so many blocks of 512 bytes: it is killed
    while it writes, or is told that the disk is full."""

    def make(blocks: int, first: str) -> Source:
        built = build(parse_candidate(SPEC), cache_root(), print)
        limit, wrapper = tmp_path / "limit", tmp_path / "emitter"
        limit.write_text(str(blocks))
        wrapper.write_text(WRAPPER.format(limit=limit, first=first, emitter=built.path))
        wrapper.chmod(0o755)
        monkeypatch.setattr(sources, "build", lambda *_: BuiltEmitter(wrapper, built.identity))
        return open_source(parse_candidate(SPEC), cache_root(), tmp_path / "traces", print)

    return make


@pytest.mark.rust
@pytest.mark.parametrize("blocks", [0, 100])
def test_an_emitter_killed_while_it_writes_costs_one_case(
    limited: Callable[[int, str], Source], tmp_path: Path, blocks: int
) -> None:
    with limited(blocks, "") as source:
        assert "crash: emitter was ended by SIGXFSZ" in error_of(judged(source))
        left = [path.name for path in (tmp_path / "traces").rglob("*") if path.is_file() and path.name[0] != "."]
        assert left == [], "a half trace has the name of a whole one"
        right(judged(source))


@pytest.mark.rust
def test_a_full_disk_for_the_trace_costs_one_case(limited: Callable[[int, str], Source], tmp_path: Path) -> None:
    with limited(100, "trap '' XFSZ") as source:
        assert "io: " in (said := error_of(judged(source))) and "File too large" in said
        assert list((tmp_path / "traces").rglob("*.*")) == [], "something half-written was left"
        assert isinstance(source, LiveSource)
        source.emitter._abandon(0)  # space was made
        right(judged(source))


# --- truncated files, a full disk -----------------------------------------------------------------


def stored_source(tmp_path: Path) -> Source:
    """One case of the stored release in a directory of its own, from which files may vanish."""
    stored_copy(tmp_path / "stored", CASE.id)
    return open_source(parse_candidate(f"stored:{tmp_path / 'stored'}"), cache_root(), tmp_path, print)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds this case and nothing else."""
    there = real(CASE.id)
    for directory in (there.subject.model_dir, there.inputs.parent, there.inputs.parent.with_name("free")):
        copy = tmp_path / "cache" / directory.relative_to(cache_root())
        copy.mkdir(parents=True)
        for path in directory.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
    return tmp_path / "cache"


def cached(cache: Path, name: str) -> Path:
    (path,) = cache.rglob(name)
    return path


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


FILES = ["truth.safetensors", "inputs.safetensors", "model.safetensors", "config.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.999])
def test_a_truncated_cache_entry_is_an_error_until_it_is_deleted(
    tmp_path: Path, cache: Path, name: str, share: float
) -> None:
    source, path = stored_source(tmp_path), cached(cache, name)
    os.truncate(path, int(path.stat().st_size * share))
    error_of(judged(source, cache))
    empty(path.parent)
    right(judged(source, cache))


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_for_the_cache_is_an_error_and_leaves_nothing(tmp_path: Path, cache: Path, name: str) -> None:
    source, path = stored_source(tmp_path), cached(cache, name)
    size = path.stat().st_size
    empty(path.parent)
    with largest_file(size - 1):
        assert "cannot write" in error_of(judged(source, cache))
    assert not [held for held in path.parent.rglob("*") if held.is_file()]
    assert not list(cache.rglob(".*.making"))
    right(judged(source, cache))


# --- whole or absent, and once ---------------------------------------------------------------------


def published(tmp_path: Path) -> Path:
    def make(out: Path) -> None:
        (out / "weights").write_bytes(b"w" * 5000)

    return publish(tmp_path / "models" / "key", make)


def reported(tmp_path: Path) -> Path:
    write_text("whole", tmp_path / "report.json")
    return tmp_path / "report.json"


@pytest.mark.parametrize("write", [published, reported])
def test_what_is_renamed_was_flushed_before_and_its_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    flushed: list[int] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", record)
    target = write(tmp_path)
    made = [path.stat().st_ino for path in (target, *target.rglob("*"))]
    assert set(made) <= set(flushed[:-1]) and flushed[-1] == target.parent.stat().st_ino


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_what_was_there_stays_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    path = reported(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, point, full)
    with pytest.raises(ReportError, match="No space left on device"):
        write_text("half", path)
    assert path.read_text() == "whole"
    assert [held.name for held in tmp_path.iterdir()] == ["report.json"]


CODE = """
import sys, time
from pathlib import Path
from candle_mi_parity.files.cache import publish

shared = Path(sys.argv[1])

def make(out):
    with (shared / "made").open("a") as file:
        file.write("once\\n")
    time.sleep(1)
    (out / "weights").write_text("whole")

(shared / f"here-{sys.argv[2]}").touch()
while len(list(shared.glob("here-*"))) < 2:
    time.sleep(0.005)
print((publish(shared / "cache" / "key", make) / "weights").read_text())
"""


def test_an_entry_of_the_cache_is_made_once(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path), str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["whole", "whole"]
    assert (tmp_path / "made").read_text() == "once\n"
