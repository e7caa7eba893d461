"""Rows of attention weights sum to 1: what fails, and that no honest row does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from candle_mi_parity.compare.gate import UNITS
from candle_mi_parity.compare.row_sums import allowed_sum_error
from candle_mi_parity.compare.verdict import Status
from tests.support.planting import planted, real

PATTERN = "blocks.0.attn.hook_pattern"


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("keys", [1, 7, 64, 600, 2100])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_no_softmax_that_is_rounded_once_is_past_the_bound(dtype: str, keys: int, spread: float) -> None:
    scores = torch.from_numpy(np.random.default_rng(keys).standard_normal((64, keys)).astype(np.float32)) * spread
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    one_by_one = weights.cumsum(-1, dtype=torch.float32)[:, -1:]
    for total in (one_by_one, weights.sum(-1, keepdim=True)):
        sums = (weights / total).to(getattr(torch, dtype)).double().sum(-1)
        assert float((sums - 1).abs().max()) <= allowed_sum_error(keys, dtype)


@pytest.mark.parametrize(("factor", "status"), [(1.0, Status.UNMEASURED), (1.02, Status.FAIL)])
def test_one_row_fails_where_its_entries_are_too_noisy_to_be_judged(
    tmp_path: Path, factor: float, status: Status
) -> None:
    there = real("llama/tokens-600-bf16")
    pattern = there.arrays[PATTERN]
    pattern[0, 1, 500] *= np.float32(factor)
    (found,) = [result for result in planted(tmp_path, there, **{PATTERN: pattern}) if result.name == PATTERN]
    assert found.status is status
    if status is Status.FAIL:
        assert "1 rows do not sum to 1 within rounding: row [0, 1, 500] sums to 1.0" in found.detail
