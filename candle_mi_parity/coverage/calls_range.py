"""The passes of the truth for numbers of any size: what float32's range does to them.

:mod:`candle_mi_parity.oracle.rounding` computes in float64 and knows float32's precision, but not its range. The
numbers of a model stay far inside it; generated ones do not. Three things change:

* the squares of a matmul's terms are summed in float64, since those of 1e20 or 1e-25 leave float32's range;
* a finite result beyond float32's largest number is reported: float32 has an infinity there, and what follows is not
  that of the truth;
* near the smallest normal number 2⁻¹²⁶ the error of an operation is absolute, of up to that size where a kernel
  flushes subnormal numbers to zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from candle_mi_parity.oracle.rounding import MatmulScales, NoisePool, RoundingNoise, Truth64

LARGEST = float(np.finfo(np.float32).max)
SMALLEST_NORMAL = 2.0**-126
_MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm"})


class RangeTruth(Truth64):  # type: ignore[no-untyped-call]
    """The truth pass.

    :ivar overflows: whether a finite result or partial sum exceeds float32's largest number.
    """

    def __init__(self, scales: MatmulScales) -> None:
        super().__init__(scales)
        self.overflows = False

    def round(self, func: Any, args: Any, out: Any, asked: torch.dtype | None) -> Any:
        name = func.overloadpacket.__name__
        if name in _MATMULS:
            left, right = args[-2:]
            product = torch.mm if left.dim() == 2 else torch.bmm
            self._scales.record(self._calls.next(), product(left.square(), right.square()))
            self._check(product(left.abs(), right.abs()))
        elif name == "sum" and args[0].dtype.is_floating_point:
            self._check(args[0].abs().sum())
        elif name == "mean" and args[0].dtype.is_floating_point:
            terms = args[0].numel() / max(out.numel(), 1)
            # Of two terms there is no partial sum that could be larger than the whole.
            self._check(terms * (out if terms <= 2 else args[0].abs().mean(*args[1:2])))
        if isinstance(out, torch.Tensor) and out.dtype.is_floating_point:
            self._check(out)
        return out

    def _check(self, values: torch.Tensor) -> None:
        self.overflows |= bool(((values.abs() > LARGEST) & values.isfinite()).any())


class RangeNoise(RoundingNoise):  # type: ignore[no-untyped-call]
    """A sample: an operation that rounds also loses up to 2⁻¹²⁶ of a result that is not large beside it."""

    def __init__(self, pool: NoisePool, scales: MatmulScales) -> None:
        super().__init__(pool, scales)
        self._draw = pool.draw

    def round(self, func: Any, args: Any, out: Any, asked: torch.dtype | None) -> Any:
        if not isinstance(out, torch.Tensor) or not out.dtype.is_floating_point:
            return super().round(func, args, out, asked)
        before = out.clone()
        noisy = super().round(func, args, out, asked)
        small = (noisy != before) & (before.abs() < SMALLEST_NORMAL * 2**24)
        if small.any():
            noisy.add_(torch.where(small, self._draw(before) * SMALLEST_NORMAL, 0.0))
        if not (finite := before.isfinite()).all():
            noisy.copy_(torch.where(finite, noisy, before))  # an infinity has no rounding error
        return noisy
