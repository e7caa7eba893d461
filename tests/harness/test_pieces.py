"""A tensor is judged a block at a time, a long one a chunk of its file at a time: as if it were judged whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.files import chunks
from tests.support.planting import Arrays, Real, judge, real, write

WHOLE = 1 << 40
PIECES = {
    "blocks of a position": (1, WHOLE, WHOLE),
    "blocks of some positions": (500, WHOLE, WHOLE),
    "chunks of a position": (WHOLE, 1, 1),
    "chunks of some positions, in blocks of others": (300, 1000, 1),
}
"""Elements of a block, of a chunk, and of a tensor that is long."""


def honest(arrays: Arrays) -> Arrays:
    return {}


def last_element(arrays: Arrays) -> Arrays:
    """One element of every tensor's last position."""
    changed = {name: array.copy() for name, array in arrays.items()}
    for array in changed.values():
        array[..., -1, -1] += np.float32(0.01)
    return changed


def one_leak(arrays: Arrays) -> Arrays:
    """A weight that the mask forbids, at the first position of the last head."""
    pattern = arrays["blocks.1.attn.hook_pattern"].copy()
    pattern[0, -1, 0, -1] = 1e-3
    return {"blocks.1.attn.hook_pattern": pattern}


def one_nan(arrays: Arrays) -> Arrays:
    stream = arrays["blocks.1.hook_resid_mid"].copy()
    stream[0, 17, 3] = np.nan
    return {"blocks.1.hook_resid_mid": stream}


def everywhere(arrays: Arrays) -> Arrays:
    return {"blocks.0.hook_attn_out": arrays["blocks.0.hook_attn_out"] * np.float32(1.001)}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("fault", [honest, last_element, one_leak, one_nan, everywhere])
def test_pieces_are_judged_as_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: str, fault: Callable[[Arrays], Arrays]
) -> None:
    there = real("gemma2/hub")
    path = write(tmp_path, there, there.arrays | fault(there.arrays))
    told = [judged(there, path, monkeypatch, *sizes) for sizes in ((WHOLE,) * 3, PIECES[pieces])]
    assert _but_for_the_means(told[0]) == _but_for_the_means(told[1])
    for one, other in zip(*told, strict=True):
        assert one.rms_ratio == pytest.approx(other.rms_ratio, rel=1e-9)
        assert one.position_ratio == pytest.approx(other.position_ratio, rel=1e-9)


def judged(there: Real, path: Path, patch: pytest.MonkeyPatch, *sizes: int) -> list[TensorResult]:
    for name, size in zip(("BLOCK", "CHUNK", "LONG"), sizes, strict=True):
        patch.setattr(chunks, name, size)
    return judge(there, path)


def _but_for_the_means(results: list[TensorResult]) -> list[str]:
    """Sums in another order differ in their last bit; NaN is not equal to itself, but is spelt alike."""
    return [repr(replace(result, rms_ratio=0.0, position_ratio=0.0)) for result in results]


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=4))
def test_blocks_cover_each_position_once(shape: list[int]) -> None:
    positions = [*range(shape[-2])]
    assert [position for block in chunks.blocks(shape) for position in positions[block]] == positions
