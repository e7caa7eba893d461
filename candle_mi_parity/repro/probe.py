"""Where ``check.py``, which has only transformers, finds the value at a hook point."""

from __future__ import annotations

from typing import Any

from candle_mi_parity.spec.families import RECURRENT, family_of


def place(name: str, model_type: str, config: dict[str, Any]) -> tuple[str, str, str]:
    """The module, its ``input`` or ``output``, and the expression of the tensor in candle-mi's shape.

    Logits and what the recording attention sees need no hook: both the module and the side are empty.
    """
    found = '(seen["it"][0] if isinstance(seen["it"], tuple) else seen["it"])'
    if name == "logits":
        return "", "", "out.logits"
    if model_type in RECURRENT:  # whose script runs the layers one by one
        return "", "", f'seen["{name}"]'
    if name.endswith(("attn.hook_scores", "attn.hook_pattern")):
        return "", "", f'seen["{name}"]'
    if name == "hook_embed":
        return "model.layers.0", "input", found
    if name == "hook_final_norm":
        return "model.norm", "output", found
    family, (_, layer, point) = family_of(model_type), name.split(".", 2)
    path = f"model.layers.{layer}"
    if not point.startswith("attn.hook_"):
        module, side = {
            "hook_resid_pre": ("", "input"),
            "hook_attn_out": (family.attn_out, "output"),
            "hook_resid_mid": (family.resid_mid, "input"),
            "mlp.hook_pre": ("mlp", "input"),
            "mlp.hook_post": ("mlp", "output"),
            "hook_mlp_out": (family.mlp_out, "output"),
            "hook_resid_post": ("", "output"),
        }[point]
        return f"{path}.{module}".rstrip("."), side, found
    letter, heads = point[-1], config["num_attention_heads"]
    groups, width = config.get("num_key_value_heads", heads), config.get("head_dim") or config["hidden_size"] // heads
    if family.qkv is not None:
        start = {"q": 0, "k": heads, "v": heads + groups}[letter] * width
        end = start + (heads if letter == "q" else groups) * width
        shaped = f"[..., {start}:{end}].unflatten(-1, (-1, {width})).transpose(1, 2)"
        return f"{path}.{family.qkv}", "output", found + shaped
    module = {"q": family.q, "k": family.k, "v": family.v}[letter]
    if family.heads_first and letter != "v":
        return f"{path}.{module}", "output", found
    unflatten = "" if module.endswith("norm") else f".unflatten(-1, (-1, {width}))"
    return f"{path}.{module}", "output", f"{found}{unflatten}.transpose(1, 2)"
