"""Work in threads that a stopped run does not wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def at_once(count: int, work: Callable[[A], B], given: list[A]) -> Iterator[list[Future[B]]]:
    """One future for each of ``given``, in order, of which ``count`` are computed at a time.

    With a count of two, one case is emitted while another is compared. A run that is stopped does not wait for what
    is at work: its emitter may hang, and is closed after this.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield [pool.submit(work, each) for each in given]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
