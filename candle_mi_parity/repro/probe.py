"""The lines of ``check.py``, which gets the value at a hook point from transformers, without this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from candle_mi_parity.models.sae import Sae
from candle_mi_parity.repro.repro import Reproduction
from candle_mi_parity.spec.edits import Edit, Inject, Knockout, Scale, Steer
from candle_mi_parity.spec.families import family_of

_ATTENTION = """\
def attention(module, query, key, value, mask, scaling, softcap=None, **_):
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    seen[f"blocks.{module.layer_idx}.attn.hook_scores"] = scores.clone()
%s
    cut = scores == -torch.inf
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    pattern = (scores.masked_fill(cut, -torch.inf) + mask).softmax(-1)
    seen[f"blocks.{module.layer_idx}.attn.hook_pattern"] = pattern.clone()
%s
    return (pattern @ value).transpose(1, 2), None
transformers.AttentionInterface.register("watched", attention)
transformers.AttentionMaskInterface.register("watched", transformers.masking_utils.eager_mask)
model.set_attn_implementation("watched")"""
_AT_SCORES, _AT_PATTERN = ".attn.hook_scores", ".attn.hook_pattern"


def probe(reproduction: Reproduction, sae: Sae | None) -> tuple[list[str], str]:
    """Lines that record hook points of a loaded ``model`` in ``seen``, and the expression of the whole tensor."""
    name, case = reproduction.first.name, reproduction.pair.case
    lines = _sae(sae, str(case.sae.cfg["dtype"])) if case.sae is not None and sae is not None else []
    watched = case.sae.hook if case.sae is not None and name.startswith("sae.") else name
    in_attention = [edit for edit in case.edits if edit.hook.endswith((_AT_SCORES, _AT_PATTERN))]
    if in_attention or watched.endswith((_AT_SCORES, _AT_PATTERN)):
        lines += _attention(in_attention, case.config["num_attention_heads"], len(case.tokens))
    shown, value = _watch(watched, reproduction.subject.model_type, case.config)
    lines += shown
    lines += [_injection(edit) for edit in case.edits if isinstance(edit, Inject)]
    return lines, f"encode({value})" if name == "sae.features" else value


def _watch(name: str, model_type: str, config: dict[str, Any]) -> tuple[list[str], str]:
    if name == "logits":
        return [], "out.logits"
    if name.endswith((_AT_SCORES, _AT_PATTERN)):
        return [], f'seen["{name}"]'
    layer, _, point = name.removeprefix("blocks.").partition(".")
    module, side, shaped = _place(name, layer, point, model_type, config)
    hook = {"input": "register_forward_pre_hook(lambda _, args, kwargs: seen.update(it=(*args, *kwargs.values())[0])",
            "output": "register_forward_hook(lambda _, args, kwargs, out: seen.update(it=out)"}[side]  # fmt: skip
    lines = [f'model.get_submodule("{module}").{hook}, with_kwargs=True)']
    return lines, f'(seen["it"][0] if isinstance(seen["it"], tuple) else seen["it"]){shaped}'


def _attention(edits: Sequence[Edit], heads: int, width: int) -> list[str]:
    """transformers' attention with recorded scores and weights, and the edits of both."""
    lines: dict[str, list[str]] = {_AT_SCORES: [], _AT_PATTERN: []}
    for edit in edits:
        point = _AT_SCORES if edit.hook.endswith(_AT_SCORES) else _AT_PATTERN
        layer = edit.hook.split(".")[1]
        lines[point] += [f"    if module.layer_idx == {layer}:", *_change(edit, heads, width)]
    text = _ATTENTION % tuple("\n".join(lines[point]) for point in (_AT_SCORES, _AT_PATTERN))
    return [line for line in text.splitlines() if line]


def _change(edit: Edit, heads: int, width: int) -> list[str]:
    if isinstance(edit, Scale):
        name = "scores" if edit.hook.endswith(_AT_SCORES) else "pattern"
        return [f"        {name} = {name} * {edit.factor}"]
    assert isinstance(edit, Knockout | Steer)
    entries = [entry.tolist() for entry in edit.spec.chosen(heads, width).nonzero()]
    at = f"        at = (slice(None), *torch.tensor({entries})) # heads, queries, keys"
    if isinstance(edit, Knockout):
        return [at, "        scores[at] = -torch.inf"]
    if edit.how == "scale":
        queries = ["        rows = (slice(None), *at[1:3])", "        pattern[rows] /= pattern[rows].sum(-1, True)"]
        return [at, f"        pattern[at] *= {edit.value}", *queries]
    return [
        at,
        "        chosen = torch.zeros_like(pattern, dtype=torch.bool); chosen[at] = True",
        "        others = (pattern != 0) & ~chosen",
        f"        gained = (torch.where(chosen, {edit.value} - pattern, 0)).sum(-1, True)",
        "        share = gained / others.sum(-1, True).clamp_min(1)",
        "        moved = torch.where(others, (pattern - share).clamp_min(0), 0)",
        f"        moved = torch.where(chosen, {edit.value}, moved)",
        "        pattern = torch.where(chosen.any(-1, True), moved / moved.sum(-1, True), pattern)",
    ]


def _injection(edit: Inject) -> str:
    layer = edit.hook.split(".")[1]
    added = " + ".join(f"{strength} * sae['W_dec'][{int(index)}]" for index, strength in edit.features)
    place = f"torch.arange(out.shape[1])[:, None] == {edit.position}"
    return (
        f'model.get_submodule("model.layers.{layer}").register_forward_hook('
        f"lambda module, args, out: out + ({place}) * ({added}))"
    )


def _sae(sae: Sae, dtype: str) -> list[str]:
    """SAELens's encoder for the settings of an SAE.

    :param dtype: of the weights, as ``cfg.json`` says.
    """
    lines = [
        "from safetensors.torch import load_file",
        'weights = load_file(folder / "sae/sae_weights.safetensors")',
        f"sae = {{name: value.to(torch.{dtype}).double() for name, value in weights.items()}}",
        "def encode(x):",
    ]
    if sae.normalize == "layer_norm":
        lines.append("    x = (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-5)")
    if sae.normalize == "constant_norm_rescale":
        lines.append("    x = x / x.pow(2).mean(-1, True).sqrt()")
    if sae.centred:
        lines.append('    x = x - sae["b_dec"]')
    lines.append('    pre = x @ sae["W_enc"] + sae["b_enc"]')
    if sae.by_decoder_norm:
        lines.append('    pre = pre * sae["W_dec"].norm(dim=-1)')
    if sae.k is not None:
        lines.append(f"    pre = torch.zeros_like(pre).scatter(-1, *reversed(pre.topk({sae.k})))")
    if sae.threshold is not None:
        lines.append('    pre = pre * (pre > sae["threshold"])')
    return [*lines, "    return pre.relu()"]


def _place(name: str, layer: str, point: str, model_type: str, config: dict[str, Any]) -> tuple[str, str, str]:
    """Module, its ``input`` or ``output``, and the expression that gives it candle-mi's shape."""
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
