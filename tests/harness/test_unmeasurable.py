"""A softmax that rounding decides is UNMEASURED; every other wrong attention pattern fails."""

from dataclasses import replace

import numpy as np
import pytest

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.trace.truth import TruthTensor
from tests.support.planting import real, with_arrays

SCORES, PATTERN, OUT = (f"blocks.0.{hook}" for hook in ("attn.hook_scores", "attn.hook_pattern", "hook_attn_out"))
ROW, FIRST, SECOND = np.index_exp[0, 0, 5], 1, 2


def judged_at_the_other_key(distance: float, noise: float, wrong_scores: bool = False) -> dict[str, TensorResult]:
    """Judge a candidate whose softmax of one row is at the key of the second largest score.

    :param distance: of the two largest scores in that row.
    :param noise: of every score.
    """
    there = real("llama/hub")
    scores, pattern = there.truth.tensors[SCORES], there.truth.tensors[PATTERN]
    value, expected, arrays = scores.value.copy(), pattern.value.copy(), there.arrays
    value[(*ROW, FIRST)], value[(*ROW, SECOND)] = 200.0, 200.0 - distance
    expected[ROW], arrays[PATTERN][ROW] = 0.0, 0.0
    expected[(*ROW, FIRST)], arrays[PATTERN][(*ROW, SECOND)] = 1.0, 1.0
    arrays[SCORES] = value.astype(np.float32) + (1e3 if wrong_scores else 0)
    arrays[OUT] = arrays[OUT] + np.float32(0.1)
    tensors = {**there.truth.tensors}
    tensors[SCORES] = TruthTensor(value, np.full(value.shape, noise), scores.allowed)
    tensors[PATTERN] = TruthTensor(expected, pattern.noise, pattern.allowed)
    results = compare(replace(there.truth, tensors=tensors), with_arrays(there.emitted, arrays), None, None)
    return {result.name: result for result in results}


def test_a_softmax_that_rounding_decides_is_unmeasured_and_so_is_what_follows() -> None:
    found = judged_at_the_other_key(distance=20.0, noise=5.0)
    assert found[PATTERN].status is found[OUT].status is Status.UNMEASURED
    assert found[PATTERN].detail == (
        "rounding decides the softmax: the score at batch 0, head 0, query 5, key 2 is 20 below the row's largest, "
        "and the noise of the two is 10"
    )
    assert found[OUT].detail.endswith(f"at {PATTERN}, which this is computed from")


@pytest.mark.parametrize(
    ("distance", "noise", "wrong_scores"),
    [(20.0, 1.0, False), (1.0, 0.2, False), (20.0, 5.0, True)],
    ids=["the scores are further apart than the gate", "the noise is small", "the scores are wrong too"],
)
def test_any_other_wrong_pattern_fails(distance: float, noise: float, wrong_scores: bool) -> None:
    found = judged_at_the_other_key(distance, noise, wrong_scores)
    assert found[PATTERN].status is Status.FAIL
    assert found[OUT].status is Status.FAIL
