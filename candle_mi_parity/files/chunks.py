"""How a tensor too large for memory is read in chunks: by position to be compared, in memory order to be hashed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

CHUNK = 1 << 18
"""Elements per chunk of a tensor that is longer than :data:`LONG`."""
LONG = 1 << 21

BLOCK = 1 << 14
"""Elements that are compared at a time, so that the twenty or so float64 arrays of it fit in a processor's cache."""


def blocks(shape: Sequence[int]) -> list[slice]:
    """Slices of axis −2 of at most :data:`BLOCK` elements each, where a position allows it."""
    step = max(1, BLOCK * shape[-2] // math.prod(shape))
    return [slice(start, start + step) for start in range(0, shape[-2], step)]


def positions(shape: Sequence[int]) -> list[slice]:
    """Slices of axis −2 of at most :data:`CHUNK` elements each; one slice for a tensor that is not long."""
    size = math.prod(shape)
    if size <= LONG:
        return [slice(None)]
    step = max(1, CHUNK * shape[-2] // size)
    return [slice(start, min(start + step, shape[-2])) for start in range(0, shape[-2], step)]


def row_major(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most :data:`CHUNK` elements each, in the order of the tensor's bytes."""
    axis, inner = len(shape) - 1, 1
    while axis > 0 and inner * shape[axis] <= CHUNK:
        inner *= shape[axis]
        axis -= 1
    step = max(1, CHUNK // inner)
    rest = [slice(None)] * (len(shape) - axis - 1)
    for outer in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, min(start + step, shape[axis])), *rest)
