"""The known wrong formulas of candle-mi's functions; several may apply to one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from candle_mi_parity.coverage.calls_measures import Named, changes, check_heads, gram, knockout, log_softmax, softmax
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.models.sae import Sae, load_sae
from candle_mi_parity.oracle.interventions import scale_steering, set_steering
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual, Variant
from candle_mi_parity.spec.edits import Attention

Formulas = Collection[Formula]


def _wrong_kl(formulas: Formulas, baseline: torch.Tensor, other: torch.Tensor) -> Named:
    p, q = softmax(baseline), softmax(other)
    log_p, log_q = log_softmax(baseline), log_softmax(other)
    if Formula.CUT_TO_THE_SHORTER in formulas:
        size = min(p.numel(), q.numel())
        p, q, log_p, log_q = (each.reshape(-1)[:size] for each in (p, q, log_p, log_q))
    left_out = torch.zeros_like(p, dtype=torch.bool)
    if Formula.TERMS_LEFT_OUT in formulas:
        left_out |= (p <= 1e-10) | (q <= 1e-10)
    if Formula.NAN_TERMS_LEFT_OUT in formulas:
        left_out |= p.isnan() | q.isnan()
    return {"value": torch.where(left_out, 0.0, p * (log_p - log_q)).sum()}


def _flat_diff(_: Formulas, baseline: torch.Tensor, ablated: torch.Tensor, token: int) -> Named:
    return {"value": baseline.reshape(-1)[token] - ablated.reshape(-1)[token]}


def _flat_changes(_: Formulas, baseline: torch.Tensor, ablated: torch.Tensor, k: int) -> Named:
    return changes(softmax(baseline).reshape(-1), softmax(ablated).reshape(-1))


def _last_of_equal(_: Formulas, logits: torch.Tensor) -> Named:
    best = 0
    for token, logit in enumerate(logits.tolist()):
        if not logits[best].item() > logit:  # also if either is NaN
            best = token
    return {"token": torch.tensor(float(best))}


def _some_targets(_: Formulas, attention: torch.Tensor, **args: Any) -> Named:
    targets = [target for target in args["targets"] if target < attention.shape[-1]]
    chosen = attention[:, :, args["from"], targets]
    return {"value": chosen.mean() if targets else chosen.sum()}


def _some_edges(_: Formulas, edges: list[list[int]], seq_len: int, **rest: Any) -> Named:
    return knockout([edge for edge in edges if max(edge) < seq_len], seq_len=seq_len, **rest)


def _wrong_steering(
    formulas: Formulas,
    attention: torch.Tensor,
    edges: list[list[int]],
    heads: list[int] | None = None,
    scale: float | None = None,
    set_value: float | None = None,
) -> Named:
    n_heads, size = attention.shape[1:3]
    if Formula.OUT_OF_RANGE_IGNORED in formulas:
        edges = [edge for edge in edges if max(edge) < size]
    else:
        check_heads(heads, n_heads)
    times = Attention(heads=heads, edges=edges).times(n_heads, size)
    if Formula.EDGES_REPEATED not in formulas:
        times = np.minimum(times, 1)
    least = 1e-10 if Formula.SMALL_SUMS_KEPT in formulas else -math.inf
    if scale is not None:
        value = scale_steering(times, scale, least)(attention)
        scaled = attention * torch.from_numpy(scale ** times.astype(np.float64))
        kept = scaled.sum(-1, keepdim=True).isnan() & (Formula.SMALL_SUMS_KEPT in formulas)
        return {"value": torch.where(kept, scaled, value)}
    assert set_value is not None
    if Formula.NAN_CLAMPED in formulas:
        attention = _clamped(attention, torch.from_numpy(times > 0))
    return {"value": set_steering(times, set_value, Formula.OVER_ALL_COLUMNS in formulas, least)(attention)}


def _clamped(attention: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Weights of which steering makes what it makes of NaN if clamping at 0 makes 0 of it: -inf, or 0 if replaced."""
    lost = attention.isnan() & chosen.any(-1, keepdim=True)
    others = ~chosen & (lost | (lost & chosen).any(-1, keepdim=True))
    return attention.masked_fill(lost & chosen, 0.0).masked_fill(others, -torch.inf)


class LooseTopK(TorchSae):
    """TopK as ``topk_cpu`` of candle-mi 0.2.2 computes it (``src/sae/mod.rs``).

    Values below the k-th largest become 0. If more than k are then at or above it (zeros are, if it is negative),
    those nearer to it than ``epsilon`` are dropped from the end. If k is d_sae, all are kept.

    :param relu: whether ReLU follows.
    """

    def __init__(self, sae: Sae, epsilon: float, relu: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(sae, dtype=dtype)
        self._epsilon, self._positive_only = epsilon, relu

    def active(self, pre: torch.Tensor) -> torch.Tensor:
        assert self.k is not None
        fires = torch.ones_like(pre, dtype=torch.bool)
        if self.k < pre.shape[-1]:
            kth = torch.sort(pre, dim=-1, descending=True).values[..., self.k - 1 : self.k]
            fires = pre >= kth
            kept = torch.where(fires, pre, 0.0)
            excess = (kept >= kth).sum(-1, keepdim=True) - self.k
            tied = (kept == kth) | ((kept - kth).abs() < self._epsilon)
            fires = fires & ~(tied & (tied.flip(-1).cumsum(-1).flip(-1) <= excess))
        return fires & (pre > 0) if self._positive_only else fires


WRONG: dict[str, tuple[frozenset[Formula], Callable[..., Named]]] = {
    "kl_divergence": (
        frozenset({Formula.TERMS_LEFT_OUT, Formula.NAN_TERMS_LEFT_OUT, Formula.CUT_TO_THE_SHORTER}), _wrong_kl),
    "logit_diff": (frozenset({Formula.FIRST_POSITION}), _flat_diff),
    "top_changed_tokens": (frozenset({Formula.POSITIONS_FLATTENED}), _flat_changes),
    "sample_token": (frozenset({Formula.LAST_OF_EQUAL}), _last_of_equal),
    "measure_attention_to_targets": (frozenset({Formula.OUT_OF_RANGE_IGNORED}), _some_targets),
    "create_knockout_mask": (frozenset({Formula.OUT_OF_RANGE_IGNORED}), _some_edges),
    "apply_steering": (
        frozenset({
            Formula.OUT_OF_RANGE_IGNORED, Formula.OVER_ALL_COLUMNS, Formula.EDGES_REPEATED, Formula.SMALL_SUMS_KEPT,
            Formula.NAN_CLAMPED}),
        _wrong_steering),
    "pca_top_k": (frozenset({Formula.NORM_OUT_OF_RANGE}), lambda _, **args: gram(**args)),
}  # fmt: skip
"""Function → its wrong formulas, which may apply together, and what computes them."""
SAE_FORMULAS = frozenset(
    {Formula.TOPK_WITHOUT_RELU, Formula.TIES_WITHIN_EPSILON, Formula.NEGATIVE_THRESHOLD_KEPT}
    | {Formula.NAN_IS_ZERO, Formula.TIMES_MASK}
)
"""Those of an SAE's activation; several may apply to one call."""
_KEPT = Counterfactual(variants=[Variant.NEGATIVE_THRESHOLD_KEPT])


class MaskedJumpReLU(TorchSae):
    """JumpReLU as a product with the mask, which is NaN for an infinite value that does not fire."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre = self.pre_activations(x)
        return pre * self.active(pre).to(pre.dtype)


def torch_sae(path: Path, formulas: Collection[Formula] = (), dtype: torch.dtype = torch.float64) -> TorchSae:
    """An SAE, whose activation may be a known wrong one."""
    sae = load_sae(path, _KEPT if Formula.NEGATIVE_THRESHOLD_KEPT in formulas else PLAIN)
    if sae.threshold is not None and Formula.TIMES_MASK in formulas:
        return MaskedJumpReLU(sae, dtype=dtype)
    if sae.k is None or not {Formula.TOPK_WITHOUT_RELU, Formula.TIES_WITHIN_EPSILON} & set(formulas):
        return TorchSae(sae, dtype=dtype)
    epsilon = 2.0**-23 if Formula.TIES_WITHIN_EPSILON in formulas else 0.0
    return LooseTopK(sae, epsilon, Formula.TOPK_WITHOUT_RELU not in formulas, dtype)


def norm_out_of_range(found: Named) -> Named:
    """Power iteration divides by the norm of a vector whose squares are infinite or 0, and what follows is NaN.

    What earlier components leave of a matrix of lower rank may be exactly 0.
    """
    squares, largest = found["eigenvalues"].float().square(), found["eigenvalues"][:1]
    lost = (squares == 0) | ~squares.isfinite() | (found["eigenvalues"] <= 1e-6 * largest)
    lost = lost.cumsum(0) > 0
    ratio = torch.nan if (largest.float() > 0).all() else 0.0
    return {
        "components": torch.where(lost[:, None], torch.nan, found["components"]),
        "eigenvalues": torch.where(lost, torch.nan, found["eigenvalues"]),
        "explained": torch.where(lost, ratio, found["explained"]),
    }
