"""Which part of candle-mi a first divergence points to; ``docs/reading-a-report.md`` shows the same table."""

from __future__ import annotations

import re

from candle_mi_parity.spec.hook_points import WEIGHTS

SUSPECTS = {
    ("weights.NAME",): "the dequantisation of this weight of a quantised checkpoint",
    ("hook_embed",): "token embedding and its scale",
    ("attn.hook_q", "attn.hook_k", "attn.hook_v"): "projections, biases, head layout, the norm before attention",
    ("attn.hook_scores",): "rotary, scale, grouped-query repetition (q and k are captured before rotary)",
    ("attn.hook_pattern",): "softcap, mask, window (scores are captured before all three)",
    ("rwkv.hook_decay",): "the token shift, the norm before it, the low-rank projection of the decay",
    ("rwkv.hook_state",): "the recurrence, keys and values, a knockout or steering of the state",
    ("rwkv.hook_effective_attn",): "how effective attention is reconstructed; nothing is computed from it",
    ("hook_attn_out",): "output projection, the norm after attention",
    ("mlp.hook_pre",): "the norm before the MLP, its first projection and bias",
    ("mlp.hook_post",): "activation, gate and up order, MLP biases",
    ("hook_mlp_out",): "down projection and its bias, the norm after the MLP",
    ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"): "the residual sum, or an intervention on the stream",
    ("hook_final_norm",): "the final norm",
    ("logits", "lens"): "unembedding, tied weights, final softcap",
    ("sae.features", "sae_on_truth.features"): "encoder, threshold, k, normalisation",
    ("sae.recon", "sae_on_truth.recon"): "decoder and its bias",
}
"""Hook points of one kind → what to look at when a case first diverges there."""


def hook_point(name: str) -> str:
    """``attn.hook_q`` of ``blocks.3.attn.hook_q``."""
    return name.split(".", 2)[-1] if name.startswith("blocks.") else name


def in_any_layer(name: str) -> str:
    """``lens.blocks.*.hook_resid_post`` of ``lens.blocks.3.hook_resid_post``."""
    return re.sub(r"\bblocks\.\d+\.", "blocks.*.", name)


def suspect(name: str) -> str:
    """What to look at when a case first diverges at a tensor; empty for one that is computed from others."""
    point = "weights.NAME" if name.startswith(WEIGHTS) else "lens" if name.startswith("lens.") else hook_point(name)
    return next((parts for points, parts in SUSPECTS.items() if point in points), "")
