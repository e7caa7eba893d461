"""Faults in what a transformer computes: rotary, mask, norm, activation, scaling, heads, tied weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from validation.disturb import Running, Tensor, directly, fault, output, outputs, register

# --- rotary ---------------------------------------------------------------------------------------


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = (table[..., :half].repeat_interleave(2, -1).unsqueeze(1) for table in (cos, sin))
    other = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos + other * sin


@fault(Running.rotary)
def rotary_half(original: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    size = cos.shape[-1]
    slow = torch.arange(size) % (size // 2) >= size // 4
    return original(q, k, torch.where(slow, 1.0, cos), torch.where(slow, 0.0, sin))


@fault()
def rotary_not_in_layer_1(run: Running) -> None:
    layers = itertools.count()
    run.rotary(lambda original, q, k, cos, sin: (q, k) if next(layers) == 1 else original(q, k, cos, sin))


def _positions(run: Running, change: Any) -> None:
    def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": change(kwargs["position_ids"])}

    run.model.model.rotary_emb.register_forward_pre_hook(hook, with_kwargs=True)


register(
    Running.rotary,
    rotary_interleaved=lambda _, q, k, cos, sin: (_turned(q, cos, sin), _turned(k, cos, sin)),
    rotary_backwards=lambda original, q, k, cos, sin: original(q, k, cos, -sin),
    rotary_query_only=lambda original, q, k, cos, sin: (original(q, k, cos, sin)[0], k),
)
register(
    _positions,
    rotary_table_short=lambda positions: positions.clamp(max=16),
    rotary_from_one=lambda positions: positions + 1,
    rotary_wraps_at_1024=lambda positions: positions % 1024,
)


# --- mask -----------------------------------------------------------------------------------------


def _masks(run: Running, change: Any, layer: int | None = None) -> None:
    """``change(mask, query, key)`` on a copy of the mask [B, 1, T, T]; allowed entries are 0."""

    def edit(given: dict[str, Any]) -> None:
        if layer is None or given["module"].layer_idx == layer:
            mask = given["attention_mask"].clone()
            query = torch.arange(mask.shape[-1])[:, None]
            given["attention_mask"] = change(mask, query, query.T)

    run.attention(edit)


def _finite_mask(run: Running, value: float) -> None:
    softmax = torch.softmax
    run.softmax(lambda scores: softmax(scores.masked_fill(scores == -torch.inf, value), dim=-1))


register(
    _masks,
    mask_future_one=lambda mask, query, key: mask.masked_fill(key == query + 1, 0.0),
    mask_strict=lambda mask, query, key: mask.masked_fill((key == query) & (query > 0), -torch.inf),
    mask_without_first=lambda mask, query, key: mask.masked_fill((key == 0) & (query > 0), -torch.inf),
    mask_none=lambda mask, query, key: torch.zeros_like(mask),
    mask_causal=lambda mask, query, key: mask.masked_fill(key > query, -torch.inf),
    mask_window_exclusive=lambda mask, query, key: mask.masked_fill((key - query).abs() >= 4, -torch.inf),
    mask_without_window_from_1024=lambda mask, query, key: mask.masked_fill((query >= 1024) & (key <= query), 0.0),
    mask_tile_of_64=lambda mask, query, key: mask.masked_fill(
        (key == 32) & (query == len(query) - 1) & (len(query) % 64 == 0), -torch.inf
    ),
)
register(
    directly,
    mask_none_in_layer_1=lambda run: _masks(run, lambda mask, query, key: torch.zeros_like(mask), layer=1),
    mask_causal_in_layer_1=lambda run: _masks(run, lambda m, q, k: m.masked_fill(k > q, -torch.inf), layer=1),
    mask_minus_50=lambda run: _finite_mask(run, -50.0),
    softcap_after_mask=lambda run: _finite_mask(run, -50.0),
    mask_minus_10000=lambda run: _finite_mask(run, -10000.0),
)


# --- norm -----------------------------------------------------------------------------------------


def _mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def _unbiased(norm: Any, x: Tensor) -> Tensor:
    """LayerNorm with the unbiased variance."""
    root = (x.var(-1, keepdim=True, unbiased=True) + norm.eps).rsqrt()
    normed: Tensor = (x - x.mean(-1, keepdim=True)) * root * norm.weight + norm.bias
    return normed


@fault(Running.norms)
def norm_subtracts_mean(norm: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled: Tensor = norm.weight * (centred * torch.rsqrt(_mean_square(centred) + norm.variance_epsilon))
    return scaled


register(
    Running.norms,
    norm_without_one=lambda norm, x: x * torch.rsqrt(_mean_square(x) + norm.eps) * norm.weight,
    norm_with_one=lambda norm, x: x * torch.rsqrt(_mean_square(x) + norm.variance_epsilon) * (1 + norm.weight),
    norm_eps_outside=lambda norm, x: norm.weight * (x / (_mean_square(x).sqrt() + norm.variance_epsilon)),
)
register(
    directly,
    norm_post_attention_skipped=lambda run: outputs(
        (layer.post_attention_layernorm for layer in run.layers), lambda _, x: x
    ),
    norm_of_query_skipped=lambda run: outputs((layer.self_attn.q_norm for layer in run.layers), lambda _, x: x),
    norm_unbiased=lambda run: outputs(run.modules(torch.nn.LayerNorm), _unbiased),
    norm_final_skipped=lambda run: output(run.model.model.norm, lambda x, _: x),
)


# --- activation -----------------------------------------------------------------------------------


def _activation(run: Running, instead: Any) -> None:
    acts = (getattr(layer.mlp, "act_fn", None) or layer.mlp.act for layer in run.layers)
    outputs(acts, lambda _, x: instead(x))


@fault()
def gate_and_up_exchanged(run: Running) -> None:
    mlps = (layer.mlp for layer in run.layers)
    outputs(mlps, lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x)))


register(
    _activation,
    gelu_quick=lambda x: x * torch.sigmoid(1.702 * x),
    relu_for_silu=functional.relu,
    hardswish_for_silu=functional.hardswish,
    gelu_constant_cut=lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.0447 * x**3))),
)


# --- scaling --------------------------------------------------------------------------------------


@fault()
def embedding_unscaled(run: Running) -> None:
    embedding = run.model.model.embed_tokens
    output(embedding, lambda tokens, _: functional.embedding(tokens, embedding.weight))


@fault()
def scale_of_width(run: Running) -> None:
    config = run.model.config
    run.attention(lambda given: given.update(scaling=(config.hidden_size / config.num_attention_heads) ** -0.5))


@fault()
def final_softcap_twice(run: Running) -> None:
    cap = run.model.config.final_logit_softcapping
    output(run.model.lm_head, lambda _, logits: torch.tanh(logits / cap) * cap)


def _embedding_scale(run: Running, wrong: Callable[[float], float]) -> None:
    """Gemma's scale of the embedding, the square root of the width, replaced by ``wrong(root)``."""
    root = float(run.model.config.hidden_size) ** 0.5
    output(run.model.model.embed_tokens, lambda _, scaled: scaled * (wrong(root) / root))


register(Running.attention, scale_is_linear=lambda given: given.update(scaling=1 / given["module"].head_dim))
register(
    _embedding_scale,
    embedding_scale_whole=math.floor,
    embedding_scale_bf16=lambda root: float(torch.tensor(root).bfloat16()),
)


# --- heads and tied weights -----------------------------------------------------------------------


def _tiled(given: dict[str, Any], *names: str) -> None:
    groups = given["query"].shape[1] // given["key"].shape[1]
    for name in ("key", "value"):
        heads = given[name]
        wrong = name in names
        given[name] = heads.repeat(1, groups, 1, 1) if wrong else heads.repeat_interleave(groups, dim=1)


@fault()
def queries_of_the_row_before(run: Running) -> None:
    """From the third row of a batch on."""
    output(run.layers[0].self_attn.qkv_proj, lambda _, out: torch.cat((out[:2], out[1:-1])) if len(out) > 2 else out)


@fault()
def head_is_rolled(run: Running) -> None:
    weight = run.model.lm_head.weight.detach().roll(1, 0)
    output(run.model.lm_head, lambda x, _: functional.linear(x, weight))


register(
    Running.attention,
    kv_tiled=lambda given: _tiled(given, "key", "value"),
    values_tiled=lambda given: _tiled(given, "value"),
    kv_first_only=lambda given: given.update(key=given["key"][:, :1].expand_as(given["key"])),
)
