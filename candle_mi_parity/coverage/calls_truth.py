"""The truth of each function of ``fixtures/calls.toml``, and the known wrong formulas, in float64 with noise."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from candle_mi_parity.coverage.calls import CallRow, CallTable, Formula
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.models.sae import Sae, load_sae
from candle_mi_parity.oracle.arithmetic import UNIT
from candle_mi_parity.oracle.compute import SAMPLES
from candle_mi_parity.oracle.interventions import scale_steering, set_steering
from candle_mi_parity.oracle.rounding import MatmulScales, NoisePool, RoundingNoise, Truth64
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual, Variant
from candle_mi_parity.spec.edits import Attention
from candle_mi_parity.trace.truth import TruthTensor

Named = dict[str, torch.Tensor]


def _last(logits: torch.Tensor) -> torch.Tensor:
    """[vocab], [seq, vocab] or [1, seq, vocab] → [vocab] of the last position."""
    return logits.reshape(-1, logits.shape[-1])[-1]


def _kl_divergence(baseline: torch.Tensor, other: torch.Tensor) -> Named:
    """Σ p·ln(p/q), in nats, over the vocabulary and summed over positions (``F.kl_div``'s ``sum``).

    A term with p = 0 is 0, as in ``torch.distributions.kl_divergence`` of two ``Categorical``.
    """
    p = torch.softmax(baseline, -1)
    terms = p * (_log_softmax(baseline) - _log_softmax(other))
    return {"value": torch.where(p == 0, 0.0, terms).sum()}


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """``torch.log_softmax``, for which there is no noise rule, in operations that have one."""
    shifted = logits - logits.max(-1, keepdim=True).values
    return shifted - torch.exp(shifted).sum(-1, keepdim=True).log()


def _logit_diff(baseline: torch.Tensor, ablated: torch.Tensor, token: int) -> Named:
    return {"value": _last(baseline)[token] - _last(ablated)[token]}


def _top_changed(baseline: torch.Tensor, ablated: torch.Tensor, k: int) -> Named:
    """For every token; the comparison takes the k largest changes."""
    return _changes(torch.softmax(_last(baseline), -1), torch.softmax(_last(ablated), -1))


def _changes(p: torch.Tensor, q: torch.Tensor) -> Named:
    return {"baseline": p, "ablated": q, "change": (p - q).abs()}


def _attention(attention: torch.Tensor, **args: Any) -> Named:
    """Mean over batch, heads and targets of the weight from one position."""
    return {"value": attention[:, :, args["from"], args["targets"]].mean()}


def _token_prob(logits: torch.Tensor, token: int) -> Named:
    return {"value": torch.softmax(_last(logits), -1)[token]}


def _sample(logits: torch.Tensor) -> Named:
    return {"token": torch.argmax(logits).double()}


def _knockout(edges: list[list[int]], n_heads: int, seq_len: int, heads: list[int] | None = None) -> Named:
    cut = torch.from_numpy(Attention(heads=heads, edges=edges).chosen(n_heads, seq_len))[None]
    return {"value": torch.zeros(cut.shape, dtype=torch.float64).masked_fill(cut, -math.inf)}


def _steering(
    attention: torch.Tensor,
    edges: list[list[int]],
    heads: list[int] | None = None,
    scale: float | None = None,
    set_value: float | None = None,
) -> Named:
    """As the ``steer`` edit of a case changes the pattern."""
    chosen = Attention(heads=heads, edges=edges).chosen(attention.shape[1], attention.shape[2])
    if scale is not None:
        return {"value": scale_steering(chosen, scale)(attention)}
    assert set_value is not None
    return {"value": set_steering(chosen, set_value)(attention)}


def _causal(seq_len: int) -> Named:
    above = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    return {"value": torch.zeros(1, 1, seq_len, seq_len, dtype=torch.float64).masked_fill(above, -math.inf)}


def _position_delta(direction: torch.Tensor, position: int, seq_len: int) -> Named:
    """:raises IndexError: there is no such position."""
    if position >= seq_len:
        raise IndexError(f"position {position} is out of range for {seq_len} positions")
    rows = [direction if at == position else torch.zeros_like(direction) for at in range(seq_len)]
    return {"value": torch.stack(rows)[None]}


def _gram(matrix: torch.Tensor, k: int, iterations: int) -> Named:
    """Scatter matrix [d, d] of the centred rows; :func:`_eigen` runs outside the mode, which has no rule for eigh.

    :raises ValueError: more components than ``torch.pca_lowrank`` gives.
    """
    if k > min(matrix.shape):
        raise ValueError(f"k={k} must not be greater than min(n_samples, n_features)={min(matrix.shape)}")
    centred = matrix - matrix.mean(0, keepdim=True)
    return {"gram": centred.t().contiguous() @ centred}


def _eigen(values: Named, k: int) -> Named:
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


def _sae_call(sae: TorchSae, fn: str, args: dict[str, Any]) -> Named:
    if fn == "decoder_vector":
        return {"value": sae.W_dec[args["feature"]]}
    x: torch.Tensor = args["x"]
    rows = x.reshape(-1, x.shape[-1])  # a matrix, for which the products have a noise rule
    if fn == "decode":
        return {"value": _shaped_as(x, sae.decode(rows))}
    features = sae.encode(rows)
    if not args["finite"]:  # NaN stays NaN, as in torch.relu
        pre = sae.pre_activations(rows)
        features = torch.where(pre.isnan(), pre, features)
    if fn == "encode_sparse":
        return {"features": _shaped_as(x, features)}
    if fn in ("encode", "encode_with_strategy"):
        return {"value": _shaped_as(x, features)}
    recon = sae.decode(features)
    error = rows - recon
    return {"value": _shaped_as(x, recon) if fn == "reconstruct" else (error * error).mean()}


def _shaped_as(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[n, width] → [..., width] with the leading axes of ``x``."""
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


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


def _first(logits: torch.Tensor) -> torch.Tensor:
    return logits.reshape(-1, logits.shape[-1])[0]


def _terms_left_out(baseline: torch.Tensor, other: torch.Tensor) -> Named:
    p, q = torch.softmax(baseline, -1), torch.softmax(other, -1)
    return {"value": torch.where((p <= 1e-10) | (q <= 1e-10), 0.0, p * torch.log(p / q)).sum()}


class LooseTopK(TorchSae):
    """TopK as ``topk_cpu`` of candle-mi 0.2.2 computes it (``src/sae/mod.rs``).

    Values below the k-th largest become 0. If more than k are then at or above it (zeros are, if it is negative),
    those within ``epsilon`` of it are dropped from the end. If k is d_sae, all are kept.

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
            tied = (kept - kth).abs() <= self._epsilon
            fires = fires & ~(tied & (tied.flip(-1).cumsum(-1).flip(-1) <= excess))
        return fires & (pre > 0) if self._positive_only else fires


WRONG: dict[Formula, tuple[str, Callable[..., Named]]] = {
    Formula.FIRST_POSITION: ("logit_diff", lambda baseline, ablated, token: _logit_diff(
        _first(baseline), _first(ablated), token)),
    Formula.POSITIONS_FLATTENED: ("top_changed_tokens", lambda baseline, ablated, k: _changes(
        torch.softmax(baseline, -1).reshape(-1), torch.softmax(ablated, -1).reshape(-1))),
    Formula.TERMS_LEFT_OUT: ("kl_divergence", _terms_left_out),
    Formula.LAST_OF_EQUAL: ("sample_token", lambda logits: {
        "token": torch.nonzero(logits == logits.max())[-1, 0].double()}),
}  # fmt: skip
SAE_FORMULAS = frozenset({Formula.TOPK_WITHOUT_RELU, Formula.TIES_WITHIN_EPSILON, Formula.NEGATIVE_THRESHOLD_KEPT})
"""Those of an SAE's activation; several may apply to one call."""
_KEPT = Counterfactual(variants=[Variant.NEGATIVE_THRESHOLD_KEPT])


def torch_sae(path: Path, formulas: Collection[Formula] = (), dtype: torch.dtype = torch.float64) -> TorchSae:
    """An SAE, whose activation may be a known wrong one."""
    sae = load_sae(path, _KEPT if Formula.NEGATIVE_THRESHOLD_KEPT in formulas else PLAIN)
    if sae.k is None or not {Formula.TOPK_WITHOUT_RELU, Formula.TIES_WITHIN_EPSILON} & set(formulas):
        return TorchSae(sae, dtype=dtype)
    epsilon = 2.0**-23 if Formula.TIES_WITHIN_EPSILON in formulas else 0.0
    return LooseTopK(sae, epsilon, Formula.TOPK_WITHOUT_RELU not in formulas, dtype)


def computation(
    row: CallRow,
    arrays: dict[str, np.ndarray],
    directory: Path,
    formulas: Collection[Formula] = (),
    dtype: torch.dtype = torch.float64,
) -> Callable[[], Named]:
    """The function of a call with its arguments; :func:`finish` makes results of what it returns.

    :param directory: where the SAEs were written.
    :param formulas: known wrong formulas; none for the truth.
    :raises CaseTableError: the function has no reference, or not these formulas.
    """
    args: dict[str, Any] = {
        key: torch.from_numpy(arrays[value]).to(dtype) if isinstance(value, str) and value in arrays else value
        for key, value in row.args.items()
    }
    if row.sae is not None and row.fn in SAE_FUNCTIONS and SAE_FORMULAS.issuperset(formulas):
        sae = torch_sae(directory / row.sae, formulas, dtype)
        args["finite"] = all(np.isfinite(array).all() for array in arrays.values())
        return lambda: _sae_call(sae, row.fn, args)
    found = [WRONG.get(formula, ("", None)) for formula in formulas] or [(row.fn, MEASURES.get(row.fn))]
    if len(found) > 1 or found[0][0] != row.fn or found[0][1] is None:
        wanted = f"formula {', '.join(formulas)}" if formulas else "reference"
        raise CaseTableError(f"{row.id}: {row.fn} has no {wanted}")
    compute = found[0][1]
    return lambda: compute(**args)


def finish(row: CallRow, values: Named, pool: NoisePool | None = None) -> Named:
    """The results; what is computed here has no noise rule and runs outside the modes.

    :param pool: of a sample. A float32 eigensolver's error is that of a matrix which is off by a few roundings of its
        norm, not of each element (Golub and Van Loan, Matrix Computations, 4th ed., §8.2.1).
    """
    if row.fn != "pca_top_k":
        return values
    if pool is not None:
        noise = pool.draw(values["gram"])
        size = UNIT * values["gram"].norm()
        values = {"gram": values["gram"] + (noise + noise.t()) * (size / 2)}
    return _eigen(values, cast(int, row.args["k"]))


def truth_of(row: CallRow, table: CallTable, cache: Path, formula: Formula | None = None) -> dict[str, TruthTensor]:
    """The expected results of a call, with the rms of 16 samples of float32 rounding as noise.

    :param cache: where the SAEs are written.
    :param formula: a known wrong formula; None for the truth.
    :raises CaseTableError: the function has no reference, or not this formula.
    """
    directory = table.lay_out(cache)
    once = computation(row, table.arrays(), directory, () if formula is None else (formula,))
    scales = MatmulScales()
    with Truth64(scales):
        inner = once()
    values = finish(row, inner)
    squares = {name: torch.zeros_like(value) for name, value in values.items()}
    if not row.exact:
        pool = NoisePool(zlib.crc32(row.id.encode()))
        for _ in range(SAMPLES):
            with RoundingNoise(pool, scales):
                inner = once()
            for name, value in finish(row, inner, pool).items():
                squares[name] += (value - values[name]) ** 2 / SAMPLES
    return {name: TruthTensor(value.numpy(), squares[name].sqrt().numpy()) for name, value in values.items()}
