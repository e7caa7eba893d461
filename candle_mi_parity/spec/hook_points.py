"""candle-mi's hook points (TransformerLens' names), in execution order, and what each is computed from."""

from __future__ import annotations

from typing import Literal

Mode = Literal["free", "forced"]
"""``free``: the whole forward. ``forced``: the attention half of every layer starts from the truth's own
``hook_resid_pre`` and the MLP half from its ``hook_resid_mid``, so that a divergence belongs to its half-layer."""

WEIGHTS = "weights."
"""Prefix of a dequantised weight of a quantised checkpoint: ``weights.model.layers.0.mlp.up_proj.weight``."""

FORCED = ("hook_resid_pre", "hook_resid_mid")

LAYER_POINTS = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_scores",
    "attn.hook_pattern",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""Hook points of a layer in execution order, without the ``blocks.i.`` prefix."""

RECURRENT_POINTS = (
    "hook_resid_pre",
    "rwkv.hook_decay",
    "rwkv.hook_state",
    "rwkv.hook_effective_attn",
    "hook_resid_post",
)
"""The same of a layer of RWKV; those of ``rwkv`` are read-outs, which cannot be edited."""

STATE = "rwkv.hook_state"
SIGNED = ".signed"
"""Suffix of a tensor before its negative entries became 0. Rounding may change the sign of an entry near 0 more often
than a few samples show, so that the noise of such an entry is that which it has here."""
WRITES = "rwkv.writes"
"""No hook point of candle-mi: the factors by which an edit scales what each position writes into the state, [T]."""


def hook_names(n_layers: int, recurrent: bool = False) -> list[str]:
    """All hook points of a model in execution order (12 a layer, or 5 of RWKV, and two), without ``logits``."""
    points = RECURRENT_POINTS if recurrent else LAYER_POINTS
    layers = [f"blocks.{i}.{point}" for i in range(n_layers) for point in points]
    return ["hook_embed", *layers, "hook_final_norm"]


def inputs_of(name: str) -> list[str]:
    """The tensors from which a hook's tensor is computed; [] for the first one.

    A divergence is inherited where one of them diverges.
    """
    if name in _GLOBAL_INPUTS:
        return _GLOBAL_INPUTS[name]
    if not name.startswith("blocks."):
        return []
    _, index, point = name.split(".", 2)
    layer = f"blocks.{index}."
    if point == "hook_resid_pre":
        return ["hook_embed"] if index == "0" else [f"blocks.{int(index) - 1}.hook_resid_post"]
    return [layer + feeder for feeder in _LAYER_INPUTS[point]]


_GLOBAL_INPUTS = {
    "logits": ["hook_final_norm"],
    "sae.recon": ["sae.features"],
    "sae_on_truth.recon": ["sae_on_truth.features"],
}
_LAYER_INPUTS = {
    "attn.hook_q": ["hook_resid_pre"],
    "attn.hook_k": ["hook_resid_pre"],
    "attn.hook_v": ["hook_resid_pre"],
    "attn.hook_scores": ["attn.hook_q", "attn.hook_k"],
    "attn.hook_pattern": ["attn.hook_scores"],
    "hook_attn_out": ["attn.hook_pattern", "attn.hook_v"],
    "hook_resid_mid": ["hook_resid_pre", "hook_attn_out"],
    "mlp.hook_pre": ["hook_resid_mid"],
    "mlp.hook_post": ["mlp.hook_pre"],
    "hook_mlp_out": ["mlp.hook_post"],
    "rwkv.hook_decay": ["hook_resid_pre"],
    "rwkv.hook_state": ["rwkv.hook_decay"],
    "rwkv.hook_effective_attn": ["rwkv.hook_decay"],
    "hook_resid_post": ["hook_resid_mid", "hook_mlp_out", "rwkv.hook_state"],
}


_COMPUTED_WITH = {
    "attn.hook_q": "self_attn",
    "attn.hook_k": "self_attn",
    "attn.hook_v": "self_attn",
    "hook_attn_out": "self_attn",
    "mlp.hook_post": "mlp",
    "hook_mlp_out": "mlp",
}
"""Hook point of a layer → the module whose weights it is computed with."""


def weight_feeds(weight: str, name: str) -> bool:
    """Whether a tensor is computed with a weight, :data:`WEIGHTS` and its name, of the same module."""
    if weight.endswith("lm_head.weight"):
        return name == "logits" or name.startswith("lens.")
    _, index, point = name.split(".", 2) if name.startswith("blocks.") else ("", "", "")
    return f".layers.{index}.{_COMPUTED_WITH.get(point, ' ')}." in weight


def format_of(name: str, model: str) -> str:
    """The format of a tensor in a model of a format: an SAE and RWKV's recurrence are float32 in every model."""
    return "float32" if name.startswith("sae") or ".rwkv." in name else model


def is_lens(name: str) -> bool:
    """Whether a hook's last position is projected onto the vocabulary: every layer's output."""
    return name.startswith("blocks.") and name.endswith("hook_resid_post")


def axes(name: str, count: int) -> tuple[str, ...]:
    """Names of a tensor's axes, for an index that a person reads; numbers for a tensor that is not known.

    >>> axes("blocks.0.attn.hook_pattern", 4)
    ('batch', 'head', 'query', 'key')
    """
    if name.endswith(("hook_scores", "hook_pattern")):
        named: tuple[str, ...] = ("batch", "head", "query", "key")
    elif name.endswith(("hook_q", "hook_k", "hook_v")):
        named = ("batch", "head", "position", "entry")
    elif name.endswith("rwkv.hook_effective_attn"):
        named = ("batch", "head", "query", "source")
    elif name.endswith(STATE):
        named = ("batch", "head", "key entry", "value entry")
    elif name.endswith("rwkv.hook_decay"):
        named = ("batch", "position", "head", "entry")
    elif name.startswith(WEIGHTS):
        named = ("weight", "row", "column")
    elif name.endswith((".features", ".recon")):
        named = ("batch", "position", "feature" if name.endswith(".features") else "entry")
    else:
        named = ("batch", "position", "token" if name == "logits" or name.startswith("lens.") else "entry")
    return named if len(named) == count else tuple(f"axis {axis} at" for axis in range(count))


def place(name: str, index: list[int]) -> str:
    """``head 1, query 17, key 4`` of an index of a tensor."""
    return ", ".join(f"{axis} {at}" for axis, at in zip(axes(name, len(index)), index, strict=True))
