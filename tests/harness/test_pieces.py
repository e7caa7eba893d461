"""A tensor that is read and compared in pieces gets the same result as one that is compared whole."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.files import chunks
from tests.support.planting import Arrays, Real, compare_trace, real, write

WHOLE = 1 << 40
PIECES = {
    "blocks of a position": (1, WHOLE, WHOLE),
    "blocks of some positions": (500, WHOLE, WHOLE),
    "one chunk a position": (WHOLE, 1, 1),
    "chunks of some positions, in blocks of others": (300, 1000, 1),
}
"""Elements of a block, of a chunk of a file, and of a tensor that is read in chunks."""


def honest(arrays: Arrays) -> None:
    pass


def faulty(arrays: Arrays) -> None:
    """One wrong element at every tensor's last position, a weight that the mask forbids, NaN, and a wrong factor."""
    for array in arrays.values():
        array[..., -1, -1] += np.float32(0.01)
    arrays["blocks.1.attn.hook_pattern"][0, -1, 0, -1] = 1e-3
    arrays["blocks.1.hook_resid_mid"][0, 17, 3] = np.nan
    arrays["blocks.0.hook_attn_out"] *= np.float32(1.001)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("fault", [honest, faulty])
def test_pieces_give_the_result_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: str, fault: Callable[[Arrays], None]
) -> None:
    there = real("gemma2/hub")
    arrays = there.arrays
    fault(arrays)
    path = write(tmp_path, there, arrays)
    results = [judged(there, path, monkeypatch, *sizes) for sizes in ((WHOLE,) * 3, PIECES[pieces])]
    assert _without_means(results[0]) == _without_means(results[1])
    for one, other in zip(*results, strict=True):
        assert one.rms_ratio == pytest.approx(other.rms_ratio, rel=1e-9)
        assert one.position_ratio == pytest.approx(other.position_ratio, rel=1e-9)


def judged(there: Real, path: Path, patch: pytest.MonkeyPatch, *sizes: int) -> list[TensorResult]:
    for name, size in zip(("BLOCK", "CHUNK", "LONG"), sizes, strict=True):
        patch.setattr(chunks, name, size)
    return compare_trace(there, path)


def _without_means(results: list[TensorResult]) -> list[str]:
    """Sums in another order differ in their last bit; as text, NaN equals NaN."""
    return [repr(replace(result, rms_ratio=0.0, position_ratio=0.0)) for result in results]


@pytest.mark.parametrize("size", [1, 7, 100, WHOLE])
@pytest.mark.parametrize("shape", [(1, 3), (5, 4), (2, 60, 3), (2, 3, 17, 5)], ids=str)
def test_blocks_cover_each_position_once(monkeypatch: pytest.MonkeyPatch, size: int, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(chunks, "BLOCK", size)
    positions = [*range(shape[-2])]
    assert [position for block in chunks.blocks(shape) for position in positions[block]] == positions
