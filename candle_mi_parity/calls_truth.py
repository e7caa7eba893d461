"""What each function of ``fixtures/calls.toml`` should give, in float64, and the noise of float32 around it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from candle_mi_parity.calls import CallRow, CallTable
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.rounding import MatmulScales, NoisePool, RoundingNoise, Truth64

SAMPLES = 16
Named = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CallTruth:
    """:ivar values: name → expected, float64. :ivar noise: name → rms of sample − truth, same shapes."""

    values: dict[str, np.ndarray]
    noise: dict[str, np.ndarray]


def _last(logits: torch.Tensor) -> torch.Tensor:
    """[vocab], [seq, vocab] or [1, seq, vocab] → [vocab] of the last position."""
    return logits.reshape(-1, logits.shape[-1])[-1]


def _kl_divergence(baseline: torch.Tensor, other: torch.Tensor) -> Named:
    """Σ p·ln(p/q), in nats, over the vocabulary and summed over positions (``F.kl_div``'s ``sum``)."""
    p, q = torch.softmax(baseline, -1), torch.softmax(other, -1)
    return {"value": (p * torch.log(p / q)).sum()}


def _logit_diff(baseline: torch.Tensor, ablated: torch.Tensor, token: int) -> Named:
    return {"value": _last(baseline)[token] - _last(ablated)[token]}


def _top_changed(baseline: torch.Tensor, ablated: torch.Tensor, k: int) -> Named:
    """Of every token; the comparison takes the k largest changes."""
    p, q = torch.softmax(_last(baseline), -1), torch.softmax(_last(ablated), -1)
    return {"baseline": p, "ablated": q, "change": (p - q).abs()}


def _attention(attention: torch.Tensor, **args: Any) -> Named:
    """Mean over batch, heads and targets of the weight from one position."""
    return {"value": attention[:, :, args["from"], args["targets"]].mean()}


def _token_prob(logits: torch.Tensor, token: int) -> Named:
    return {"value": torch.softmax(_last(logits), -1)[token]}


def _sample(logits: torch.Tensor) -> Named:
    return {"token": torch.argmax(logits).double()}


def _edge_mask(heads: list[int] | None, edges: list[list[int]], n_heads: int, length: int) -> torch.Tensor:
    mask = torch.zeros(1, n_heads, length, length, dtype=torch.bool)
    for head in range(n_heads) if heads is None else heads:
        for query, key in edges:
            mask[0, head, query, key] = True
    return mask


def _knockout(edges: list[list[int]], n_heads: int, seq_len: int, heads: list[int] | None = None) -> Named:
    mask = _edge_mask(heads, edges, n_heads, seq_len)
    return {"value": torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf)}


def _steering(
    attention: torch.Tensor,
    edges: list[list[int]],
    heads: list[int] | None = None,
    scale: float | None = None,
    set_value: float | None = None,
) -> Named:
    """Edges scaled, or set and the row's others lowered in equal parts; then each touched row sums to 1."""
    mask = _edge_mask(heads, edges, attention.shape[1], attention.shape[2]).expand(attention.shape)
    touched = mask.any(-1, keepdim=True)
    if scale is not None:
        moved = torch.where(mask, attention * scale, attention)
    else:
        assert set_value is not None
        count = mask.sum(-1, keepdim=True).double()
        delta = count * set_value - torch.where(mask, attention, 0.0).sum(-1, keepdim=True)
        share = delta / (attention.shape[-1] - count)
        moved = torch.where(mask, set_value, (attention - share).clamp_min(0.0))
    return {"value": torch.where(touched, moved / moved.sum(-1, keepdim=True), attention)}


def _causal(seq_len: int) -> Named:
    above = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    return {"value": torch.zeros(1, 1, seq_len, seq_len, dtype=torch.float64).masked_fill(above, -math.inf)}


def _position_delta(direction: torch.Tensor, position: int, seq_len: int) -> Named:
    rows = [direction if at == position else torch.zeros_like(direction) for at in range(seq_len)]
    return {"value": torch.stack(rows)[None]}


def _gram(matrix: torch.Tensor, k: int, iterations: int) -> Named:
    """Scatter [d, d] of the centred rows; :func:`_eigen` takes it apart outside the mode: no rule for eigh."""
    centred = matrix - matrix.mean(0, keepdim=True)
    return {"gram": centred.t().contiguous() @ centred}


def _eigen(values: Named, k: int) -> Named:
    lambdas, vectors = torch.linalg.eigh(values["gram"])
    components = vectors.flip(-1).t()[:k]
    lambdas = lambdas.flip(-1)
    # Either sign of a component is right: the largest entry is taken positive.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return {
        "components": components * largest.sign(),
        "eigenvalues": lambdas[:k],
        "explained": lambdas[:k] / lambdas.sum(),
    }


class _SaeMaths:
    """SAELens' encoders over a row's weights: ReLU, JumpReLU (strictly above θ), TopK (the k largest, then ReLU)."""

    def __init__(self, table: CallTable, name: str) -> None:
        self.row = table.saes[name]
        self.w = {key: torch.from_numpy(array).double() for key, array in self.row.weights().items()}

    def pre(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]) @ self.w["W_enc"] + self.w["b_enc"]
        return flat.reshape(*x.shape[:-1], -1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre = self.pre(x)
        if self.row.architecture == "jumprelu":
            return torch.where(pre > self.w["threshold"], pre, 0.0)
        if self.row.architecture == "standard":
            return pre.relu()
        kept = torch.topk(pre, min(self.row.k, pre.shape[-1]), dim=-1).indices
        mask = (kept.unsqueeze(-1) == torch.arange(pre.shape[-1])).sum(-2) > 0
        return torch.where(mask, pre, 0.0).relu()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        flat = features.reshape(-1, features.shape[-1]) @ self.w["W_dec"] + self.w["b_dec"]
        return flat.reshape(*features.shape[:-1], -1)

    def call(self, fn: str, args: dict[str, Any]) -> Named:
        if fn == "decoder_vector":
            return {"value": self.w["W_dec"][args["feature"]]}
        x = args["x"]
        if fn == "encode_sparse":
            return {"features": self.encode(x)}
        if fn in ("encode", "encode_with_strategy"):
            return {"value": self.encode(x)}
        if fn == "decode":
            return {"value": self.decode(x)}
        recon = self.decode(self.encode(x))
        error = x - recon
        return {"value": recon if fn == "reconstruct" else (error * error).mean()}


MEASURES: dict[str, Callable[..., Named]] = {
    "kl_divergence": _kl_divergence,
    "logit_diff": _logit_diff,
    "top_changed_tokens": _top_changed,
    "measure_attention_to_targets": _attention,
    "extract_token_prob": _token_prob,
    "sample_token": _sample,
    "pca_top_k": _gram,
    "create_knockout_mask": _knockout,
    "apply_steering": _steering,
    "create_causal_mask": _causal,
    "position_delta": _position_delta,
}
SAE_FUNCTIONS = frozenset(
    {"encode", "encode_with_strategy", "encode_sparse", "decode", "reconstruct", "reconstruction_error"}
    | {"decoder_vector"}
)


def truth_of(row: CallRow, table: CallTable) -> CallTruth:
    """The expected results of a call, and the root mean square of 16 samples of float32's rounding around them.

    :raises CaseTableError: a function without a reference.
    """
    arrays = table.arrays()
    args: dict[str, Any] = {
        key: torch.from_numpy(arrays[value]).double() if isinstance(value, str) and value in arrays else value
        for key, value in row.args.items()
    }

    def once() -> Named:
        if row.sae is not None and row.fn in SAE_FUNCTIONS:
            return _SaeMaths(table, row.sae).call(row.fn, args)
        if row.fn not in MEASURES:
            raise CaseTableError(f"{row.id}: no reference for {row.fn}")
        return MEASURES[row.fn](**args)

    def finish(values: Named) -> Named:
        return _eigen(values, args["k"]) if row.fn == "pca_top_k" else values

    scales = MatmulScales()
    with Truth64(scales), torch.no_grad():
        inner = once()
    values = finish(inner)
    squares = {name: torch.zeros_like(value) for name, value in values.items()}
    if not row.exact:
        pool = NoisePool(zlib.crc32(row.id.encode()))
        for _ in range(SAMPLES):
            with RoundingNoise(pool, scales), torch.no_grad():
                inner = once()
            for name, value in finish(inner).items():
                squares[name] += (value - values[name]) ** 2 / SAMPLES
    return CallTruth(
        {name: value.numpy() for name, value in values.items()},
        {name: value.sqrt().numpy() for name, value in squares.items()},
    )
