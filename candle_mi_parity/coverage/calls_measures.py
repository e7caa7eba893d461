"""The reference of each function of ``fixtures/calls.toml`` that is not an SAE's, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.oracle.interventions import scale_steering, set_steering
from candle_mi_parity.spec.edits import Attention
from candle_mi_parity.trace.formats import round_to_dtype

Named = dict[str, torch.Tensor]


def _last(logits: torch.Tensor) -> torch.Tensor:
    """[vocab], [seq, vocab] or [1, seq, vocab] → [vocab] of the last position."""
    return logits.reshape(-1, logits.shape[-1])[-1]


def _kl_divergence(baseline: torch.Tensor, other: torch.Tensor) -> Named:
    """Σ p·ln(p/q), in nats, over the vocabulary and summed over positions (``F.kl_div``'s ``sum``).

    A term with p = 0 is 0, as in ``torch.distributions.kl_divergence`` of two ``Categorical``; no terms sum to 0.
    """
    if baseline.shape[-1] == other.shape[-1] == 0:
        return {"value": baseline.sum()}
    p = softmax(baseline)
    terms = p * (log_softmax(baseline) - log_softmax(other))
    return {"value": torch.where(p == 0, 0.0, terms).sum()}


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """``torch.softmax`` over the last axis, in steps.

    The noise rule of the whole leaves out how the difference to the maximum is rounded, which for a small probability
    is most of its error.
    """
    weights = torch.exp(logits - logits.max(-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """``torch.log_softmax``, for which there is no noise rule, in operations that have one."""
    shifted = logits - logits.max(-1, keepdim=True).values
    return shifted - torch.exp(shifted).sum(-1, keepdim=True).log()


def _logit_diff(baseline: torch.Tensor, ablated: torch.Tensor, token: int) -> Named:
    return {"value": _last(baseline)[token] - _last(ablated)[token]}


def _top_changed(baseline: torch.Tensor, ablated: torch.Tensor, k: int) -> Named:
    """For every token; the comparison takes the k largest changes."""
    return changes(softmax(_last(baseline)), softmax(_last(ablated)))


def changes(p: torch.Tensor, q: torch.Tensor) -> Named:
    return {"baseline": p, "ablated": q, "change": (p - q).abs()}


def _attention(attention: torch.Tensor, **args: Any) -> Named:
    """Mean over batch, heads and targets of the weight from one position."""
    return {"value": attention[:, :, args["from"], args["targets"]].mean()}


def _token_prob(logits: torch.Tensor, token: int) -> Named:
    return {"value": softmax(_last(logits))[token]}


def _sample(logits: torch.Tensor, temperature: float = 0.0) -> Named:
    """The largest logit's token, which a draw with a temperature gives too if its probability rounds to 1.

    :raises CaseTableError: another token may be drawn, so that there is nothing to compare.
    """
    if temperature > 0 and np.float32(softmax(logits / temperature).max().item()) < 1:
        raise CaseTableError(f"at temperature {temperature} more than one token may be drawn")
    return {"token": torch.argmax(logits).double()}


def _knockout(edges: list[list[int]], n_heads: int, seq_len: int, heads: list[int] | None = None) -> Named:
    check_heads(heads, n_heads)
    return knockout(edges, n_heads, seq_len, heads)


def knockout(edges: list[list[int]], n_heads: int, seq_len: int, heads: list[int] | None = None) -> Named:
    cut = torch.from_numpy(Attention(heads=heads, edges=edges).chosen(n_heads, seq_len))[None]
    return {"value": torch.zeros(cut.shape, dtype=torch.float64).masked_fill(cut, -math.inf)}


def check_heads(heads: list[int] | None, n_heads: int) -> None:
    """As an index of a tensor over heads.

    :raises IndexError: there is no such head.
    """
    if heads is not None and max(heads) >= n_heads:
        raise IndexError(f"index {max(heads)} is out of bounds for {n_heads} heads")


def _steering(
    attention: torch.Tensor,
    edges: list[list[int]],
    heads: list[int] | None = None,
    scale: float | None = None,
    set_value: float | None = None,
) -> Named:
    """As the ``steer`` edit of a case changes the pattern."""
    check_heads(heads, attention.shape[1])
    chosen = Attention(heads=heads, edges=edges).chosen(attention.shape[1], attention.shape[2])
    if scale is not None:
        return {"value": scale_steering(chosen, scale)(attention)}
    assert set_value is not None
    return {"value": set_steering(chosen, set_value)(attention)}


def _causal(seq_len: int) -> Named:
    above = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    return {"value": torch.zeros(1, 1, seq_len, seq_len, dtype=torch.float64).masked_fill(above, -math.inf)}


def dtype_name(dtype: str | None) -> Named:
    """The text result of a call that was asked for a precision, as candle names it; none without one."""
    if dtype is None:
        return {}
    name = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    return {"text": torch.tensor([*name.encode(), 0], dtype=torch.float64)}


def _position_delta(direction: torch.Tensor, position: int, seq_len: int, dtype: str | None = None) -> Named:
    """:raises IndexError: there is no such position."""
    if dtype is not None:
        direction = torch.from_numpy(round_to_dtype(direction.numpy(), dtype)).to(direction.dtype)
    if position >= seq_len:
        raise IndexError(f"position {position} is out of range for {seq_len} positions")
    rows = [direction if at == position else torch.zeros_like(direction) for at in range(seq_len)]
    return {"value": torch.stack(rows)[None]} | dtype_name(dtype)


def gram(matrix: torch.Tensor, k: int, iterations: int) -> Named:
    """Scatter matrix [d, d] of the centred rows; :func:`eigen` runs outside the mode, which has no rule for eigh.

    :raises ValueError: more components than ``torch.pca_lowrank`` gives.
    """
    if k > min(matrix.shape):
        raise ValueError(f"k={k} must not be greater than min(n_samples, n_features)={min(matrix.shape)}")
    centred = matrix - matrix.mean(0, keepdim=True)
    return {"gram": centred.t().contiguous() @ centred}


def eigen(values: Named, k: int) -> Named:
    lambdas, vectors = torch.linalg.eigh(values["gram"])
    components = vectors.flip(-1).t()[:k]
    lambdas = lambdas.flip(-1)
    # Either sign of a component is right; the largest entry is made positive.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return {
        "components": components * largest.sign(),
        "eigenvalues": lambdas[:k],
        "explained": lambdas[:k] / lambdas.sum(),
    }


MEASURES: dict[str, Callable[..., Named]] = {
    "kl_divergence": _kl_divergence,
    "logit_diff": _logit_diff,
    "top_changed_tokens": _top_changed,
    "measure_attention_to_targets": _attention,
    "extract_token_prob": _token_prob,
    "sample_token": _sample,
    "pca_top_k": gram,
    "create_knockout_mask": _knockout,
    "apply_steering": _steering,
    "create_causal_mask": _causal,
    "position_delta": _position_delta,
}
