"""Gradients of a forward pass in float64, and the noise of a float32 backward pass.

The backward pass runs under the modes of :mod:`rounding`, which see each of autograd's operations as one of the
forward pass. Those that only a backward pass has are listed here. Their rules, as standard deviations of one element
and with u = 2⁻²⁴:

===========================  ==========================================================================
sum of N terms a             u·sqrt(N)·max(\\|o\\|/3, sqrt(Σa²/6)), since the terms may cancel: a random walk
a row of an embedding        u·sqrt((n − 1)/3·Σg²) of n tokens with that row; exact for one
softmax, o = p·(g − Σgp)     each product u, the sum as above, and its sum over the row, which a gradient of the
                             row's maximum adds to that element and which is 0 but for rounding
silu, gelu, tanh             each of the terms of their slopes, which cancel, by the rules of its operations
===========================  ==========================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from candle_mi_parity.oracle.arithmetic import UNIT
from candle_mi_parity.oracle.rounding import Float64, MatmulScales, NoisePool, RoundingNoise, Truth64

_ONE = UNIT / math.sqrt(3)
"""Standard deviation of one rounding of a number of size 1."""
Variables = dict[str, torch.Tensor]


class _InOrder:
    """Numbers the matmuls of a pass; those of a backward pass belong to no module."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def next(self) -> tuple[str, int]:
        self.counts["pass"] += 1
        return "pass", self.counts["pass"]


class _Tracked(Float64):  # type: ignore[no-untyped-call]
    """Adds gradients to a mode, and the slope of silu, whose backward operation is a composite one."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        self._around.enter_context(torch.enable_grad())
        self._calls = _InOrder()
        return entered

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.silu_backward.default:
            gradient, x = args
            sigmoid = torch.sigmoid(x)
            return self.round(func, args, gradient * sigmoid * (1 + x * (1 - sigmoid)), None)
        return super().__torch_dispatch__(func, types, args, kwargs)


class GradientTruth(_Tracked, Truth64):  # type: ignore[no-untyped-call]
    """The truth pass, forward and backward."""


class GradientNoise(_Tracked, RoundingNoise):  # type: ignore[no-untyped-call]
    """A sample, forward and backward."""

    def round(self, func: Any, args: Any, out: Any, asked: torch.dtype | None) -> Any:
        name = func.overloadpacket.__name__
        if (rule := _RULES.get(name)) is not None:
            deviation = rule(args, out)
            return out.addcmul_(deviation, self._pool.draw(out))
        if name == "_softmax_backward_data":
            return self._softmax(args, out)
        return super().round(func, args, out, asked)

    def _softmax(self, args: Any, out: torch.Tensor) -> torch.Tensor:
        gradient, pattern, dim = args[:3]
        terms = gradient * pattern
        common = _sum_deviation(terms, terms.sum(dim, keepdim=True), dim)
        each = math.sqrt(3) * _ONE * (gradient.abs() + terms.sum(dim, keepdim=True).abs())
        spread = (each * pattern).square() + (out * _ONE).square()
        noise = self._pool.draw(out) * spread.sqrt() + self._pool.draw(common) * common * pattern
        rest = noise.sum(dim, keepdim=True) + self._pool.draw(common) * _sum_deviation(out, out.sum(dim, True), dim)
        largest = torch.zeros_like(out).scatter_(dim, pattern.argmax(dim, keepdim=True), 1.0)
        return out.add_(noise - largest * rest)


def _sum_deviation(terms: torch.Tensor, out: torch.Tensor, dim: Any) -> torch.Tensor:
    size = terms.numel() / max(out.numel(), 1)
    squares = terms.square().sum(dim, keepdim=True).reshape(out.shape)
    return torch.maximum(out.abs() / 3, (squares / 6).sqrt()).mul(UNIT * math.sqrt(size))


def _sum(args: Any, out: torch.Tensor) -> torch.Tensor:
    terms = args[0]
    return _sum_deviation(terms, out, args[1] if len(args) > 1 and args[1] else list(range(terms.dim())))


def _embedding(args: Any, out: torch.Tensor) -> torch.Tensor:
    gradient, rest = args[0], args[1:]
    count, squares = (
        torch.ops.aten.embedding_dense_backward.default(each, *rest)
        for each in (torch.ones_like(gradient), gradient.square())
    )
    found: torch.Tensor = squares * (count - 1).clamp_min(0)
    return found.sqrt().mul(_ONE)


def _slope(terms: Callable[[Any], tuple[torch.Tensor, ...]]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """The rule of a gradient times a sum of terms, each given with the number of roundings in its size."""

    def rule(args: Any, out: torch.Tensor) -> torch.Tensor:
        squares = torch.stack([term.square() for term in terms(args)]).sum(0)
        spread: torch.Tensor = args[0].square() * squares + out.square()
        return spread.sqrt().mul(_ONE)

    return rule


def _silu(args: Any) -> tuple[torch.Tensor, ...]:
    """σ·(1 − y) + y with y = x·σ; σ takes four operations."""
    sigmoid = torch.sigmoid(args[1])
    value = args[1] * sigmoid
    return 3 * sigmoid * (1 - value), 2 * value, sigmoid


def _gelu(args: Any) -> tuple[torch.Tensor, ...]:
    """(1 + t)/2 + x·(1 − t²)·v'/2 with t = tanh v, v = sqrt(2/π)·(x + 0.044715·x³)."""
    x = args[1]
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square())
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    inner = x * slope / 2
    return 2 * tanh, inner * (1 + tanh.square()), 3 * inner * (1 - tanh.square()), torch.full_like(x, 0.5)


def _tanh(args: Any) -> tuple[torch.Tensor, ...]:
    square = args[1].square()
    return square, 1 - square


_RULES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "embedding_dense_backward": _embedding,
    "gelu_backward": _slope(_gelu),
    "silu_backward": _slope(_silu),
    "slice_backward": lambda _, out: torch.zeros_like(out),
    "sum": _sum,
    "tanh_backward": _slope(_tanh),
}
"""Operation → the standard deviation of each element of its result."""


def with_respect_to(once: Callable[[Variables], torch.Tensor], variables: Variables, weights: Variables) -> Variables:
    """The gradient of a scalar for each variable, and for each weight; 0 for one that it does not depend on.

    :param once: the scalar of the variables.
    :param weights: those of a model on which the scalar depends, too; see :func:`only`.
    """
    leaves = {name: value.detach().requires_grad_(True) for name, value in variables.items()}
    loss = once(leaves)
    every = leaves | weights
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in every.items()}
    found = torch.autograd.grad(loss, list(every.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(every.items(), found, strict=True)
    }


def modes(pool: NoisePool | None, scales: MatmulScales) -> _Tracked:
    """The truth pass, or a sample with a pool of noise."""
    return GradientTruth(scales) if pool is None else GradientNoise(pool, scales)


def only(model: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The weights of these names; they alone require gradients from now on.

    :raises KeyError: the model has no such weight.
    """
    weights = dict(model.named_parameters())
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: weights[name].requires_grad_(True) for name in names}
