"""The gate: what it must fail, what it must pass, and what is UNMEASURED.

The element part catches one bad value among many, the position part a small error common to all. Both work position
by position, because one massive activation would hide every other.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_mi_parity.compare import gate
from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE, UNIT, measure
from candle_mi_parity.compare.tensor_result import judged
from candle_mi_parity.compare.verdict import Status

few = settings(max_examples=25, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def honest(seed: int, shape: tuple[int, ...] = (1, 6, 64)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A truth, its noise, and an error of just that noise."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(shape)
    noise = np.full(shape, 3e-7) * np.exp(rng.normal(0, 0.3, shape))
    return truth, noise, noise * rng.standard_normal(shape)


def status(error: np.ndarray, truth: np.ndarray, noise: np.ndarray) -> Status:
    measured = measure(error, truth, noise)
    return judged("x", measured, truth + error, truth, None, None).status


@few
@given(seeds)
def test_an_error_of_the_size_of_its_noise_passes(seed: int) -> None:
    truth, noise, error = honest(seed)
    measured = measure(error, truth, noise)
    assert measured.passes()
    assert 0.5 < measured.rms < 2, f"rms(error)/rms(noise) is {measured.rms} for an error drawn from the noise"
    measured = measure(np.zeros_like(truth), truth, noise)
    assert measured.passes() and measured.position.max() == measured.element.max() == measured.rms == 0


@few
@given(seeds, st.integers(0, 5), st.integers(0, 63), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_value_that_is_not_finite_fails_anywhere(seed: int, position: int, index: int, value: float) -> None:
    truth, noise, error = honest(seed)
    error[0, position, index] = value
    assert not measure(error, truth, noise).passes(), f"{value} at [{position}, {index}] passed"
    truth, noise, error = honest(seed)
    noise[0, position, index] = math.nan
    assert not measure(error, truth, noise).passes(), f"a noise of NaN at [{position}, {index}] passed"


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf, 0.0])
@pytest.mark.parametrize("name", ["POSITION_GATE", "ELEMENT_GATE"])
def test_a_gate_that_cannot_fail_passes_nothing(monkeypatch: pytest.MonkeyPatch, name: str, bad: float) -> None:
    truth, noise, error = honest(0)
    assert status(error, truth, noise) is Status.PASS
    assert (POSITION_GATE, ELEMENT_GATE) == (8.0, 32.0)
    monkeypatch.setattr(gate, name, bad)
    part = name.partition("_")[0].lower()
    with pytest.raises(ValueError, match=f"invalid tolerance: the {part} gate is"):
        status(error, truth, noise)


def test_a_zero_truth_passes_only_when_exactly_zero() -> None:
    zero = np.zeros((1, 3, 4))
    assert measure(zero, zero, zero).passes()
    smallest = zero.copy()
    smallest[0, 1, 2] = 1e-40
    assert not measure(smallest, zero, zero).passes(), "a value where the truth has no noise and is 0 passed"


@few
@given(seeds, st.floats(-1, 8))
def test_too_noisy_is_unmeasured_and_never_a_pass(seed: int, magnitude: float) -> None:
    truth, _, error = honest(seed)
    noise = np.full(truth.shape, 0.05)  # 8 × 0.05 is four times a tenth of the truth's rms
    assert status(np.zeros_like(error), truth, noise) is Status.UNMEASURED
    assert status(error * 10**magnitude, truth, noise) in (Status.UNMEASURED, Status.FAIL)


def test_a_noisy_position_does_not_excuse_the_others() -> None:
    truth, noise, error = honest(0)
    noise[0, 0] = 0.05
    assert status(error, truth, noise) is Status.UNMEASURED
    error[0, 4, 7] = 1e-3
    assert status(error, truth, noise) is Status.FAIL


@few
@given(seeds, st.integers(0, 49151))
def test_one_bad_element_of_49152_is_seen_by_the_element_part_alone(seed: int, index: int) -> None:
    truth, noise, error = honest(seed, (1, 2, 49152))
    assert measure(error, truth, noise).passes()
    error[0, 1, index] = 100 * noise[0, 1, index] + 1e-5
    measured = measure(error, truth, noise)
    assert measured.position.max() < POSITION_GATE
    assert measured.element[0, 1, index] > ELEMENT_GATE
    assert not measured.passes()
    assert measured.past() == 1


@few
@given(seeds)
def test_a_small_error_common_to_all_is_seen_by_the_position_part_alone(seed: int) -> None:
    truth, noise, error = honest(seed)
    for array in (truth, noise, error):
        array[0, 0] *= 1000  # a massive position hides no other
    error[0, 3] = 12 * 3e-7
    measured = measure(error, truth, noise)
    assert measured.element.max() < ELEMENT_GATE
    assert measured.position.argmax() == 3 and measured.position.max() > POSITION_GATE
    assert not measured.passes()


@few
@given(seeds, st.floats(50, 1e5), st.integers(1, 5))
def test_a_massive_position_hides_no_other(seed: int, factor: float, position: int) -> None:
    truth, noise, error = honest(seed)
    for array in (truth, noise, error):
        array[0, 0] *= factor
    assert measure(error, truth, noise).passes()
    error[0, position] += 1e-4 * truth[0, position]
    assert not measure(error, truth, noise).passes(), f"position {position} scaled by 1 + 1e-4 passed"


@few
@given(seeds)
def test_masked_entries_neither_fail_nor_dilute(seed: int) -> None:
    truth, noise, error = honest(seed, (1, 2, 6, 6))
    mask = np.tril(np.ones((6, 6), bool))
    outside = np.where(mask, error, math.nan)
    inside = measure(np.where(mask, error, 0.0), np.where(mask, truth, 0.0), np.where(mask, noise, 0.0), mask)
    measured = measure(outside, truth, noise, mask)
    assert measured.passes()
    np.testing.assert_array_equal(measured.position, inside.position)


def test_rounding_the_truth_itself_is_never_an_error() -> None:
    truth, _, _ = honest(0)
    rounded = truth.astype(np.float32).astype(np.float64)
    assert np.abs(rounded - truth).max() <= UNIT * np.abs(truth).max()
    assert measure(rounded - truth, truth, np.zeros_like(truth)).passes(), "half an ULP failed"
