"""Faults of precision: one operation in a narrower format, a rougher approximation, another order of summing."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional

from validation.disturb import Running, Tensor, directly, fault, output, outputs, register


def tf32(x: Tensor) -> Tensor:
    """Rounded to TF32's 10 bits of mantissa, float32."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def f16(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


@fault()
def softmax_bf16(run: Running) -> None:
    softmax = torch.softmax
    run.softmax(lambda scores: softmax(scores.bfloat16(), dim=-1).to(scores.dtype))


@fault()
def softmax_summed_in_model_dtype(run: Running) -> None:
    dtype = run.model.dtype

    def narrow(scores: Tensor) -> Tensor:
        weights = torch.exp(scores.float() - scores.float().amax(-1, keepdim=True))
        total = torch.zeros_like(weights[..., :1])
        for key in range(weights.shape[-1]):
            total = (total + weights[..., key, None]).to(dtype).float()
        return weights / total

    run.softmax(narrow)


@fault(Running.softmax)
def softmax_without_maximum(scores: Tensor) -> Tensor:
    weights = torch.exp(scores)
    return weights / weights.sum(-1, keepdim=True)


@fault(Running.softmax)
def exp_approximate(scores: Tensor) -> Tensor:
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    sign = 1 - 2 * (torch.arange(scores.shape[-1]) % 2)
    weights = weights * (1 + 1e-5 * sign)
    return weights / weights.sum(-1, keepdim=True)


@fault(Running.norms)
def norm_bf16(norm: Any, x: Tensor) -> Tensor:
    low = x.bfloat16()
    normed = low * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    scaled: Tensor = norm.weight.bfloat16() * normed
    return scaled.to(x.dtype)


@fault(Running.norms)
def rsqrt_approximate(norm: Any, x: Tensor) -> Tensor:
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    mantissa, exponent = torch.frexp(root)
    scaled: Tensor = norm.weight * (x * torch.ldexp(torch.round(mantissa * 4096) / 4096, exponent))
    return scaled


@fault()
def rotary_angle_f16(run: Running) -> None:
    frequencies = run.model.model.rotary_emb.inv_freq

    def instead(original: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        angles = f16(torch.arange(q.shape[-2])[:, None] * frequencies)
        angles = torch.cat((angles, angles), -1)[None]
        return original(q, k, angles.cos(), angles.sin())

    run.rotary(instead)


@fault()
def tanh_pade(run: Running) -> None:
    """Attention's tanh alone: the first call of each layer."""
    exact = torch.tanh
    calls = itertools.count()

    def rough(x: Tensor) -> Tensor:
        if next(calls) >= len(run.layers):
            return exact(x)
        square = x * x
        return x * (27 + square) / (27 + 9 * square)

    run.patch(torch, "tanh", rough)


def _added_in_f16(linear: Any, x: Tensor) -> Tensor:
    total = torch.zeros(*x.shape[:-1], linear.weight.shape[0], dtype=torch.float16)
    for part in range(x.shape[-1]):
        total = (total.float() + x[..., part, None] * linear.weight[:, part]).half()
    return total.to(x.dtype)


register(
    Running.attention,
    tf32_scores=lambda given: given.update(query=tf32(given["query"]), key=tf32(given["key"])),
    keys_bf16=lambda given: given.update(key=bf16(given["key"])),
)
register(Running.rotary, rotary_bf16=lambda original, q, k, cos, sin: original(q, k, bf16(cos), bf16(sin)))
register(
    directly,
    tf32_linear=lambda run: outputs(
        run.modules(torch.nn.Linear), lambda linear, x: functional.linear(tf32(x), tf32(linear.weight), linear.bias)
    ),
    f16_accumulation=lambda run: outputs((layer.mlp.down_proj for layer in run.layers), _added_in_f16),
    silu_f16=lambda run: outputs(
        (layer.mlp.act_fn for layer in run.layers), lambda _, x: functional.silu(x.half()).to(x.dtype)
    ),
    logits_bf16=lambda run: output(run.model.lm_head, lambda _, logits: bf16(logits)),
    stream_f16=lambda run: output(run.layers[0], lambda _, stream: f16(stream)),
    values_bf16=lambda run: output(run.layers[0].self_attn.v_proj, lambda _, out: bf16(out)),
)
