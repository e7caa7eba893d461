"""Rounding of input values to few significant bits."""

from __future__ import annotations

import numpy as np

BITS = {"float32": 16, "float16": 11, "bfloat16": 8}
LOWEST = {"float32": -149, "float16": -24, "bfloat16": -133}
"""Exponent of a format's smallest positive number, of which the numbers below its normal range are multiples."""


def round_to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to few significant bits, float32, so that the bytes are the same on every machine.

    The last bits of a float64 sum depend on the machine. At float32's 24 bits, one element in 10⁸ would then round
    differently and change the file's digest; at 16 bits, one in 10¹¹.
    """
    _, exponent = np.frexp(values)
    step = np.maximum(exponent - BITS[dtype], LOWEST[dtype])
    return np.ascontiguousarray(np.ldexp(np.round(np.ldexp(values, -step)), step), np.float32)
