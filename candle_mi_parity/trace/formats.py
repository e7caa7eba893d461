"""Rounding of input values to few significant bits."""

from __future__ import annotations

import numpy as np

BITS = {"float32": 16, "float16": 11, "bfloat16": 8}


def round_to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to few significant bits, float32, so that the bytes are the same on every machine.

    The last bits of a float64 sum depend on the machine. At float32's 24 bits, one element in 10⁸ would then round
    differently and change the file's digest; at 16 bits, one in 10¹¹.
    """
    bits = BITS[dtype]
    mantissa, exponent = np.frexp(values)
    return np.ascontiguousarray(np.ldexp(np.round(mantissa * 2.0**bits), exponent - bits), np.float32)
