"""The reference of a transcoder's functions, in torch, with their known wrong formulas.

``pre = W_enc·x + b_enc``; ReLU, or JumpReLU ``pre·(pre > θ)``; feature f of layer l adds ``W_dec[f, t − l]`` to what
the MLP of layer t gives. So circuit-tracer defines it (``transcoder/cross_layer_transcoder.py`` and
``single_layer_transcoder.py`` of circuit-tracer 0.5.0), which the tests compare this with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from candle_mi_parity.coverage.calls import TranscoderRow
from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.formulas import Formula

Formulas = Collection[Formula]
COSINE_EPSILON = 1e-8
"""The least norm that ``torch.nn.functional.cosine_similarity`` divides by."""


class TorchTranscoder:
    """The weights of each layer as float64 tensors.

    :ivar formulas: known wrong formulas; none for the truth.
    """

    def __init__(self, row: TranscoderRow, formulas: Formulas = (), dtype: torch.dtype = torch.float64) -> None:
        self.row, self.formulas = row, formulas
        self.layers = [
            {name: torch.from_numpy(array).to(dtype) for name, array in weights.items()} for weights in row.weights()
        ]

    def pre(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """``x`` [d] → [F]."""
        weights = self._layer(layer)
        return (weights["W_enc"] @ x[:, None])[:, 0] + weights["b_enc"]

    def encode(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """``x`` [d] → features [F]."""
        pre, threshold = self.pre(x, layer), self._layer(layer).get("threshold")
        if threshold is None or Formula.THRESHOLD_UNREAD in self.formulas:
            return pre.relu()
        features = torch.where(pre > threshold, pre, 0.0)
        return features.relu() if Formula.NEGATIVE_LEFT_OUT in self.formulas else features

    def decoder(self, layer: int, target: int) -> torch.Tensor:
        """What each feature of a layer adds to a target layer, [F, d].

        :raises IndexError: there is no such layer, or the features do not write to it.
        """
        rows = self._layer(layer)["W_dec"]
        if not 0 <= target - layer < rows.shape[1]:
            raise IndexError(f"features of layer {layer} do not write to layer {target}")
        return rows[:, target - layer]

    def _layer(self, layer: int) -> dict[str, torch.Tensor]:
        return self.layers[range(len(self.layers))[layer]]


def _config(clt: TorchTranscoder) -> Named:
    """Layers, width, features of a layer and of all."""
    row = clt.row
    sizes = [row.layers, row.width, row.features, row.layers * row.features]
    return {"value": torch.tensor(sizes, dtype=torch.float64)}


def _encode(clt: TorchTranscoder, x: torch.Tensor, layer: int, after: int | None = None) -> Named:
    return _listed(clt.encode(x, layer))


def _top_k(clt: TorchTranscoder, x: torch.Tensor, layer: int, k: int) -> Named:
    features = clt.encode(x, layer)
    kept = torch.sort(features, descending=True, stable=True).indices[:k]
    return _listed(torch.where(torch.isin(torch.arange(len(features)), kept), features, 0.0))


def _listed(features: torch.Tensor) -> Named:
    """All features, and those that fire, largest first."""
    return {"value": features, "listed": torch.sort(features[features != 0], descending=True).values}


def _vectors(clt: TorchTranscoder, layer: int, target: int, cached: bool = False) -> Named:
    return {"value": clt.decoder(layer, target)}


def _extract(clt: TorchTranscoder, features: list[list[int]], target: int) -> Named:
    return {"value": torch.stack([clt.decoder(layer, target)[index] for layer, index in features])}


def _skip(clt: TorchTranscoder, layer: int) -> Named:
    """:raises IndexError: there is no skip connection."""
    if "W_skip" not in clt._layer(layer):
        raise IndexError("there is no skip connection")
    return {"value": clt._layer(layer)["W_skip"]}


def _inject(
    clt: TorchTranscoder, residual: torch.Tensor, features: list[list[int]], position: int, strength: float
) -> Named:
    """``residual`` [B, T, d] with the decoder rows of features [layer, index, target] added at one position."""
    rows = [clt.decoder(layer, target)[index] for layer, index, target in features]
    added = rows[0] if rows else torch.zeros_like(residual[0, 0])
    for row in rows[1:]:
        added = added + row
    parts = list(residual.unbind(1))
    parts[position] = parts[position] + added * float(np.float32(strength))
    return {"value": torch.stack(parts, 1)}


def _scores(
    clt: TorchTranscoder,
    direction: torch.Tensor,
    scoring: dict[str, Any],
    least: float | None = None,
    batch: bool = False,
) -> Named:
    """Projections of all features [L, F], −∞ where a feature is not among the k highest or writes elsewhere.

    Cosines are ``torch.nn.functional.cosine_similarity``'s.
    """
    target, k = range(len(clt.layers))[scoring["target"]], scoring["k"]
    parts = []
    for layer in range(len(clt.layers)):
        if layer > target or (layer != target and not clt.row.crosses):
            parts.append(torch.full((clt.row.features,), -torch.inf, dtype=direction.dtype))
            continue
        rows = clt.decoder(layer, target)
        score = (rows @ direction[:, None])[:, 0]
        if scoring["cosine"]:
            length, lengths = _norm(direction), _norm(rows)
            divisor = length.clamp_min(COSINE_EPSILON)
            if Formula.SHORT_DIRECTION in clt.formulas:
                divisor = length.clamp_min(1e-10) if batch else torch.where(length > 1e-10, length, 1.0)
            score = score / (lengths.clamp_min(COSINE_EPSILON) * divisor)
            if Formula.ZERO_ROWS_LEFT_OUT in clt.formulas:
                score = torch.where(lengths == 0, -torch.inf, score)
        parts.append(score)
    scores = torch.stack(parts)
    highest = torch.sort(scores[scores.isfinite()], descending=True).values[:k]
    lowest = highest[-1] if len(highest) else torch.inf
    scores = torch.where(scores >= lowest, scores, -torch.inf)
    if least is not None:
        scores = torch.where(scores.abs() >= float(np.float32(least)), scores, -torch.inf)
    return {"value": scores, "listed": torch.sort(scores[scores.isfinite()], descending=True).values}


def _norm(rows: torch.Tensor) -> torch.Tensor:
    return rows.pow(2).sum(-1).sqrt()


def _batch(clt: TorchTranscoder, directions: list[torch.Tensor], scoring: dict[str, Any]) -> Named:
    """Each direction alone, one after the other."""
    if not directions:
        raise ValueError("torch.stack of no tensors")
    found = [_scores(clt, direction, scoring, batch=True) for direction in directions]
    return {
        "value": torch.stack([each["value"] for each in found]),
        "listed": torch.cat([each["listed"] for each in found]),
    }


_ACTIVATION = frozenset({Formula.THRESHOLD_UNREAD, Formula.NEGATIVE_LEFT_OUT})
_COSINE = frozenset({Formula.ZERO_ROWS_LEFT_OUT, Formula.SHORT_DIRECTION})
TRANSCODERS: dict[str, tuple[frozenset[Formula], Callable[..., Named]]] = {
    "clt_config": (frozenset(), _config),
    "clt_encode_pre_activation": (frozenset(), lambda clt, x, layer: {"value": clt.pre(x, layer)}),
    "clt_encode": (_ACTIVATION, _encode),
    "clt_top_k": (_ACTIVATION, _top_k),
    "clt_decoder_vector": (frozenset(), _vectors),
    "clt_decoder_matrix": (frozenset(), _vectors),
    "clt_extract_decoder_vectors": (frozenset(), _extract),
    "clt_load_skip_matrix": (frozenset(), _skip),
    "clt_inject": (frozenset(), _inject),
    "clt_score_features": (_COSINE, _scores),
    "clt_score_features_batch": (_COSINE, _batch),
    "clt_attribution_graph": (_COSINE, _scores),
}
"""Function → its wrong formulas, and what computes it of a transcoder with some of them."""
