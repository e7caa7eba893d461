"""Counterfactuals that are not in a config: other weights, and other arithmetic in a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from candle_mi_parity.errors import OracleError
from candle_mi_parity.models.rwkv import HeadNorm, TimeMix
from candle_mi_parity.models.rwkv6 import TimeMix6
from candle_mi_parity.models.rwkv7 import TimeMix7
from candle_mi_parity.spec.counterfactual import Counterfactual, Variant, matching

M = TypeVar("M", bound=nn.Module)
STREAMED = "the weights of a streamed model cannot be changed; it needs more memory"


def apply_to_model(model: Any, change: Counterfactual, dtype: torch.dtype, streamed: bool) -> None:
    """Change the weights and modules of a float64 model, in place.

    :param dtype: the case's format.
    :param streamed: whether the weights are streamed; they cannot be changed then.
    :raises OracleError: a glob matches no parameter, the weights are streamed, or there is no such norm.
    """
    for globs, value in ((change.weights_zero, 0.0), (change.weights_one, 1.0)):
        _fill(model, globs, value, streamed)
    if change.has(Variant.RMS_NORM_FOR_LAYER_NORM):
        _replace_layer_norms(model, RmsNorm)
    elif change.has(Variant.LAYER_NORM_IN_ONE_PASS):
        _replace_layer_norms(model, OnePassLayerNorm)
    elif change.has(Variant.LAYER_NORM_IN_MODEL_DTYPE):
        _replace_layer_norms(model, partial(SteppedLayerNorm, most=torch.finfo(dtype).max))
    if change.has(Variant.NO_QUERY_KEY_NORM):
        _leave_out(model, ("q_norm", "k_norm"))
    if change.has(Variant.KEYS_OF_OTHER_FAMILIES):
        _cap_logits(model)
    if change.has(Variant.HEAD_IS_EMBEDDING):
        if streamed:
            raise OracleError(STREAMED)
        model.lm_head.weight = model.model.embed_tokens.weight
    if change.has(Variant.STATE_EDITS_NOT_ATTENDED):
        for mixing in _of_kind(model, TimeMix):
            mixing.attends_to_unwritten = True
    if change.has(Variant.VANISHED_DECAY_NOT_ATTENDED):
        for mixing in _of_kind(model, TimeMix6):
            mixing.loses_vanished = True
    if change.has(Variant.HEAD_NORM_EPS_OF_LAYER_NORM):
        for norm in _of_kind(model, HeadNorm):
            norm.eps *= model.config.layer_norm_epsilon / 1e-5
    if change.has(Variant.KEY_NORM_EPS_IN_ROOT):
        for mixing in _of_kind(model, TimeMix7):
            mixing.eps_in_root = True
    if change.has(Variant.ROTARY_IN_MODEL_DTYPE):
        model.model.rotary_emb = RoundedRotary(model.model.rotary_emb, dtype)


def keys_of_other_families(config: Any, scaling: float) -> tuple[float, float | None, int | None]:
    """The scale, softcap and window of attention that a config names in the keys of Gemma 2 and Mistral."""
    keys = ("query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window")
    scalar, softcap, window = (getattr(config, key, None) for key in keys)
    return scaling if scalar is None else scalar**-0.5, softcap, window


def _cap_logits(model: Any) -> None:
    """Cap the logits as Gemma 2 does, if the config has its key."""
    softcap = getattr(model.config, "final_logit_softcapping", None)
    if softcap is None:
        return

    def capped(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = torch.tanh(output.logits / softcap) * softcap
        return output

    model.register_forward_hook(capped)


def _of_kind(model: nn.Module, kind: type[M]) -> list[M]:
    """:raises OracleError: the model has no module of the class."""
    found = [module for module in model.modules() if isinstance(module, kind)]
    if not found:
        raise OracleError(f"the model has no {kind.__name__}")
    return found


def _fill(model: nn.Module, globs: list[str], value: float, streamed: bool) -> None:
    if globs and streamed:
        raise OracleError(STREAMED)
    parameters = dict(model.named_parameters())
    for glob in globs:
        names = matching(list(parameters), [glob])
        if not names:
            raise OracleError(f"the model has no parameter {glob}")
        with torch.no_grad():
            for name in names:
                parameters[name].fill_(value)


def _leave_out(model: nn.Module, names: tuple[str, ...]) -> None:
    found = [name for name, _ in model.named_modules() if name.endswith(names)]
    if not found:
        raise OracleError(f"the model has no {' and no '.join(names)}")
    for name in found:
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Identity())


class RmsNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · weight`` (Zhang and Sennrich 2019), with a LayerNorm's weight and eps."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self._eps = norm.weight, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._eps) * self.weight


class OnePassLayerNorm(nn.Module):
    """A LayerNorm whose variance is mean(x²) − mean(x)², which cancels where the mean is large: its rounding noise is
    larger, its exact value the same."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self._eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = x.float()  # as candle, which sums in float32 in every format
        mean = single.mean(-1, keepdim=True)
        variance = single.square().mean(-1, keepdim=True) - mean.square()
        out = (single - mean) * torch.rsqrt(variance + self._eps) * self.weight.float()
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)


class SteppedLayerNorm(nn.Module):
    """A LayerNorm of single steps, each with its rounding, which divides by infinity where the sum of squares is
    larger than a number."""

    def __init__(self, norm: nn.LayerNorm, most: float) -> None:
        super().__init__()
        self.weight, self.bias, self._eps, self._most = norm.weight, norm.bias, norm.eps, most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        squares = centred.square().sum(-1, keepdim=True)
        normed = centred * torch.rsqrt(squares / x.shape[-1] + self._eps)
        # Not by a division by infinity, which the noise would turn into NaN.
        out = torch.where(squares > self._most, 0.0, normed) * self.weight
        return out if self.bias is None else out + self.bias


def _replace_layer_norms(model: nn.Module, norm_class: Callable[[nn.LayerNorm], nn.Module]) -> None:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    if not found:
        raise OracleError("the model has no LayerNorm")
    for name, module in found:
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, norm_class(module))


class RoundedRotary(nn.Module):
    """transformers' rotary embedding with positions, frequencies, angles, cosines and sines rounded to a format."""

    def __init__(self, rotary: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self._rotary, self._dtype = rotary, dtype

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [B, T, head_dim]."""
        # Outside of the float64 mode, which would undo the rounding.
        with _disable_current_modes():
            frequencies = self._rounded(self._rotary.inv_freq)
            angles = self._rounded(self._rounded(position_ids)[..., None] * frequencies)
            angles = torch.cat((angles, angles), dim=-1)
            scale = self._rotary.attention_scaling
            return self._rounded(angles.cos()) * scale, self._rounded(angles.sin()) * scale

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self._dtype).double()
