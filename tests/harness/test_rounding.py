"""The float64 mode and its noise rules: no float32 inside the truth, and noise of the size that float32 has.

A float32 result inside the truth would put the candidate's own kind of error into the expectation; a rule that is
too large would hide a fault, one that is too small would accuse honest arithmetic. So each rule is held against
the error of the real operation, measured in float32 against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from candle_mi_parity.errors import OracleError
from candle_mi_parity.rounding import Float64, MatmulScales, NoisePool, RoundingNoise, Truth64

Op = Callable[[torch.Tensor], torch.Tensor]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 numbers that float32 holds exactly."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32)).double()


def mode() -> Float64:
    return Float64()  # type: ignore[no-untyped-call]


def noisy(op: Op, x: torch.Tensor, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """One sample of the noise of an operation on ``x`` [B, …], ``rows`` samples as batch rows."""
    scales = MatmulScales()
    with torch.no_grad():
        with Truth64(scales):
            truth = op(x)
        with RoundingNoise(NoisePool(seed), scales):
            sample = op(x.repeat(rows, *[1] * (x.dim() - 1)))
    return sample - truth.repeat(rows, *[1] * (truth.dim() - 1))


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def cast_softmax(x: torch.Tensor) -> torch.Tensor:
    """As transformers' eager attention writes it."""
    return torch.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


def cast_norm(x: torch.Tensor) -> torch.Tensor:
    """As transformers' RMSNorm writes it."""
    y = x.to(torch.float32)
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


NARROW: torch.Tensor = torch.arange(1, 5, dtype=torch.float32)
ESCAPES: dict[str, Op] = {
    "softmax to float32": lambda x: torch.softmax(x, dim=-1, dtype=torch.float32),
    "softmax of a half, half_to_float": lambda x: torch.ops.aten._softmax(x, -1, False),
    ".float()": lambda x: x.float() / 3,
    ".to(bfloat16)": lambda x: x.to(torch.bfloat16) / 3,
    "torch.full": lambda x: torch.full((4,), 0.1, dtype=torch.float32),
    "torch.arange": lambda x: torch.arange(4, dtype=torch.float32) / 3,
    "torch.tensor": lambda x: x + torch.tensor(0.1, dtype=torch.float32),
    "mean to float32": lambda x: x.mean(-1, dtype=torch.float32),
    "a float32 tensor from outside": lambda x: NARROW / 3,
}


@pytest.mark.parametrize("name", ESCAPES)
def test_no_float32_result_survives(name: str) -> None:
    with mode(), torch.no_grad():
        assert ESCAPES[name](normal(3, 4)).dtype == torch.float64, f"{name} escaped the float64 mode"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_a_literal_is_not_rounded_on_its_way_into_a_tensor(dtype: torch.dtype | None) -> None:
    assert torch.tensor([0.1], dtype=torch.float32).double().item() != 0.1
    with mode(), torch.no_grad():
        made = [torch.tensor([0.1], dtype=dtype), torch.as_tensor([0.1], dtype=dtype)]
        made.append(torch.full((1,), 0.1, dtype=dtype or torch.float32))
        assert torch.tensor([1, 2]).dtype == torch.int64
    assert [tensor.item() for tensor in made] == [0.1] * 3, "a float32-rounded 0.1 is in the float64 mode"


@pytest.mark.parametrize("op", [cast_softmax, cast_norm])
def test_what_casts_to_float32_and_back_is_exact_in_the_mode_and_only_there(op: Op) -> None:
    x = normal(5, 32)
    precise = torch.softmax(x, -1) if op is cast_softmax else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    with mode(), torch.no_grad():
        inside = op(x)
    assert rms(inside - precise) < 1e-15
    assert rms(op(x) - precise) > 1e-9, "without the mode the cast was no loss: the test excites nothing"


def test_a_composite_operation_is_refused_where_it_reaches_the_mode() -> None:
    with torch.inference_mode(), mode(), pytest.raises(OracleError, match=r"composite.*run under torch\.no_grad"):
        torch.softmax(normal(3, 4), dim=-1, dtype=torch.float32)


def test_an_operation_without_a_rule_is_an_error_that_names_it() -> None:
    with torch.no_grad(), RoundingNoise(NoisePool(0), MatmulScales()):
        with pytest.raises(OracleError, match=r"aten\.cumsum\.default has no noise rule"):
            normal(3, 4).cumsum(-1)
        with pytest.raises(OracleError, match="no noise rule"):
            torch.linalg.qr(normal(3, 3))


def one_after_the_other(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis; in float32 in the order of the elements, as a plain loop adds them.

    The rule has to hold for any order. torch's own sum goes by halves and errs less (an eighth of the rule at
    256 terms), so it is no yardstick for it.
    """
    if x.dtype == torch.float64:
        return x.sum(-1)
    return torch.from_numpy(np.add.accumulate(x.numpy(), axis=-1)[..., -1].copy())


W, BIAS = normal(256, 64, seed=1), normal(256, seed=2)
RULES: dict[str, Op] = {
    "matmul, 256 terms": lambda x: x @ W.to(x.dtype),
    "batched matmul, 256 terms": lambda x: torch.bmm(x[None], W.to(x.dtype)[None])[0],
    "addmm": lambda x: torch.addmm(W[0].to(x.dtype), x, W.to(x.dtype)),
    "softmax": lambda x: torch.softmax(3 * x, dim=-1),
    "mean of squares": lambda x: one_after_the_other(x * x) / x.shape[-1],
    "sum of squares": lambda x: one_after_the_other(x * x),
    "add": lambda x: x + BIAS.to(x.dtype),
    "mul": lambda x: x * BIAS.to(x.dtype),
    "div": lambda x: x / BIAS.to(x.dtype),
    "pow": lambda x: x.pow(2),
    "silu": functional.silu,
    "gelu tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "exp": torch.exp,
    "cos": torch.cos,
    "rsqrt": lambda x: torch.rsqrt(x.square() + 1),
    "layer norm": lambda x: functional.layer_norm(x, (256,), BIAS.to(x.dtype), 0.1 * BIAS.to(x.dtype)),
    "rms norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("name", RULES)
def test_noise_is_of_the_size_of_the_real_error(name: str) -> None:
    op, x = RULES[name], normal(64, 256)
    with torch.no_grad():
        measured = rms(op(x.float()).double() - op(x))
    predicted = rms(noisy(op, x))
    assert 0.2 < measured / predicted < 3, f"{name}: float32 errs by {measured:.3g}, the rule says {predicted:.3g}"


@pytest.mark.parametrize("n", [64, 256, 2304])
def test_the_rule_of_a_sum_covers_torchs_own_order(n: int) -> None:
    x = normal(256, n).square()
    x = x.float().double()
    with torch.no_grad():
        measured = rms(x.float().sum(-1).double() - x.sum(-1))
    assert measured < rms(noisy(lambda y: y.sum(-1), x)), f"torch's sum of {n} terms errs by more than the rule"


@pytest.mark.parametrize("op", [torch.relu, torch.abs, lambda x: x.transpose(0, 1), lambda x: x[:, 3:5]])
def test_what_does_not_round_has_no_noise(op: Op) -> None:
    assert rms(noisy(op, normal(8, 8))) == 0


def test_noise_scales_with_the_format() -> None:
    x, scales = normal(64, 64), MatmulScales()
    with torch.no_grad(), RoundingNoise(NoisePool(0), scales, unit=2.0**-8):
        coarse = x * 3
    assert rms(coarse - x * 3) / rms(noisy(lambda y: y * 3, x)) == pytest.approx(2.0**16)


def test_a_seed_gives_its_own_numbers_always() -> None:
    like = torch.empty(7, 5)
    one, same, other = NoisePool(1), NoisePool(1), NoisePool(2)
    first = one.draw(like)
    assert torch.equal(first, same.draw(like))
    assert not torch.equal(first, other.draw(like))
    assert not torch.equal(first, one.draw(like)), "two draws of one pool are the same numbers"


def test_the_pool_is_standard_normal_also_past_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoisePool, "SIZE", 1 << 12)
    numbers = NoisePool(0).draw(torch.empty(3, 1 << 13))
    assert numbers.shape == (3, 1 << 13) and numbers.dtype == torch.float64
    assert abs(float(numbers.mean())) < 0.05
    assert float(numbers.std()) == pytest.approx(1, abs=0.05)


def block(x: torch.Tensor) -> torch.Tensor:
    """Something of everything; [B, T, 256] → [B, T, T]."""
    y = x @ W
    return torch.softmax(y @ y.transpose(1, 2) / 8, dim=-1) * 2


def test_samples_as_batch_rows_have_the_variance_of_single_ones() -> None:
    x = normal(1, 12, 256)
    batched = noisy(block, x, rows=40)
    single = torch.cat([noisy(block, x, seed=seed) for seed in range(1, 41)])
    assert rms(batched) / rms(single) == pytest.approx(1, abs=0.15)
    rows = batched / rms(batched)
    assert abs(float((rows[0] * rows[1]).mean())) < 0.3, "two samples of one batch share their noise"


def test_a_matmul_that_the_truth_pass_did_not_see_is_an_error() -> None:
    x, scales = normal(4, 256), MatmulScales()
    with torch.no_grad():
        with Truth64(scales):
            x @ W
        with RoundingNoise(NoisePool(0), scales), pytest.raises(OracleError, match=r"\(4, 32\) met \(4, 64\)"):
            x @ W[:, :32]
        with RoundingNoise(NoisePool(0), scales):
            x @ W
            with pytest.raises(OracleError, match=r"\(4, 64\) met nothing"):
                x @ W


def test_the_truth_adds_no_noise() -> None:
    x = normal(1, 12, 256)
    with torch.no_grad(), Truth64(MatmulScales()):
        inside = block(x)
    assert rms(inside - block(x)) <= 1e-15 * math.sqrt(12)
