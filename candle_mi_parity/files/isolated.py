"""Calling a function for each item in a separate process, so that a crash or a hang loses one item.

The processes are forked from a server that has imported the heavy libraries, so that each starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[..., Any]
_PRELOAD = ["torch", "transformers", "candle_mi_parity.coverage.census"]


@dataclass(frozen=True)
class Lost:
    """A process that gave no answer.

    :ivar code: its exit code: negative for a signal, positive for an exception, None for a timeout.
    """

    code: int | None


def each(work: Work, items: list[tuple[Any, ...]], workers: int, seconds: float) -> Iterator[Any | Lost]:
    """``work(*item)`` of each item, in their order, or :class:`Lost`.

    :param work: a picklable function with picklable arguments and results.
    :param seconds: the time limit of one call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)

    def call(item: tuple[Any, ...]) -> Any | Lost:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(theirs, work, item), daemon=True)
        process.start()
        theirs.close()
        try:
            # poll() returns at end of file too, so that a dead process is noticed at once.
            return ours.recv() if ours.poll(seconds) else Lost(None)
        except EOFError:
            process.join(seconds)
            return Lost(process.exitcode)
        finally:
            process.kill()
            process.join()
            ours.close()

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(call, items)


def _answer(pipe: Connection, work: Work, item: tuple[Any, ...]) -> None:
    pipe.send(work(*item))
    pipe.close()
