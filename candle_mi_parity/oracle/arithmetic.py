"""How a device rounds."""

from __future__ import annotations

from dataclasses import dataclass

UNIT = 2.0**-24
"""Unit roundoff of float32."""


@dataclass(frozen=True)
class Arithmetic:
    """How a device rounds.

    :ivar unit: unit roundoff of the model's format.
    :ivar accumulation: A, where summing the K products of a matmul adds the variance u²·A·K·Σa²b². 1/16 was measured
        on CPU kernels, which keep several partial sums. 1/6 is for sequential sums, which a CUDA kernel may use: the
        partial sum of k zero-mean terms of variance v has the variance k·v (a random walk), and its rounding,
        uniform in ±u of it, adds u²/3·k·v; over k = 1…K that is u²·K²/6·v = u²·K/6·Σa²b². See Higham and Mary (SIAM
        J. Sci. Comput. 41(5), 2019) and Higham, Accuracy and Stability (2002), §4.2.
    """

    unit: float = UNIT
    accumulation: float = 1 / 16


ACCUMULATION = {"cpu": 1 / 16, "cuda": 1 / 6}
"""By kind of device; CUDA's is derived, not measured on a GPU."""

CPU_FLOAT32 = Arithmetic()
