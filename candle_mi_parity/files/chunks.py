"""How a tensor too large for memory is cut: by position to be judged, in the order of its bytes to be hashed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

CHUNK = 1 << 18
"""Elements that are in memory at a time, of a tensor that is longer than :data:`LONG`."""
LONG = 1 << 21

BLOCK = 1 << 14
"""Elements that are judged at a time: some twenty float64 arrays of them stay in a processor's cache, where arrays
of a megabyte each would go to memory and back."""


def blocks(shape: Sequence[int]) -> list[slice]:
    """Chunks of axis −2 of what is in memory."""
    step = max(1, BLOCK * shape[-2] // math.prod(shape))
    return [slice(start, start + step) for start in range(0, shape[-2], step)]


def positions(shape: Sequence[int]) -> list[slice]:
    """Chunks of axis −2; one that is everything where the tensor is not long."""
    size = math.prod(shape)
    if size <= LONG:
        return [slice(None)]
    step = max(1, CHUNK * shape[-2] // size)
    return [slice(start, min(start + step, shape[-2])) for start in range(0, shape[-2], step)]


def row_major(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most :data:`CHUNK` elements that follow one another as the bytes of a tensor do."""
    axis, inner = len(shape) - 1, 1
    while axis > 0 and inner * shape[axis] <= CHUNK:
        inner *= shape[axis]
        axis -= 1
    step = max(1, CHUNK // inner)
    rest = [slice(None)] * (len(shape) - axis - 1)
    for outer in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, min(start + step, shape[axis])), *rest)
