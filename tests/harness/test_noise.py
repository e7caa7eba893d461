"""The size of the noise, rule by rule, against the error of the real operation in float32.

A rule that is too large would hide a fault; one that is too small would fail correct arithmetic.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional

from candle_mi_parity.oracle.arithmetic import ACCUMULATION, Arithmetic
from candle_mi_parity.oracle.rounding import MatmulScales, NoisePool, RoundingNoise, Truth64
from tests.harness.test_rounding import Op, noisy, normal, rms


def sequential_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis; in float32 in the order of the elements.

    The rule has to hold for any order; torch's own sum errs by an eighth of it at 256 terms.
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
    "mean of squares": lambda x: sequential_sum(x * x) / x.shape[-1],
    "sum of squares": lambda x: sequential_sum(x * x),
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
def test_noise_has_the_size_of_the_real_error(name: str) -> None:
    op, x = RULES[name], normal(64, 256)
    with torch.no_grad():
        measured = rms(op(x.float()).double() - op(x))
    predicted = rms(noisy(op, x))
    assert 0.2 < measured / predicted < 3, f"{name}: float32 errs by {measured:.3g}, the rule says {predicted:.3g}"


@pytest.mark.parametrize("n", [64, 256, 2304])
def test_the_rule_of_a_sum_covers_torchs_order(n: int) -> None:
    x = normal(256, n).square()
    x = x.float().double()
    with torch.no_grad():
        measured = rms(x.float().sum(-1).double() - x.sum(-1))
    assert measured < rms(noisy(lambda y: y.sum(-1), x)), f"torch's sum of {n} terms errs by more than the rule"


@pytest.mark.parametrize("op", [torch.relu, torch.abs, lambda x: x.transpose(0, 1), lambda x: x[:, 3:5]])
def test_an_exact_operation_has_no_noise(op: Op) -> None:
    assert rms(noisy(op, normal(8, 8))) == 0


def test_noise_scales_with_the_format() -> None:
    x, scales = normal(64, 64), MatmulScales()
    with torch.no_grad(), RoundingNoise(NoisePool(0), scales, Arithmetic(2.0**-8)):
        coarse = x * 3
    assert rms(coarse - x * 3) / rms(noisy(lambda y: y * 3, x)) == pytest.approx(2.0**16)


@pytest.mark.parametrize("n", [64, 256, 2304])
def test_a_sequential_matmul_has_the_noise_of_cuda(n: int) -> None:
    x, w = normal(16, n), normal(n, 32, seed=3)
    exact = x @ w
    with torch.no_grad():
        kernel = rms((x.float() @ w.float()).double() - exact)
        terms = x.float()[:, :, None] * w.float()[None]
        serial = torch.from_numpy(np.add.accumulate(terms.numpy(), axis=1)[:, -1].copy())
    predicted = {device: rms(_matmul_noise(x, w, share)) for device, share in ACCUMULATION.items()}
    ratios = kernel / predicted["cpu"], rms(serial.double() - exact) / predicted["cuda"]
    assert all(0.2 < ratio < 1.3 for ratio in ratios), ratios


def _matmul_noise(x: torch.Tensor, w: torch.Tensor, accumulation: float) -> torch.Tensor:
    scales = MatmulScales()
    with torch.no_grad():
        with Truth64(scales):
            truth = x @ w
        with RoundingNoise(NoisePool(0), scales, Arithmetic(accumulation=accumulation)):
            return x @ w - truth
