"""What a process of a hunt does: judge inputs, look for what their menu entries change, shrink what is new."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from candle_mi_parity.candidate.branches import Branches
from candle_mi_parity.candidate.sources import LiveSource, open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.hunt_result import Cause, Kind, Tally
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.hunt.bench import SECONDS, Answer, Bench, Found
from candle_mi_parity.hunt.genes import Genes, case_of, entries_of
from candle_mi_parity.hunt.shrink import cause_of
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.oracle.fields_read import fields_read
from candle_mi_parity.spec.explanations import Explanations

REMOVAL_SECONDS = 10.0
"""How long to go on removing the directory of a killed hunt while a candidate's process still writes into it."""


@dataclass(frozen=True)
class Input:
    """One input to judge.

    :ivar ask: entries of the menu, all in one slot, of which it is not known whether they change anything.
    :ivar read: whether to record the config keys that transformers reads.
    """

    family: str
    genes: Genes
    ask: tuple[str, ...] = ()
    read: bool = False


@dataclass(frozen=True)
class Report:
    """An input judged.

    :ivar excites: the entries of ``ask`` that change what either side computes.
    :ivar keys: config keys that transformers read.
    :ivar branches: regions of candle-mi's source that the input reached.
    """

    input: Input
    answer: Answer
    excites: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    branches: tuple[int, ...] = ()


@dataclass
class Worker:
    """The state of one process."""

    bench: Bench
    table: Explanations
    cache: Path
    scratch: Path


_worker: Worker | None = None


def start(candidate: str, cache: Path, table: Explanations, counted: bool, shared: Path) -> None:
    """Open the candidate in this process, which computes with one thread.

    :param counted: whether candle-mi's branches are counted.
    :param shared: the directory of all processes of the hunt, which the hunt removes.
    """
    import torch
    import transformers

    global _worker
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process of a terminal; the hunt stops this one
    threading.Thread(target=_end_with_the_hunt, args=[shared], daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # an input may overflow, and is judged; the lines would be all that is seen
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    scratch = Path(tempfile.mkdtemp(dir=shared))
    tempfile.tempdir = str(scratch)
    source = open_source(parse_candidate(candidate), cache, scratch / "traces", _silent, counted=counted)
    if isinstance(source, LiveSource):
        source.seconds = SECONDS
    _worker = Worker(Bench(source, table, scratch / "inputs"), table, cache, scratch)


def _end_with_the_hunt(shared: Path) -> None:
    """Wait until the process of the hunt is killed, or stopped twice; then end this process and remove all files.

    A child removes them once this process is gone: beside a thread that still writes an input, the removal could miss
    a file.
    """
    parent, this = multiprocessing.parent_process(), os.getpid()
    assert parent is not None, "a worker is a process of its own"
    parent.join()
    if os.fork():
        os._exit(1)
    until = time.monotonic() + REMOVAL_SECONDS
    while os.getppid() == this or (shared.exists() and time.monotonic() < until):
        time.sleep(0.05)
        shutil.rmtree(shared, ignore_errors=True)
    os._exit(0)


def _silent(line: str) -> None: ...


def worker() -> Worker:
    assert _worker is not None, "the process was started without `start`"
    return _worker


def judge_all(inputs: Sequence[Input], found: Sequence[Found]) -> list[Report]:
    """Judge inputs one by one."""
    return [_report(one, found) for one in inputs]


def _report(one: Input, found: Sequence[Found]) -> Report:
    bench = worker().bench
    before = _counts()
    answer = bench.judge(one.family, one.genes, found)
    branches = _taken(before)
    excites: tuple[str, ...] = ()
    if one.ask and answer.digest:
        slot = entries_of(one.genes)[one.ask[0]]
        without = bench.numbers(one.family, {name: value for name, value in one.genes.items() if name != slot})
        excites = one.ask if without != answer.digest else ()
    return Report(one, answer, excites, _keys(one) if one.read else (), branches)


def _branches() -> Branches | None:
    """What counts candle-mi's branches; None where nothing does, or its process was not started yet."""
    source = worker().bench.source
    if not isinstance(source, LiveSource) or source.branches is None:
        return None
    return source.branches if source.made or source.branches.profile.is_file() else None


def _counts() -> npt.NDArray[np.int64] | None:
    counted = _branches()
    return counted.counts() if counted is not None else None


def _taken(before: npt.NDArray[np.int64] | None) -> tuple[int, ...]:
    """The regions of candle-mi's source that were reached since the counters were read."""
    counted = _branches()
    return tuple(np.flatnonzero(counted.taken(before)).tolist()) if counted is not None else ()


def _keys(one: Input) -> tuple[str, ...]:
    """The config keys that transformers reads for an input; none where it refuses it."""
    with worker().bench.cleared():
        try:
            directory = model_directory(case_of(one.family, one.genes).model, worker().bench.scratch)
            return tuple(sorted(fields_read(directory)))
        except Exception:  # a config that transformers refuses in any way has been counted already
            return ()


def close_in(family: str, genes: Genes, answer: Answer, found: Sequence[Found], seconds: float) -> Cause:
    """Shrink and explain a new divergence."""
    own = worker()
    return cause_of(own.bench, family, genes, answer, found, own.table, own.cache, seconds)


@dataclass(frozen=True)
class Search:
    """A part of a hunt in direct calls or in texts.

    :ivar version: the release whose known causes are subtracted; empty for none.
    :ivar seed: of this part.
    :ivar examples: number of inputs.
    :ivar already: causes of the kind that were found earlier.
    :ivar tokenizer: its name and directory; None for direct calls.
    """

    version: str
    seed: int
    examples: int
    already: list[Cause]
    tokenizer: tuple[str, Path] | None = None

    @property
    def kind(self) -> Kind:
        return "call" if self.tokenizer is None else "text"


@dataclass(frozen=True)
class Searched:
    """What a :class:`Search` gave.

    :ivar already: the earlier causes with their new counts.
    :ivar branches: see :class:`Report`.
    """

    tally: Tally
    causes: list[Cause]
    already: list[Cause]
    fault: str = ""
    branches: tuple[int, ...] = ()


def searched(search: Search) -> Searched:
    """Hunt in direct calls or in the texts of one tokenizer; never raises."""
    before = _counts()
    try:
        tally, causes = _search(search)
    except Exception as error:
        return Searched(Tally(), [], search.already, f"{type(error).__name__}: {one_line(str(error), 300)}")
    return Searched(tally, causes, search.already, branches=_taken(before))


def _search(search: Search) -> tuple[Tally, list[Cause]]:
    # Imported here, because hypothesis takes a second.
    from candle_mi_parity.hunt.callees import Emitted, TorchCallee
    from candle_mi_parity.hunt.calls import hunt_calls
    from candle_mi_parity.hunt.texts import emitted, hunt_texts

    source, scratch = worker().bench.source, worker().scratch
    if search.tokenizer is None:
        callee = Emitted(source, scratch / "calls.json") if isinstance(source, LiveSource) else TorchCallee()
        return hunt_calls(callee, search.version, search.seed, search.examples, scratch, search.already)
    assert isinstance(source, LiveSource), "only candle-mi has a tokenizer of its own"
    name, directory = search.tokenizer
    ask = emitted(source, directory, scratch / "tokens.json")
    return hunt_texts(ask, name, directory, search.version, search.seed, search.examples, search.already)
