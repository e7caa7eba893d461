"""The lines of ``check.py``: how plain transformers shows the value at a hook point, without this package."""

from __future__ import annotations

from typing import Any

from candle_mi_parity.families import family_of

_ATTENTION = """\
def attention(module, query, key, value, mask, scaling, softcap=None, **_):
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    seen[module.layer_idx] = scores = query @ key.transpose(2, 3) * scaling
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    return ((scores + mask).softmax(-1) @ value).transpose(1, 2), None
transformers.AttentionInterface.register("scores", attention)
transformers.AttentionMaskInterface.register("scores", transformers.masking_utils.eager_mask)
model.set_attn_implementation("scores")"""


def probe(name: str, model_type: str, config: dict[str, Any]) -> tuple[list[str], str]:
    """Lines that watch a loaded ``model`` and fill ``seen``, and the expression of the whole tensor afterwards."""
    if name == "logits":
        return [], "out.logits"
    layer, _, point = name.removeprefix("blocks.").partition(".")
    if point == "attn.hook_pattern":
        return [], f"out.attentions[{layer}]"
    if point == "attn.hook_scores":
        return _ATTENTION.splitlines(), f"seen[{layer}]"
    module, side, shaped = _place(name, layer, point, model_type, config)
    hook = {"input": "register_forward_pre_hook(lambda _, args, kwargs: seen.update(it=(*args, *kwargs.values())[0])",
            "output": "register_forward_hook(lambda _, args, kwargs, out: seen.update(it=out)"}[side]  # fmt: skip
    lines = [f'model.get_submodule("{module}").{hook}, with_kwargs=True)']
    return lines, f'(seen["it"][0] if isinstance(seen["it"], tuple) else seen["it"]){shaped}'


def _place(name: str, layer: str, point: str, model_type: str, config: dict[str, Any]) -> tuple[str, str, str]:
    """Module, whether its input or output is meant, and how that becomes candle-mi's shape."""
    family = family_of(model_type)
    if name in ("hook_embed", "hook_final_norm"):
        return ("model.layers.0", "input", "") if name == "hook_embed" else ("model.norm", "output", "")
    path = f"model.layers.{layer}"
    if point.startswith("attn.hook_"):
        letter = point[-1]
        heads, groups = (
            config["num_attention_heads"],
            config.get("num_key_value_heads", config["num_attention_heads"]),
        )
        width = config.get("head_dim") or config["hidden_size"] // heads
        if family.qkv is not None:
            start = {"q": 0, "k": heads, "v": heads + groups}[letter] * width
            end = start + (heads if letter == "q" else groups) * width
            return (
                f"{path}.{family.qkv}",
                "output",
                f"[..., {start}:{end}].unflatten(-1, (-1, {width})).transpose(1, 2)",
            )
        module = {"q": family.q, "k": family.k, "v": family.v}[letter]
        if family.heads_first and letter != "v":
            return f"{path}.{module}", "output", ""
        per_head = module.endswith("norm")
        unflatten = "" if per_head else f".unflatten(-1, (-1, {width}))"
        return f"{path}.{module}", "output", f"{unflatten}.transpose(1, 2)"
    modules = {
        "hook_resid_pre": ("", "input"),
        "hook_attn_out": (family.attn_out, "output"),
        "hook_resid_mid": (family.resid_mid, "input"),
        "mlp.hook_pre": ("mlp", "input"),
        "mlp.hook_post": ("mlp", "output"),
        "hook_mlp_out": (family.mlp_out, "output"),
        "hook_resid_post": ("", "output"),
    }
    module, side = modules[point]
    return f"{path}.{module}".rstrip("."), side, ""
