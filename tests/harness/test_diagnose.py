"""The shape of an error is named if the data shows one."""

import numpy as np
import pytest

from candle_mi_parity.compare.diagnose import diagnose
from candle_mi_parity.spec.hook_points import place

RNG = np.random.default_rng(0)
TRUTH = RNG.standard_normal((1, 4, 12, 8))
NOISE = np.full(TRUTH.shape, 1e-7)


WRONG = RNG.standard_normal(TRUTH.shape)
ONE, NAN = np.zeros(TRUTH.shape), np.zeros(TRUTH.shape)
ONE[0, 1, 2, 3], NAN[0, 1, 2, 3] = 1.0, np.nan


def within(*index: slice | list[int]) -> np.ndarray:
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
    "2 of 4 heads (0, 3)": within(ALL, [0, 3]),
    "2 of 4 heads (1, 2)": within(ALL, slice(1, 3)),
    "positions 2 to 7 of 12": within(ALL, ALL, slice(2, 8)),
    "6 of 12 positions (0, 2, 4, 6, 8, 10)": within(ALL, ALL, slice(0, None, 2)),
    "entries 0 to 3 of 8": within(ALL, ALL, ALL, slice(0, 4)),
    "2 of 4 heads (0, 1), from position 8 on, entries 2 to 5 of 8": within(
        ALL, slice(0, 2), slice(8, None), slice(2, 6)
    ),
    "spread": TRUTH + WRONG,
}


@pytest.mark.parametrize("kind", SHAPES)
def test_each_shape_is_named(kind: str) -> None:
    found = diagnose("blocks.0.attn.hook_q", SHAPES[kind], TRUTH, NOISE, None)
    assert found.shape.startswith(kind)
    assert (len(found.picture), len(found.picture[0]), found.column) == (12, 4, "head")


@pytest.mark.parametrize(
    ("rows", "phrase"),
    [([2], "batch row 2 of 3: one head (1)"), ([1, 2], "from batch row 1 on: one head (1)"), ([0, 1, 2], "one head")],
)
def test_every_row_of_a_batch_is_looked_at(rows: list[int], phrase: str) -> None:
    truth = np.concatenate([TRUTH, 2 * TRUTH, TRUTH - 1])
    got = truth.copy()
    got[rows, 1] += WRONG[0, 1]
    found = diagnose("blocks.0.attn.hook_q", got, truth, np.full(truth.shape, 1e-7), None)
    assert found.shape.startswith(phrase)
    assert max(max(row) for row in found.picture) > 2, "the picture is of a row that is wrong"


def test_the_axes_of_scores_are_queries_and_keys() -> None:
    truth = RNG.standard_normal((1, 4, 12, 12))
    got = truth.copy()
    got[:, 1:3, 8:, :4] += 1.0 + RNG.random((1, 2, 4, 4))
    found = diagnose("blocks.0.attn.hook_scores", got, truth, np.full(truth.shape, 1e-7), None)
    assert found.shape == "2 of 4 heads (1, 2), from query 8 on, keys 0 to 3 of 12"
    assert place("blocks.0.attn.hook_scores", [0, 1, 17, 4]) == "batch 0, head 1, query 17, key 4"
    assert place("blocks.1.hook_resid_post", [0, 1]) == "axis 0 at 0, axis 1 at 1"
