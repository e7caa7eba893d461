"""The gate: how large an error may be before rounding cannot explain it.

Over the n_p compared entries of a position p, with K samples d_k = sample_k − truth and u = 2⁻²⁴::

    s_i² = mean_k d_ki²      n_p² = mean_i s_i²      t_p = rms_i(truth)
    σ_i  = sqrt((K·s_i² + n_p²)/(K+1)) + (u/4)·|truth_i| + 2⁻¹⁴⁹
    pos_p  = rms(err) / (n_p + (u/4)·t_p + 2⁻¹⁴⁹)        must be < 8, 0 if every error is 0
    elem_i = |err_i| / σ_i                               must be < 32, 0 if err_i is 0

Both are needed: a position's mean hides one bad element among many, an element's σ hides a small error common
to all. Per position, because one massive activation would hide every other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Unit roundoff of each format."""
UNIT = UNITS["float32"]
TINY = 2.0**-149
POSITION_GATE = 8.0
ELEMENT_GATE = 32.0
RESOLUTION = 0.1
"""A position whose gate exceeds this fraction of the truth's rms cannot be judged."""


def check_gate(position: float, element: float) -> None:
    """Refuse a gate that cannot fail.

    :raises ValueError: when either is not a positive finite number.
    """
    for name, gate in (("position", position), ("element", element)):
        if not (math.isfinite(gate) and gate > 0):
            raise ValueError(f"invalid tolerance: the {name} gate is {gate}, expected a positive finite number")


@dataclass(frozen=True)
class Measure:
    """Ratios of one tensor.

    :ivar position: [B, T].
    :ivar element: of the tensor's own shape.
    :ivar sigma: σ of each element, of the tensor's own shape.
    :ivar unresolved: [B, T], positions whose noise is too large to judge.
    :ivar mean_square: of the error and of the noise, over all compared entries.
    """

    position: np.ndarray
    element: np.ndarray
    sigma: np.ndarray
    unresolved: np.ndarray
    mean_square: tuple[float, float]

    @property
    def rms(self) -> float:
        return rms_ratio(*self.mean_square)

    def passes(self) -> bool:
        """Written so that NaN fails."""
        check_gate(POSITION_GATE, ELEMENT_GATE)
        return bool((self.position < POSITION_GATE).all() and (self.element < ELEMENT_GATE).all())

    def past(self) -> int:
        """Elements not inside the element gate."""
        return int(np.count_nonzero(~(self.element < ELEMENT_GATE)))


def rms_ratio(error_square: float, noise_square: float) -> float:
    """rms(error) / rms(noise), 0 where there is no noise."""
    return math.sqrt(error_square) / math.sqrt(noise_square) if noise_square > 0 else 0.0


def spread(per_position: np.ndarray, like: np.ndarray) -> np.ndarray:
    """[B, T] → broadcastable over a tensor [B, …, T, entries]."""
    return per_position.reshape(per_position.shape[0], *[1] * (like.ndim - 3), per_position.shape[1], 1)


def by_position(array: np.ndarray) -> np.ndarray:
    """[B, …, T, entries] → [B, T, everything of that position]."""
    moved = array if array.ndim == 3 else np.moveaxis(array, -2, 1)
    return moved.reshape(array.shape[0], array.shape[-2], -1)


def measure(
    error: np.ndarray,
    truth: np.ndarray,
    noise: np.ndarray,
    mask: np.ndarray | None = None,
    samples: int = 16,
    unit: float = UNIT,
) -> Measure:
    """Ratios of an error to its noise.

    :param error: candidate − truth, float64 [B, …, T, entries]; axis −2 is the position.
    :param truth: the expected values, same shape.
    :param noise: s_i, same shape.
    :param unit: unit roundoff of the format in which the tensor was emitted.
    :param mask: True where an entry is compared; None compares all.
    """
    if mask is not None:
        mask = np.broadcast_to(mask, error.shape)
        error = np.where(mask, error, 0.0)
    entries = error.size // (error.shape[0] * error.shape[-2])
    count = entries if mask is None else np.maximum(by_position(mask).sum(-1), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(by_position(values if mask is None else np.where(mask, values, 0.0)).sum(-1) / count)

    def over_all(means: np.ndarray) -> float:
        return float((means * count).sum() / max(error.size if mask is None else np.count_nonzero(mask), 1))

    variance = np.square(noise, dtype=np.float64)
    n2 = mean(variance)
    n_p = np.sqrt(n2)
    t_p = np.sqrt(mean(np.square(truth)))
    with np.errstate(invalid="ignore", over="ignore"):
        mean_square = mean(np.square(error))
        # In place: on a large tensor each new array costs as much as the arithmetic.
        sigma = samples * variance
        sigma += spread(n2, error)
        sigma /= samples + 1
        np.sqrt(sigma, out=sigma)
        floor = np.abs(truth, dtype=np.float64)
        floor *= unit / 4
        sigma += floor
        sigma += TINY
        position = np.where(mean_square == 0, 0.0, np.sqrt(mean_square) / (n_p + (unit / 4) * t_p + TINY))
        element = np.abs(error, dtype=np.float64)
        element /= sigma
        squares = over_all(mean_square), over_all(n2)
    return Measure(position, element, sigma, POSITION_GATE * n_p > RESOLUTION * t_p, squares)
