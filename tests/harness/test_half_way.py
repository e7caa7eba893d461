"""Faults half-way: a killed emitter, a full disk, a file that vanishes or was cut.

The case is one line of ERROR, nothing half-written is read as whole, and the next case and the next run are right.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from candle_mi_parity.candidate import sources
from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.candidate import BuiltEmitter, EmitterProcess, parse_candidate
from candle_mi_parity.candidate.sources import LiveSource, Source, open_source
from candle_mi_parity.compare.ledger import Ledger
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.models.prepared_case import Subject
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import ROOT, cache_root
from candle_mi_parity.trace.trace import Emitted, Trace
from candle_mi_parity.trace.truth import Truth
from tests.support.planting import CASES, real

CASE = CASES["llama/hub"]
NO_LEDGER = Ledger(format=1, known=[])
SPEC = "0.2.2"


def judged(source: Source, cache: Path | None = None) -> CaseResult:
    return judge_case(CASE, source, SPEC, cache or cache_root(), NO_LEDGER, Progress())


def error_of(result: CaseResult) -> str:
    assert result.status is Status.ERROR, result.message()
    assert result.error and "\n" not in result.error, result.error
    assert not result.tensors, "judged in spite of it"
    return result.error


def right(result: CaseResult) -> None:
    assert result.status is Status.PASS, result.message()
    assert result.compared == 44


# --- the emitter is killed ------------------------------------------------------------------------

WRAPPER = """#!/bin/sh
# One start is limited, the next is not.
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
    in the midst of a write, or is told that the disk is full."""

    def make(blocks: int, first: str) -> Source:
        built = build(parse_candidate(SPEC), cache_root(), print)
        limit, wrapper = tmp_path / "limit", tmp_path / "emitter"
        limit.write_text(str(blocks))
        wrapper.write_text(WRAPPER.format(limit=limit, first=first, emitter=built.path))
        wrapper.chmod(0o755)
        monkeypatch.setattr(sources, "build", lambda *_: BuiltEmitter(wrapper, built.identity))
        return open_source(parse_candidate(SPEC), cache_root(), tmp_path / "traces", print)

    return make


def emitter_of(source: Source) -> EmitterProcess:
    assert isinstance(source, LiveSource)
    return source._emitter


def traces(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "traces").rglob("*") if path.is_file() and path.name[0] != ".")


@pytest.mark.rust
@pytest.mark.parametrize("blocks", [0, 1, 100])
@pytest.mark.parametrize("stale", [False, True])
def test_an_emitter_killed_while_it_writes_costs_one_case(
    limited: Callable[[int, str], Source], tmp_path: Path, blocks: int, stale: bool
) -> None:
    with limited(blocks, "") as source:
        if stale:  # a whole trace of an earlier run lies there
            with open_source(parse_candidate("0.2.2"), cache_root(), tmp_path / "traces", print) as earlier:
                (tmp_path / "limit").rename(tmp_path / "later")
                right(judged(earlier))
                (tmp_path / "later").rename(tmp_path / "limit")
        before = traces(tmp_path)
        assert "crash: emitter was ended by SIGXFSZ" in error_of(judged(source))
        assert traces(tmp_path) == before, "a half trace has the name of a whole one"
        right(judged(source))
    with open_source(parse_candidate("0.2.2"), cache_root(), tmp_path / "traces", print) as again:
        right(judged(again))


@pytest.mark.rust
@pytest.mark.parametrize("blocks", [0, 1, 100])
def test_a_full_disk_for_the_trace_costs_one_case(
    limited: Callable[[int, str], Source], tmp_path: Path, blocks: int
) -> None:
    with limited(blocks, "trap '' XFSZ") as source:
        assert "io: " in (said := error_of(judged(source))) and "File too large" in said
        assert list((tmp_path / "traces").rglob("*.*")) == [], "something half-written was left"
        emitter_of(source)._abandon(0)  # space was made
        right(judged(source))


class Killed(EmitterProcess):
    """The real emitter, killed so many seconds after it was asked; never with ``after`` None."""

    after: float | None = None
    took = 0.0

    def emit(self, request: Mapping[str, object], timeout: float) -> Path:
        started = time.monotonic()
        killer = None if self.after is None else threading.Timer(self.after, self._kill)
        if killer:
            killer.start()
        try:
            return super().emit(request, timeout)
        finally:
            self.took = time.monotonic() - started
            if killer:
                killer.join()

    def _kill(self) -> None:
        if (pipes := self._pipes) is not None:
            pipes.process.kill()
            pipes.process.wait()  # a death that is not yet known costs the next case, as a crash of its own


def random_kills(count: int, seed: int, out: Path) -> tuple[int, int]:
    """Kill the real emitter at random points of its life; how many cases that cost, and for how many it came late.

    The points are drawn out of the time from request to reply and a fifth more: before the request is read, in the
    work, in the writing of the trace, after the reply; every other time the emitter is started first.
    """
    draw = random.Random(seed)
    lost = late = 0
    binary = build(parse_candidate(SPEC), cache_root(), print).path
    with open_source(parse_candidate(SPEC), cache_root(), out, print) as source, Killed(binary) as emitter:
        assert isinstance(source, LiveSource)
        source._emitter = emitter
        right(judged(source))
        cold = emitter.took
        right(judged(source))
        warm = emitter.took
        for number in range(count):
            if number % 2:
                emitter._abandon(0)
            emitter.after = draw.uniform(0, 1.2 * (cold if number % 2 else warm))
            found = judged(source)
            if found.status is Status.ERROR:
                assert "crash: emitter was ended by SIGKILL" in error_of(found)
                lost += 1
            else:
                right(found)
                late += 1
            emitter.after = None
            right(judged(source))
    return lost, late


@pytest.mark.rust
def test_an_emitter_killed_at_any_point_costs_at_most_its_case(tmp_path: Path) -> None:
    lost, late = random_kills(20, 0, tmp_path)
    assert lost and late, "every kill came at one side of the work"


# --- files that vanish, that are cut, a disk that is full -----------------------------------------


class Vanishing(sources.NothingOpen):
    """A source during whose work a file vanishes, between the moment it was found and the moment it is read."""

    def __init__(self, inner: Source, vanishes: Callable[[Trace], Path]) -> None:
        self._inner, self._vanishes, self.identity = inner, vanishes, inner.identity

    def trace(self, subject: Subject, mode: Mode, truth: Truth, inputs: Path) -> Emitted:
        trace = self._inner.trace(subject, mode, truth, inputs)
        assert isinstance(trace, Trace)
        self._vanishes(trace).unlink()
        return trace


def stored_copy(tmp_path: Path) -> Source:
    """The stored release as a directory of its own, from which files may vanish."""
    source = ROOT / "rust_outputs" / SPEC
    for name in ("candidate.json", "llama/hub.json", "llama/hub.safetensors"):
        (tmp_path / "stored" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stored" / name).write_bytes((source / name).read_bytes())
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


def test_a_trace_that_vanishes_is_an_error(tmp_path: Path) -> None:
    inner = stored_copy(tmp_path)
    vanishing = Vanishing(inner, lambda trace: trace.path.with_suffix(".safetensors"))
    assert "hub.safetensors" in error_of(judged(vanishing))
    right(judged(stored_copy(tmp_path)))


@pytest.mark.parametrize("name", ["truth.safetensors", "model.safetensors"])
def test_a_cache_entry_that_vanishes_costs_no_wrong_verdict(tmp_path: Path, cache: Path, name: str) -> None:
    """What was opened stays open, and what is read again is an error: the next run makes it anew."""
    inner = stored_copy(tmp_path)
    found = judged(Vanishing(inner, lambda trace: cached(cache, name)), cache)
    if found.status is Status.ERROR:
        error_of(found)
    else:
        right(found)
    if name == "model.safetensors":  # one file of two: the directory is to be deleted, and the error says so
        assert "model.safetensors" in error_of(judged(inner, cache))
        for path in cached(cache, "config.json").parent.iterdir():
            path.unlink()
    right(judged(inner, cache))


@pytest.mark.parametrize("name", ["truth.safetensors", "inputs.safetensors", "model.safetensors", "config.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_cache_entry_that_was_cut_is_an_error_until_it_is_deleted(
    tmp_path: Path, cache: Path, name: str, share: float
) -> None:
    source, path = stored_copy(tmp_path), cached(cache, name)
    right(judged(source, cache))
    os.truncate(path, int(path.stat().st_size * share))
    error_of(judged(source, cache))
    for held in path.parent.iterdir():
        held.unlink()
    right(judged(source, cache))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may become longer: the write fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "truth.safetensors", "inputs.safetensors"])
def test_a_full_disk_for_the_cache_is_an_error_and_leaves_nothing(tmp_path: Path, cache: Path, name: str) -> None:
    source, path = stored_copy(tmp_path), cached(cache, name)
    size = path.stat().st_size
    for held in path.parent.iterdir():
        held.unlink()
    with largest_file(size - 1):
        assert "cannot write" in error_of(judged(source, cache))
    assert not [held for held in cache.rglob("*") if held.is_file() and held.parent == path.parent]
    assert not list(cache.rglob(".*.making"))
    right(judged(source, cache))
