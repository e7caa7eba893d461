"""Edits in torch: their random tensors, and what each does to a hook's tensor.

They work in any format and for samples in one batch, so that truth, noise and the float32 control use the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.generate import seeded_words
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.models.transcoder import transcoder_weights
from candle_mi_parity.oracle.hooks import Captured, Edits, attended, forward, replacing
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual, Variant
from candle_mi_parity.spec.edits import (
    Add,
    CltInject,
    Edit,
    Inject,
    Knockout,
    PatchAt,
    RandomTensorEdit,
    Scale,
    StateKnockout,
    StateSteer,
    Steer,
    Zero,
    tensor_key,
)
from candle_mi_parity.spec.hook_points import WRITES
from candle_mi_parity.spec.recurrent import feedback_key
from candle_mi_parity.trace.formats import round_to_dtype

Change = Callable[[torch.Tensor], torch.Tensor]


def drawn_tensors(subject: PreparedCase, model: nn.Module) -> dict[str, np.ndarray]:
    """The random or given tensors of a case's edits and feedback, float32, the same bytes on every machine.

    Shape and rms are relative to the hook's tensor in the unedited float64 model.
    """
    wanted = [(index, edit) for index, edit in enumerate(subject.case.edits) if isinstance(edit, RandomTensorEdit)]
    recurrent = subject.case.recurrent
    if not wanted and not (recurrent and recurrent.feedback):
        return {}
    with Float64():  # type: ignore[no-untyped-call]
        there = forward(model, torch.tensor(subject.tokens)).tensors
    drawn = {}
    for index, row in enumerate(recurrent.feedback if recurrent else []):
        stream = there[recurrent.hook].numpy()  # type: ignore[union-attr]
        drawn[feedback_key(index)] = _uniform(f"feedback:{row.seed}", stream, stream.shape[-1:], row.size, subject)
    for index, edit in wanted:
        tensor = there[edit.hook].numpy()
        shape = edit.drawn_shape(tensor.shape)
        if edit.values is not None:
            if len(edit.values) != shape[-1]:
                where = f"edits[{index}] ({edit.kind} at {edit.hook})"
                raise CaseTableError(f"{where}: {len(edit.values)} values, the hook is {shape[-1]} wide")
            given = np.ascontiguousarray(np.broadcast_to(np.array(edit.values, np.float32), shape))
            exact = subject.case.dtype == "float32"
            drawn[tensor_key(index)] = given if exact else round_to_dtype(given, subject.case.dtype)
            continue
        drawn[tensor_key(index)] = _uniform(f"edit:{edit.seed}", tensor, shape, edit.size, subject)
    return drawn


def _uniform(seed: str, beside: np.ndarray, shape: tuple[int, ...], size: float, subject: PreparedCase) -> np.ndarray:
    """Uniform random numbers, whose rms is ``size`` times that of ``beside``."""
    words = seeded_words(seed, int(np.prod(shape)))
    rms = float(round_to_dtype(np.sqrt(np.square(beside).mean(keepdims=True)), "bfloat16").flat[0])
    uniform = (words / 2.0**63 - 1) * np.sqrt(3.0)
    return round_to_dtype((uniform * rms * size).reshape(shape), subject.case.dtype)


def edits_of(subject: PreparedCase, drawn: Captured, counterfactual: Counterfactual = PLAIN) -> Edits:
    """The edits for :func:`hooks.forward`, in the order of the rows.

    :param drawn: the tensors of :func:`drawn_tensors`, in the format and on the device of the model.
    :param counterfactual: changes of edits and their arithmetic.
    """
    changes: dict[str, list[Change]] = {}
    if not subject.case.edits:
        return changes
    config = read_config(subject.model_dir)
    n_heads = int(str(config.get("num_attention_heads") or 0))
    for index, row in enumerate(subject.case.edits):
        edit = counterfactual.edit_at(index, row)
        if isinstance(edit, StateKnockout | StateSteer):
            for layer in range(int(str(config["num_hidden_layers"]))):
                factors = edit.factors(layer, len(subject.tokens[0]))
                dropped = counterfactual.has(Variant.KNOCKOUT_DROPS_STEERING) and edit.kind == "state_steer"
                if dropped and any(
                    isinstance(other, StateKnockout) and other.holds(layer) for other in subject.case.edits
                ):
                    continue
                if (factors != 1).any():
                    changes.setdefault(f"blocks.{layer}.{WRITES}", []).append(_times(factors))
            continue
        if isinstance(edit, Knockout | Steer) and not edit.spec.applies_at(edit.hook):
            continue
        if edit is not None:
            change = _change(edit, drawn.get(tensor_key(index)), subject, n_heads, counterfactual)
            changes.setdefault(edit.hook, []).append(change)
    return changes


def _change(
    edit: Edit, drawn: torch.Tensor | None, subject: PreparedCase, n_heads: int, counterfactual: Counterfactual
) -> Change:
    if isinstance(edit, Knockout):
        return _knockout(edit.spec.chosen(n_heads, len(subject.tokens[0])))
    if isinstance(edit, Steer):
        times = edit.spec.times(n_heads, len(subject.tokens[0]))
        if not counterfactual.has(Variant.STEERING_OF_REPEATED_EDGES):
            times = np.minimum(times, 1)
        if edit.how == "scale":
            return scale_steering(times, edit.value)
        over_all = counterfactual.has(Variant.STEERING_OVER_ALL_COLUMNS)
        return set_steering(times, edit.value, over_all, keys=partial(attended, int(edit.hook.split(".")[1])))
    if isinstance(edit, Scale):
        return lambda tensor: _finite_only(tensor, tensor * edit.factor)
    if isinstance(edit, Zero):
        return torch.zeros_like
    if isinstance(edit, Inject):
        assert subject.sae_file is not None
        return _injection(edit, subject.sae_file)
    if isinstance(edit, CltInject):
        return _clt_injection(edit, subject)
    assert drawn is not None and isinstance(edit, RandomTensorEdit)
    if isinstance(edit, PatchAt) or edit.shape is not None:
        drawn = drawn.broadcast_to(len(subject.tokens), len(subject.tokens[0]), drawn.shape[-1])
    there = replacing(drawn)
    if isinstance(edit, PatchAt):
        return lambda tensor: torch.where(_is_position(tensor, edit.position), there(tensor), tensor)
    if isinstance(edit, Add):
        return lambda tensor: _finite_only(tensor, tensor + there(tensor))
    return there


def _finite_only(tensor: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """``changed``, but −∞ where a knockout set it, which the noise would turn into NaN."""
    return torch.where(tensor.eq(-torch.inf), tensor, changed)


def _is_position(tensor: torch.Tensor, position: int) -> torch.Tensor:
    """[T, 1], true at one position of a [B, T, d] tensor."""
    return torch.arange(tensor.shape[1], device=tensor.device).eq(position)[:, None]


def _times(factors: np.ndarray) -> Change:
    return lambda written: written * torch.from_numpy(factors).to(written)


def _knockout(chosen: np.ndarray) -> Change:
    """Set scores to −∞, to which :func:`hooks.attention` gives no weight."""
    return lambda scores: scores.masked_fill(torch.from_numpy(chosen).to(scores.device), -torch.inf)


def scale_steering(times: np.ndarray, factor: float, least: float = -torch.inf) -> Change:
    """Multiply chosen weights by ``factor`` and normalise their rows.

    :param times: how often each weight is chosen, [H, T, T]; more than once only in a counterfactual.
    :param least: for a counterfactual, a row that sums to no more than this is not normalised.
    """
    factors = factor ** times.astype(np.float64)

    def change(pattern: torch.Tensor) -> torch.Tensor:
        selected = torch.from_numpy(times > 0).to(pattern.device)
        scaled = torch.where(selected, pattern * torch.from_numpy(factors).to(pattern), pattern)
        return torch.where(selected.any(-1, keepdim=True), _normalised(scaled, least), pattern)

    return change


def set_steering(
    times: np.ndarray,
    value: float,
    all_columns: bool = False,
    least: float = -torch.inf,
    keys: Callable[[], torch.Tensor] | None = None,
) -> Change:
    """Set chosen weights to ``value``, take the difference in equal shares from the row's others, and normalise.

    The other weights are those of keys that the query attends to; they are clamped at 0.

    :param times: see :func:`scale_steering`; the difference is taken as often.
    :param all_columns: for a counterfactual, whether future keys have a share too.
    :param least: see :func:`scale_steering`.
    :param keys: the keys that are attended to, boolean, broadcast against the pattern. None for those with a weight
        other than 0, which depends on the format where a softmax saturates.
    """

    def change(pattern: torch.Tensor) -> torch.Tensor:
        selected = torch.from_numpy(times > 0).to(pattern.device)
        there = pattern != 0 if keys is None else keys().to(pattern.device)
        others = there & ~selected if not all_columns else (~selected).expand_as(pattern)
        gained = value * torch.from_numpy(times.sum(-1, keepdims=True)).to(pattern)
        weighted = torch.where(selected, pattern, 0.0) * torch.from_numpy(times).to(pattern)
        gained = gained - weighted.sum(-1, keepdim=True)
        share = gained / others.to(pattern.dtype).sum(-1, keepdim=True).clamp_min(1)
        moved = torch.where(others, (pattern - share).clamp_min(0), 0.0)
        moved = torch.where(selected, value, moved)
        return torch.where(selected.any(-1, keepdim=True), _normalised(moved, least), pattern)

    return change


def _normalised(weights: torch.Tensor, least: float) -> torch.Tensor:
    """Rows that sum to 1, but for those that sum to no more than ``least``."""
    sums = weights.sum(-1, keepdim=True)
    return weights / torch.where(sums <= least, 1.0, sums)


def _injection(edit: Inject, file: Path) -> Change:
    """Σ strength · W_dec[feature], added to the residual stream at one position."""
    weights = load_sae(file)
    if beyond := [int(index) for index, _ in edit.features if index >= weights.d_sae]:
        raise CaseTableError(f"inject at {edit.hook}: feature {beyond[0]}, but the SAE has {weights.d_sae}")
    decoder = [torch.from_numpy(weights.W_dec[int(index)]) for index, _ in edit.features]

    def change(tensor: torch.Tensor) -> torch.Tensor:
        # A copy for each sample, so that their noise is independent.
        vector = torch.zeros(tensor.shape[0], 1, tensor.shape[2], device=tensor.device)
        for row, (_, strength) in zip(decoder, edit.features, strict=True):
            vector = vector + row.to(tensor.device).expand_as(vector) * strength
        return torch.where(_is_position(tensor, edit.position), tensor + vector.to(tensor.dtype), tensor)

    return change


def _clt_injection(edit: CltInject, subject: PreparedCase) -> Change:
    """strength · Σ W_dec[feature], added to the residual stream at one position."""
    n_layers = sum(name.endswith("hook_resid_post") for name in subject.captures)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        weights = transcoder_weights(edit.transcoder, n_layers, tensor.shape[2])
        vector = torch.zeros(tensor.shape[0], 1, tensor.shape[2], device=tensor.device)
        for layer, index in edit.features:
            row = torch.from_numpy(weights[layer]["W_dec"][index, edit.target - layer])
            vector = vector + row.to(tensor.device).expand_as(vector)
        vector = vector * edit.strength
        return torch.where(_is_position(tensor, edit.position), tensor + vector.to(tensor.dtype), tensor)

    return change
