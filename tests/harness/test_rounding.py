"""The float64 mode and the noise: no float32 inside the truth, and no operation without a rule of the right size.

A rule that is too large would hide a fault; one that is too small would fail correct arithmetic.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional

from candle_mi_parity.errors import OracleError
from candle_mi_parity.oracle import rounding
from candle_mi_parity.oracle.arithmetic import ACCUMULATION, Arithmetic
from candle_mi_parity.oracle.compute import sample
from candle_mi_parity.oracle.rounding import Float64, MatmulScales, NoisePool, RoundingNoise, Truth64
from candle_mi_parity.oracle.torch_state import TORCH, torch_state
from tests.support.planting import real

Op = Callable[[torch.Tensor], torch.Tensor]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 numbers that float32 holds exactly."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32)).double()


def mode() -> Float64:
    return Float64()  # type: ignore[no-untyped-call]


def noise_of(scales: MatmulScales) -> RoundingNoise:
    return RoundingNoise(NoisePool(0), scales)


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
def test_every_result_is_float64(name: str) -> None:
    with mode(), torch.no_grad():
        assert ESCAPES[name](normal(3, 4)).dtype == torch.float64, f"{name} escaped the float64 mode"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_a_literal_is_not_rounded_to_float32(dtype: torch.dtype | None) -> None:
    assert torch.tensor([0.1], dtype=torch.float32).double().item() != 0.1
    with mode(), torch.no_grad():
        made = [torch.tensor([0.1], dtype=dtype), torch.as_tensor([0.1], dtype=dtype)]
        made.append(torch.full((1,), 0.1, dtype=dtype or torch.float32))
        assert torch.tensor([1, 2]).dtype == torch.int64
    assert [tensor.item() for tensor in made] == [0.1] * 3, "a float32-rounded 0.1 is in the float64 mode"


@pytest.mark.parametrize("op", [cast_softmax, cast_norm])
def test_a_cast_to_float32_and_back_is_exact_in_the_mode(op: Op) -> None:
    x = normal(5, 32)
    precise = torch.softmax(x, -1) if op is cast_softmax else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    with mode(), torch.no_grad():
        inside = op(x)
    assert rms(inside - precise) < 1e-15
    assert rms(op(x) - precise) > 1e-9, "the cast is exact without the mode too"


def test_a_composite_operation_and_one_without_a_rule_are_errors() -> None:
    with torch.inference_mode(), mode(), pytest.raises(OracleError, match=r"composite.*run under torch\.no_grad"):
        torch.softmax(normal(3, 4), dim=-1, dtype=torch.float32)
    with torch.no_grad(), RoundingNoise(NoisePool(0), MatmulScales()):
        with pytest.raises(OracleError, match=r"aten\.cumsum\.default has no noise rule"):
            normal(3, 4).cumsum(-1)
        with pytest.raises(OracleError, match="no noise rule"):
            torch.linalg.qr(normal(3, 3))


def test_the_pool_gives_reproducible_standard_normal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoisePool, "SIZE", 1 << 12)
    like = torch.empty(3, 1 << 13)  # longer than the pool
    one, same, other = NoisePool(1), NoisePool(1), NoisePool(2)
    first = one.draw(like)
    assert torch.equal(first, same.draw(like)) and not torch.equal(first, other.draw(like))
    assert not torch.equal(first, one.draw(like)), "two draws of one pool are the same numbers"
    assert first.shape == like.shape and first.dtype == torch.float64
    assert abs(float(first.mean())) < 0.05 and float(first.std()) == pytest.approx(1, abs=0.05)


def test_samples_do_not_change_the_shared_numbers() -> None:
    numbers = rounding._normal_numbers(NoisePool.SIZE)
    before = numbers.clone()
    there = real("starcoder2/hub")
    sample(there.oracle.computation.model, torch.tensor(there.subject.tokens), 0, lambda captured: {}, {}, samples=2)
    assert torch.equal(numbers, before)


W = normal(256, 64, seed=1)


def block(x: torch.Tensor) -> torch.Tensor:
    """Something of everything; [B, T, 256] → [B, T, T]."""
    y = x @ W
    return torch.softmax(y @ y.transpose(1, 2) / 8, dim=-1) * 2


def test_the_truth_has_no_noise_and_samples_in_one_batch_have_the_variance_of_single_ones() -> None:
    x = normal(1, 12, 256)
    with torch.no_grad(), Truth64(MatmulScales()):
        inside = block(x)
    assert rms(inside - block(x)) <= 1e-15 * math.sqrt(12)
    batched = noisy(block, x, rows=20)
    single = torch.cat([noisy(block, x, seed=seed) for seed in range(1, 21)])
    assert rms(batched) / rms(single) == pytest.approx(1, abs=0.15)
    rows = batched / rms(batched)
    assert abs(float((rows[0] * rows[1]).mean())) < 0.3, "two samples of one batch share their noise"


def test_a_matmul_missing_from_the_truth_pass_is_an_error() -> None:
    x, scales = normal(4, 256), MatmulScales()
    with Truth64(scales):
        x @ W
    with pytest.raises(OracleError, match=r"\(4, 32\); the truth pass has one of shape \(4, 64\)"), noise_of(scales):
        x @ W[:, :32]
    with pytest.raises(OracleError, match=r"matmul 2 in no module of a sample .* has none there"), noise_of(scales):
        x @ W + x @ W
    with pytest.raises(OracleError, match="matmul 1 in no module of the truth pass is not in a"), noise_of(scales):
        pass


class Pair(torch.nn.Module):
    """Two matmuls of one shape, of which the second is a thousand times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = (torch.nn.Linear(256, 64, bias=False).double() for _ in range(2))
        self.large.weight.data = 1000 * self.small.weight.data

    def forward(self, x: torch.Tensor, order: str) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name)(x) for name in order.split()}


def test_matmul_scales_are_matched_by_module_not_by_order() -> None:
    pair, x, scales = Pair(), normal(8, 256), MatmulScales()
    with Truth64(scales):
        truth = pair(x, "small large")
    for order in ("small large", "large small"):
        with noise_of(scales):
            noisy = pair(x, order)
        errors = {name: rms(noisy[name] - truth[name]) for name in truth}
        assert errors["large"] / errors["small"] == pytest.approx(1000, rel=0.3)
    with pytest.raises(OracleError, match=r"matmul 2 in Pair\.small of a sample"), noise_of(scales):
        pair(x, "small") | pair(x, "small")
    with pytest.raises(OracleError, match=r"matmul 1 in Pair\.large of the truth pass is not"), noise_of(scales):
        pair(x, "small")


def test_torch_state_is_restored_and_exclusive() -> None:
    def other() -> bool:
        """Whether another thread can take the lock."""
        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(TORCH.acquire, blocking=False).result()
            if taken:
                pool.submit(TORCH.release).result()
        return taken

    before = torch.get_default_dtype()
    with torch_state(torch.float16):
        assert torch.get_default_dtype() == torch.float16 and not torch.is_grad_enabled() and not other()
        with pytest.raises(KeyError), Float64():  # type: ignore[no-untyped-call]
            raise KeyError(str(torch.get_default_dtype()))
        assert torch.get_default_dtype() == torch.float16
    assert torch.get_default_dtype() == before and torch.is_grad_enabled() and other()


# --- the size of each rule, against the error of the real operation in float32 --------------------


def sequential_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis; in float32 in the order of the elements.

    The rule has to hold for any order; torch's own sum errs by an eighth of it at 256 terms.
    """
    if x.dtype == torch.float64:
        return x.sum(-1)
    return torch.from_numpy(np.add.accumulate(x.numpy(), axis=-1)[..., -1].copy())


BIAS = normal(256, seed=2)
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


def test_a_cast_to_the_models_format_rounds_and_a_move_to_a_device_does_not() -> None:
    x = normal(8, 8)
    with torch.no_grad(), RoundingNoise(NoisePool(0), MatmulScales(), Arithmetic(2.0**-8)):
        wide = x.float()
        moved, cast = wide.to(wide.device), wide.to(torch.float64)
    assert torch.equal(moved, x) and not torch.equal(cast, x)


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
