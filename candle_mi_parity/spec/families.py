"""Where each candle-mi hook lives in transformers, per model family.

A family whose modules are named as Llama's is one line in :data:`FAMILIES`; the others override what differs. A
bidirectional decoder with the layers of a family is one entry of :data:`BIDIRECTIONAL`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from candle_mi_parity.errors import CaseTableError


@dataclass(frozen=True)
class Family:
    """Module paths below ``model.layers[i]`` whose input or output is a hook point.

    :ivar q: output is the per-head query before rotary; likewise ``k``, ``v``.
    :ivar qkv: a fused projection that replaces the three; its output is split as q, k, v.
    :ivar attn_out: output is what the attention block adds to the residual stream.
    :ivar resid_mid: *input* is the residual stream after attention.
    :ivar mlp_out: output is what the MLP block adds to the residual stream.
    :ivar norm_offset: the norm multiplies by ``norm_offset + weight`` (1 in the Gemma families).
    :ivar heads_first: ``q`` and ``k`` come out as [B, n, T, D], not as [B, T, n·D].
    """

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = None
    attn_out: str = "self_attn"
    resid_mid: str = "post_attention_layernorm"
    mlp_out: str = "mlp"
    norm_offset: int = 0
    heads_first: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(q="self_attn.q_norm", k="self_attn.k_norm"),
    "gemma": Family(norm_offset=1),
    "gemma2": Family(
        attn_out="post_attention_layernorm",
        resid_mid="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
        norm_offset=1,
    ),
    "phi3": Family(qkv="self_attn.qkv_proj"),
    "starcoder2": Family(),
}


BIDIRECTIONAL = {"Dream": "qwen2", "a2d-llama": "llama", "a2d-qwen2": "qwen2", "a2d-qwen3": "qwen3"}
"""Model type of a masked-diffusion decoder, which transformers does not have → the family whose layers and weights it
has. Every position attends to every other in each layer, whatever window the config has: Dream's attention ignores
the window, and the A2D classes of dllm give layers with one the mask of all the others."""

MAPPED = (*FAMILIES, *BIDIRECTIONAL)
"""Every model type of a transformer with a hook map."""

RECURRENT = ("rwkv6", "rwkv7")
"""Model types without attention, which transformers has only with :mod:`candle_mi_parity.models.rwkv`."""


def transformers_type(model_type: str) -> str:
    """The model type under which transformers has the layers of a model type."""
    return BIDIRECTIONAL.get(model_type, model_type)


def is_bidirectional(config: Mapping[str, Any]) -> bool:
    """Whether a position attends to later ones too: by the model type of a ``config.json``, or by its ``is_causal``.

    transformers takes a null for false.
    """
    return config.get("model_type") in BIDIRECTIONAL or not config.get("is_causal", True)


def family_of(model_type: str) -> Family:
    """The mapping of a ``config.json`` model type.

    That of a recurrent model is of no use but for its norms.

    :raises CaseTableError: the family has no mapping.
    """
    if model_type in RECURRENT:
        return Family()
    if (known := FAMILIES.get(transformers_type(model_type))) is None:
        every = ", ".join((*MAPPED, *RECURRENT))
        raise CaseTableError(f"model_type {model_type!r} has no hook map; known: {every}. Add it in families.py")
    return known
