"""Numbers that a name decides, bit-identical on every machine, and files of them that never are in memory whole."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

STRETCH = 1 << 16
"""Numbers that are made at a time."""

Stretches = Callable[[str, tuple[int, ...]], Iterator[np.ndarray]]
"""A tensor's name and shape → its float32 values in row-major order, a stretch at a time."""


def bit_stream(name: str) -> np.random.PCG64:
    """The raw PCG64 stream, which numpy guarantees, that a name seeds."""
    return np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def normal_numbers(name: str, count: int) -> Iterator[np.ndarray]:
    """``count`` numbers N(0, 1), float64, in stretches.

    Each is the sum of twelve 16-bit integers minus its mean (Irwin-Hall: deviation 1), exact in float32.
    """
    stream, lanes, low = bit_stream(name), np.uint64(0x0000FFFF0000FFFF), np.uint64(0xFFFFFFFF)
    for start in range(0, count, STRETCH):
        words = stream.random_raw(3 * min(STRETCH, count - start))
        # Four integers a word: two lanes of 32 bits take the sums of the twelve, which stay below 2²⁰.
        pairs = (words & lanes) + ((words >> np.uint64(16)) & lanes)
        sums = pairs[0::3] + pairs[1::3] + pairs[2::3]
        yield (((sums & low) + (sums >> np.uint64(32))).astype(np.float64) - 12 * 65535 // 2) / 65536.0


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], values: Stretches) -> int:
    """A safetensors file of float32 tensors, byte for byte what ``save_file(..., metadata={"format": "pt"})`` writes.

    :returns: bytes of its tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in sorted(shapes.items()):
            for stretch in values(name, shape):
                file.write(np.ascontiguousarray(stretch, "<f4").data)
        if file.tell() != 8 + len(text) + end:
            raise OSError(f"{path}: {file.tell() - 8 - len(text)} bytes of tensors, {end} announced")
    return end
