"""Attention weights of a query sum to 1: judged also where each weight is too noisy to be judged.

A softmax in float32 over n keys, summed in any order and rounded once to a format of unit roundoff u and smallest
positive number m, gives a row whose sum is off by at most (Higham 2002, section 4.2)::

    u + n·m/2 + (n + 2)·2⁻²⁴

This is a bound and not a noise: errors of the scores cancel in the sum, and no honest row is past it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from candle_mi_parity.compare.gate import UNIT, UNITS
from candle_mi_parity.compare.verdict import Status, TensorResult

_SMALLEST = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}


def allowed_sum_error(keys: int, dtype: str) -> float:
    """How far the sum of a row over this number of keys may be from the truth's."""
    return UNITS[dtype] + keys * _SMALLEST[dtype] / 2 + (keys + 2) * UNIT


class RowSums:
    """The rows of one ``hook_pattern``, chunk by chunk; see the module."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._off = 0
        self._worst = (0.0, "")

    def add(self, got: np.ndarray, truth: np.ndarray, start: int) -> None:
        """Attention weights [B, H, t, T] of the candidate and of the truth.

        :param start: the tensor's query at which the chunk begins.
        """
        sums = got.sum(-1, dtype=np.float64)
        error = np.abs(sums - truth.sum(-1))
        self._off += int(np.count_nonzero(error > allowed_sum_error(got.shape[-1], self._dtype)))
        row = np.unravel_index(np.argmax(error), error.shape)
        if error[row] > self._worst[0]:
            *batch_and_head, query = (int(index) for index in row)
            self._worst = float(error[row]), f"row {[*batch_and_head, query + start]} sums to {sums[row]:.6g}"

    def judge(self, result: TensorResult) -> TensorResult:
        """The result of the tensor, failed if its entries did not fail it and a row does not sum to 1."""
        if not self._off or result.status is Status.FAIL:
            return result
        detail = f"{self._off} rows do not sum to 1 within rounding: {self._worst[1]}"
        return replace(result, status=Status.FAIL, reason="values", past=self._off, detail=detail)
