"""The shape of an error is named where the data shows one."""

from __future__ import annotations

import numpy as np
import pytest

from candle_mi_parity.compare.diagnose import diagnose

RNG = np.random.default_rng(0)
TRUTH = RNG.standard_normal((1, 4, 12, 8))
NOISE = np.full(TRUTH.shape, 1e-7)


def spoilt(kind: str) -> np.ndarray:
    got = TRUTH.copy()
    wrong = RNG.standard_normal(TRUTH.shape)
    if kind == "non-finite":
        got[0, 1, 2, 3] = np.nan
    elif kind == "one element":
        got[0, 1, 2, 3] += 1.0
    elif kind == "heads permuted":
        got = got[:, [1, 0, 2, 3]]
    elif kind == "constant factor":
        got *= 1.001
    elif kind == "reduced precision: float16":
        got = got.astype(np.float16).astype(np.float64)
    elif kind == "one head (2)":
        got[:, 2] += wrong[:, 2]
    elif kind == "one position (5)":
        got[:, :, 5] += wrong[:, :, 5]
    elif kind == "from position 8 on":
        got[:, :, 8:] += wrong[:, :, 8:]
    else:
        got += wrong
    return got


@pytest.mark.parametrize(
    "kind",
    [
        "non-finite",
        "one element",
        "heads permuted",
        "constant factor",
        "reduced precision: float16",
        "one head (2)",
        "one position (5)",
        "from position 8 on",
        "spread",
    ],
)
def test_each_shape_is_named(kind: str) -> None:
    found = diagnose("blocks.0.attn.hook_q", spoilt(kind), TRUTH, NOISE, None)
    assert found.shape.startswith(kind)
    assert (len(found.picture), len(found.picture[0]), found.column) == (12, 4, "head")
