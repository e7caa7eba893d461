"""Faults of precision: one operation in a narrower format, a rougher approximation, another order of summing."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from validation.disturb import Running, Tensor, fault, output, outputs, register


def tf32(x: Tensor) -> Tensor:
    """Rounded to TF32's 10 bits of mantissa, float32."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def f16(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


def _maximum(scores: Tensor) -> Tensor:
    return scores.amax(-1, keepdim=True)


@fault
def softmax_bf16(run: Running) -> None:
    softmax = torch.softmax
    run.softmax(lambda scores: softmax(scores.bfloat16(), dim=-1).to(scores.dtype))


@fault
def softmax_without_maximum(run: Running) -> None:
    def plain(scores: Tensor) -> Tensor:
        weights = torch.exp(scores)
        return weights / weights.sum(-1, keepdim=True)

    run.softmax(plain)


@fault
def exp_approximate(run: Running) -> None:
    def rough(scores: Tensor) -> Tensor:
        weights = torch.exp(scores - _maximum(scores))
        sign = 1 - 2 * (torch.arange(scores.shape[-1]) % 2)
        weights = weights * (1 + 1e-5 * sign)
        return weights / weights.sum(-1, keepdim=True)

    run.softmax(rough)


@fault
def norm_bf16(run: Running) -> None:
    def narrow(norm: Any, x: Tensor) -> Tensor:
        low = x.bfloat16()
        normed = low * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        scaled: Tensor = norm.weight.bfloat16() * normed
        return scaled.to(x.dtype)

    run.norms(narrow)


def _added_in_f16(linear: Any, x: Tensor) -> Tensor:
    total = torch.zeros(*x.shape[:-1], linear.weight.shape[0], dtype=torch.float16)
    for part in range(x.shape[-1]):
        total = (total.float() + x[..., part, None] * linear.weight[:, part]).half()
    return total.to(x.dtype)


register(
    tf32_linear=lambda run: outputs(
        run.modules(torch.nn.Linear), lambda linear, x: functional.linear(tf32(x), tf32(linear.weight), linear.bias)
    ),
    f16_accumulation=lambda run: outputs((layer.mlp.down_proj for layer in run.layers), _added_in_f16),
    rotary_bf16=lambda run: run.rotary(lambda original, q, k, cos, sin: original(q, k, bf16(cos), bf16(sin))),
    logits_bf16=lambda run: output(run.model.lm_head, lambda _, logits: bf16(logits)),
)
