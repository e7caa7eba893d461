"""The reference of candle-mi's diffusion models in torch: a DiT of masked diffusion, and an Othello-GPT.

The DiT is that of Sahoo et al., Simple and Effective Masked Diffusion Language Models (NeurIPS 2024), as its
authors' ``models/dit.py`` computes it for a checkpoint that does not depend on time. The other is a GPT-2 block
without dropout. The tests compare both with ``torch.nn``'s own layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.oracle.interventions import Change

Formulas = Collection[Formula]
INSIDE = ("hook_q", "hook_k", "hook_v", "hook_scores", "hook_pattern")
"""Hooks inside of the attention."""
_TIMES = 256
"""Width of the embedding of a time."""
_EPSILON = 1e-5
_SURE = 1e-3
"""The least distance of a logit to the next that decides which token is sampled."""


class Diffusion:
    """A model of a directory with ``config.json`` and ``model.safetensors``.

    :ivar tensors: what the last pass held at each hook, before its edit, in order.
    """

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float64, formulas: Formulas = ()) -> None:
        self._one_pass = Formula.LAYER_NORM_IN_ONE_PASS in formulas
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = load_file(directory / "model.safetensors")
        self._weights = {name.removeprefix("backbone."): tensor.to(dtype) for name, tensor in weights.items()}
        self.tensors: Named = {}
        self._edits: dict[str, Change] = {}

    def forward(
        self,
        tokens: torch.Tensor,
        self_conditioning: torch.Tensor | None = None,
        edits: dict[str, Change] | None = None,
    ) -> Named:
        """``tokens`` [B, T] → every hook, and the logits [B, T, V].

        :param self_conditioning: ids [B, T] of an earlier prediction; the size of the vocabulary for none.
        :raises IndexError: no such token.
        :raises RuntimeError: more tokens than positions.
        """
        self.tensors, self._edits = {}, edits or {}
        stream = self._at("hook_embed", self._embedded(tokens, self_conditioning))
        for layer in range(self._layers):
            stream = self._block(layer, stream)
        return self.tensors | {"logits": self._head(self._at("hook_final_norm", self._final(stream)))}

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(self._final(hidden))

    def embedding(self, token: int) -> torch.Tensor:
        return self._weights[self._table][token]

    # --- what the two kinds have in common ---

    _table = "tok_emb.weight"
    _layers: int
    _heads: int

    def _embedded(self, tokens: torch.Tensor, self_conditioning: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def _block(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _final(self, stream: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _head(self, stream: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _at(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors[name] = tensor
        return self._edits[name](tensor) if name in self._edits else tensor

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        if self._one_pass and bias is not None:
            mean = x.mean(-1, keepdim=True)
            variance = x.square().mean(-1, keepdim=True) - mean.square()
            return (x - mean) * torch.rsqrt(variance + _EPSILON) * weight + bias
        return functional.layer_norm(x, x.shape[-1:], weight, bias, _EPSILON)

    def _attention(
        self, layer: int, x: torch.Tensor, qkv: str, rotate: Callable[..., Any], causal: bool
    ) -> torch.Tensor:
        """Before its output projection, [B, T, d]."""
        prefix = f"blocks.{layer}.attn."
        width = x.shape[-1] // self._heads
        parts = self._linear(f"blocks.{layer}.{qkv}", x).chunk(3, -1)
        q, k, v = (
            self._at(f"{prefix}hook_{name}", part.reshape(*part.shape[:-1], self._heads, width).transpose(1, 2))
            for name, part in zip("qkv", parts, strict=True)
        )
        scores = rotate(q) @ rotate(k).transpose(2, 3) / math.sqrt(width)
        if causal:
            above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(above, -torch.inf)
        scores = self._at(f"{prefix}hook_scores", scores)
        pattern = self._at(f"{prefix}hook_pattern", torch.softmax(scores, -1))
        return (pattern @ v).transpose(1, 2).flatten(2)


class Mdlm(Diffusion):
    """Weight-only layer norms, scaled, shifted and gated by a constant (adaLN); rotary positions."""

    _table = "vocab_embed.embedding"

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float64, formulas: Formulas = ()) -> None:
        super().__init__(directory, dtype, formulas)
        self._layers, self._heads = self.config["n_blocks"], self.config["n_heads"]
        if self.config.get("time_conditioning", False):
            raise ValueError("the pass depends on a time, which a forward is not given")

    def _embedded(self, tokens: torch.Tensor, self_conditioning: torch.Tensor | None) -> torch.Tensor:
        if self_conditioning is not None:
            raise IndexError("there is no table for self-conditioning")
        return functional.embedding(tokens, self._weights[self._table])

    def _condition(self) -> torch.Tensor:
        """[1, cond_dim] at time 0, whose embedding is the cosines and sines of 0."""
        half = torch.ones(1, _TIMES // 2, dtype=self._weights[self._table].dtype)
        hidden = functional.silu(self._linear("sigma_map.mlp.0", torch.cat([half, 0 * half], -1)))
        return functional.silu(self._linear("sigma_map.mlp.2", hidden))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, T, D] with the halves of D as pairs."""
        size = x.shape[-1]
        rates = 10000.0 ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * rates
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _block(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        prefix = f"blocks.{layer}."
        shift1, scale1, gate1, shift2, scale2, gate2 = self._linear(
            f"{prefix}adaLN_modulation", self._condition()
        ).chunk(6, -1)
        stream = self._at(f"{prefix}hook_resid_pre", stream)
        x = self._norm(f"{prefix}norm1", stream) * (1 + scale1) + shift1
        x = self._linear(f"{prefix}attn_out", self._attention(layer, x, "attn_qkv", self._rotate, False))
        stream = self._at(f"{prefix}hook_resid_mid", stream + self._at(f"{prefix}hook_attn_out", x * gate1))
        x = self._at(f"{prefix}mlp.hook_pre", self._norm(f"{prefix}norm2", stream) * (1 + scale2) + shift2)
        x = functional.gelu(self._linear(f"{prefix}mlp.0", x), approximate="tanh")
        x = self._at(f"{prefix}mlp.hook_post", self._linear(f"{prefix}mlp.2", x))
        return self._at(f"{prefix}hook_resid_post", stream + self._at(f"{prefix}hook_mlp_out", x * gate2))

    def _final(self, stream: torch.Tensor) -> torch.Tensor:
        shift, scale = self._linear("output_layer.adaLN_modulation", self._condition()).chunk(2, -1)
        return self._norm("output_layer.norm_final", stream) * (1 + scale) + shift

    def _head(self, stream: torch.Tensor) -> torch.Tensor:
        return self._linear("output_layer.linear", stream)


class Othello(Diffusion):
    """GPT-2's block with learned positions and an untied head; attention is causal where the config says so."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float64, formulas: Formulas = ()) -> None:
        super().__init__(directory, dtype, formulas)
        self._layers, self._heads = self.config["n_layer"], self.config["n_head"]

    def _embedded(self, tokens: torch.Tensor, self_conditioning: torch.Tensor | None) -> torch.Tensor:
        stream = functional.embedding(tokens, self._weights[self._table])
        if self_conditioning is not None:
            if not self.config.get("self_conditioning", False):
                raise IndexError("there is no table for self-conditioning")
            stream = stream + functional.embedding(self_conditioning, self._weights["self_cond_emb.weight"])
        return stream + self._weights["pos_emb.weight"][: tokens.shape[1]]

    def _block(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        prefix, causal = f"blocks.{layer}.", bool(self.config.get("causal", False))
        stream = self._at(f"{prefix}hook_resid_pre", stream)
        x = self._attention(layer, self._norm(f"{prefix}ln1", stream), "attn.qkv", lambda each: each, causal)
        x = self._at(f"{prefix}hook_attn_out", self._linear(f"{prefix}attn.proj", x))
        stream = self._at(f"{prefix}hook_resid_mid", stream + x)
        x = self._at(f"{prefix}mlp.hook_pre", self._norm(f"{prefix}ln2", stream))
        x = self._linear(f"{prefix}mlp.2", functional.gelu(self._linear(f"{prefix}mlp.0", x)))
        # candle-mi has two hooks here, at one tensor: an edit of the first is seen at the second.
        x = self._at(f"{prefix}hook_mlp_out", self._at(f"{prefix}mlp.hook_post", x))
        return self._at(f"{prefix}hook_resid_post", stream + x)

    def _final(self, stream: torch.Tensor) -> torch.Tensor:
        return self._norm("ln_f", stream)

    def _head(self, stream: torch.Tensor) -> torch.Tensor:
        return self._linear("head", stream)


def load_diffusion(directory: Path, dtype: torch.dtype = torch.float64, formulas: Formulas = ()) -> Diffusion:
    """The model of a directory, by its ``model_type``.

    :param formulas: known wrong formulas; none for the truth.
    """
    kind = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"]
    return (Mdlm if kind == "mdlm" else Othello)(directory, dtype, formulas)


def _change(edit: dict[str, Any]) -> Change:
    """What an edit does to the tensor of its hook."""
    match edit["kind"]:
        case "replace":
            return lambda tensor: edit["tensor"].expand_as(tensor)
        case "add":
            return lambda tensor: tensor + edit["tensor"]
        case "scale":
            return lambda tensor: tensor * edit["factor"]
        case "zero":
            return torch.zeros_like
        case "patch_at":
            return lambda tensor: torch.cat(
                [tensor[:, : edit["position"]], edit["tensor"], tensor[:, edit["position"] + 1 :]], 1
            )
        case "knockout":
            return lambda tensor: tensor.masked_fill(_edges(edit["edges"], tensor.shape[-1]), -torch.inf)
        case other:
            raise CaseTableError(f"there is no edit {other}")


def _edges(edges: list[list[int]], size: int) -> torch.Tensor:
    chosen = torch.zeros(size, size, dtype=torch.bool)
    for query, key in edges:
        chosen[query, key] = True
    return chosen


def _forward(
    model: Diffusion,
    tokens: list[list[int]],
    capture: str = "all",
    self_conditioning: list[list[int]] | None = None,
    edit: dict[str, Any] | None = None,
    pretrained: bool = False,
) -> Named:
    """Every hook, those outside of the attention (``stream``), or none, and the logits."""
    edits = {} if edit is None else {edit["hook"]: _change(edit)}
    before = None if self_conditioning is None else torch.tensor(self_conditioning)
    found = model.forward(torch.tensor(tokens), before, edits)
    if unknown := edits.keys() - found.keys():
        raise IndexError(f"there is no hook {unknown.pop()}")
    left_out = {"all": (), "stream": INSIDE, "nothing": ("",)}[capture]
    return {name: tensor for name, tensor in found.items() if name == "logits" or not name.endswith(left_out)}


def _project(model: Diffusion, hidden: torch.Tensor) -> Named:
    return {"value": model.project(hidden)}


def _embedding(model: Diffusion, token: int) -> Named:
    return {"value": model.embedding(token)}


def _sample(
    model: Diffusion,
    prompt: list[int],
    seq_len: int,
    mask: int,
    temperature: float = 1.0,
    seed: int = 0,
    steps: int = 1,
) -> Named:
    """Steps with ``top_k`` = 1 reveal every masked position, as the likeliest token but the mask.

    Of several steps the trajectory is left to chance, and of one masked position the end is not.

    :raises CaseTableError: two tokens are too near for the likeliest to be sure, or the end is left to chance.
    """
    start = torch.full((seq_len,), mask)
    start[: len(prompt)] = torch.tensor(prompt[:seq_len], dtype=torch.int64)
    if steps > 1 and (start == mask).sum() > 1:
        raise CaseTableError("of several steps only one place may be masked")
    logits = model.forward(start[None])["logits"][0].clone()
    logits[:, mask] = -torch.inf
    best = logits.topk(2, -1).values
    if (best[:, 0] - best[:, 1]).min() < _SURE:
        raise CaseTableError("the likeliest token is not sure")
    final = torch.where(start == mask, logits.argmax(-1), start)
    trajectory = {} if steps > 1 else {"trajectory": torch.stack([start, final]).double()}
    return {"value": final.double()} | trajectory


DIFFUSIONS: dict[str, tuple[frozenset[Formula], Callable[..., Named]]] = {
    "diffusion_forward": (frozenset({Formula.LAYER_NORM_IN_ONE_PASS}), _forward),
    "diffusion_project": (frozenset(), _project),
    "diffusion_embedding": (frozenset(), _embedding),
    "diffusion_sample": (frozenset(), _sample),
}
"""Function → its formulas, and what computes it of a model."""
