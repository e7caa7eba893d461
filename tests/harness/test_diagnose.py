"""The shape of an error is named if the data shows one."""

from __future__ import annotations

import numpy as np
import pytest

from candle_mi_parity.compare.diagnose import diagnose

RNG = np.random.default_rng(0)
TRUTH = RNG.standard_normal((1, 4, 12, 8))
NOISE = np.full(TRUTH.shape, 1e-7)


WRONG = RNG.standard_normal(TRUTH.shape)
ONE, NAN = np.zeros(TRUTH.shape), np.zeros(TRUTH.shape)
ONE[0, 1, 2, 3], NAN[0, 1, 2, 3] = 1.0, np.nan


def within(*index: slice) -> np.ndarray:
    """The truth, with errors at an index only."""
    got = TRUTH.copy()
    got[index] += WRONG[index]
    return got


ALL = slice(None)
SHAPES = {
    "non-finite": TRUTH + NAN,
    "one element": TRUTH + ONE,
    "heads permuted": TRUTH[:, [1, 0, 2, 3]],
    "constant factor": TRUTH * 1.001,
    "reduced precision: float16": TRUTH.astype(np.float16).astype(np.float64),
    "one head (2)": within(ALL, slice(2, 3)),
    "one position (5)": within(ALL, ALL, slice(5, 6)),
    "from position 8 on": within(ALL, ALL, slice(8, None)),
    "spread": TRUTH + WRONG,
}


@pytest.mark.parametrize("kind", SHAPES)
def test_each_shape_is_named(kind: str) -> None:
    found = diagnose("blocks.0.attn.hook_q", SHAPES[kind], TRUTH, NOISE, None)
    assert found.shape.startswith(kind)
    assert (len(found.picture), len(found.picture[0]), found.column) == (12, 4, "head")
