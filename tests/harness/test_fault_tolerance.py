"""A killed emitter, a full disk or a truncated file is an error of one case; the next run is correct."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from candle_mi_parity.candidate import sources
from candle_mi_parity.candidate.build import BuiltEmitter, build
from candle_mi_parity.candidate.sources import LiveSource, open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.files.cache import publish
from candle_mi_parity.files.json_out import ReportError, write_text
from candle_mi_parity.spec.paths import cache_root
from tests.support.full_disk import largest_file
from tests.support.planting import CASES, judged, real
from tests.support.stored import stored_copy

CASE = CASES["llama/hub"]
SPEC = "0.2.2"


def error_of(result: CaseResult) -> str:
    assert result.status is Status.ERROR and not result.tensors, result.message()
    assert result.error and "\n" not in result.error, result.error
    return result.error


def passes(result: CaseResult) -> None:
    assert result.status is Status.PASS and result.compared == 44, result.message()


# --- the emitter ----------------------------------------------------------------------------------

WRAPPER = """#!/bin/sh
# Only the first start is limited.
if [ -e {limit} ]; then
    rm {limit}
    {trap}
    ulimit -f 100
fi
exec {emitter}
"""


@pytest.mark.rust
@pytest.mark.parametrize(
    ("trap", "expected"), [("", "crash: emitter was ended by SIGXFSZ"), ("trap '' XFSZ", "File too large")]
)
def test_a_trace_that_cannot_be_written_costs_one_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str, expected: str
) -> None:
    built = build(parse_candidate(SPEC), cache_root(), print)
    limit, wrapper, traces = tmp_path / "limit", tmp_path / "emitter", tmp_path / "traces"
    limit.touch()
    wrapper.write_text(WRAPPER.format(limit=limit, trap=trap, emitter=built.path))
    wrapper.chmod(0o755)
    monkeypatch.setattr(sources, "build", lambda *_, **__: BuiltEmitter(wrapper, built.identity))
    with open_source(parse_candidate(SPEC), cache_root(), traces, print) as source:
        assert expected in error_of(judged(CASE, source))
        assert not [path for path in traces.rglob("*.*") if path.is_file() and path.name[0] != "."]
        assert isinstance(source, LiveSource)
        source.emitter._abandon(0)  # the next emitter has no limit
        passes(judged(CASE, source))


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with this case only."""
    there = real(CASE.id)
    for directory in (there.subject.model_dir, there.inputs.parent, there.inputs.parent.with_name("free")):
        copy = tmp_path / "cache" / directory.relative_to(cache_root())
        copy.mkdir(parents=True)
        for path in directory.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["truth.safetensors", "inputs.safetensors", "model.safetensors", "config.json"])
def test_a_damaged_or_unwritable_cache_entry_is_an_error_until_it_can_be_made_again(
    tmp_path: Path, cache: Path, name: str
) -> None:
    stored_copy(tmp_path / "stored", CASE.id)
    source = open_source(parse_candidate(f"stored:{tmp_path / 'stored'}"), cache_root(), tmp_path, print)
    (path,) = cache.rglob(name)
    size = path.stat().st_size
    for length in (int(0.999 * size), 0):
        os.truncate(path, length)
        error_of(judged(CASE, source, cache))
    for held in path.parent.iterdir():
        held.unlink()
    with largest_file(size - 1):
        assert "cannot write" in error_of(judged(CASE, source, cache))
    assert not [held for held in path.parent.rglob("*") if held.is_file()] and not list(cache.rglob(".*.making"))
    passes(judged(CASE, source, cache))


def test_an_entry_of_the_cache_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(out: Path) -> None:
        made.append(out)
        time.sleep(0.2)
        (out / "weights").write_text("complete")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: (publish(tmp_path / "key", make) / "weights").read_text(), range(4)))
    assert found == ["complete"] * 4 and len(made) == 1


# --- atomic writes --------------------------------------------------------------------------------


def published(tmp_path: Path) -> Path:
    return publish(tmp_path / "models" / "key", lambda out: (out / "weights").touch())


def reported(tmp_path: Path) -> Path:
    write_text("complete", tmp_path / "report.json")
    return tmp_path / "report.json"


@pytest.mark.parametrize("write", [published, reported])
def test_files_are_flushed_before_the_rename_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    target = write(tmp_path)
    made = [path.stat().st_ino for path in (target, *target.rglob("*"))]
    assert set(made) <= set(flushed[:-1]) and flushed[-1] == target.parent.stat().st_ino


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    path = reported(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, point, full)
    with pytest.raises(ReportError, match="No space left on device"):
        write_text("half", path)
    assert path.read_text() == "complete"
    assert [held.name for held in tmp_path.iterdir()] == ["report.json"]
