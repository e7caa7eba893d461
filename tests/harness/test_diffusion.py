"""Diffusion models: the truth against ``torch.nn``'s layers and plain numpy, and a fault in each function."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from candle_mi_parity.coverage.calls_diffusion import load_diffusion
from candle_mi_parity.coverage.calls_judge import _differs, load_known_calls
from candle_mi_parity.coverage.calls_truth import truth_of
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.spec.paths import cache_root
from tests.support.calls import ARRAYS, ROWS, TABLE, Values, changed, passes, right, truth, where

OURS = {row.id: row for row in TABLE.call if row.diffusion is not None}

RIGHT = [id for id, row in OURS.items() if not row.raises]
Array = np.ndarray


@functools.cache
def weights(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(where(name) / "model.safetensors")
    return {key.removeprefix("backbone."): tensor.double() for key, tensor in tensors.items()}


def othello_by_torch(name: str, tokens: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """The logits by ``nn.TransformerEncoderLayer``, whose pre-norm block is GPT-2's."""
    held, config = weights(name), dict(TABLE.diffusions[name].config)
    width, heads = int(config["n_embd"]), int(config["n_head"])  # type: ignore[arg-type]
    stream = held["tok_emb.weight"][tokens] + held["pos_emb.weight"][: tokens.shape[1]]
    if before is not None:
        stream = stream + held["self_cond_emb.weight"][before]
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1) if config.get("causal") else None
    renamed = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.0.",
        "linear2.": "mlp.2.", "norm1.": "ln1.", "norm2.": "ln2.",
    }  # fmt: skip
    for layer in range(int(config["n_layer"])):  # type: ignore[arg-type]
        block = torch.nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, torch.nn.functional.gelu, batch_first=True, norm_first=True
        ).double()
        state = {
            f"{new}{part}": held[f"blocks.{layer}.{old}{part}"]
            for new, old in renamed.items()
            for part in ("weight", "bias")
        }
        block.load_state_dict(state)
        stream = block(stream, src_mask=mask)
    final = torch.nn.functional.layer_norm(stream, (width,), held["ln_f.weight"], held["ln_f.bias"])
    return final @ held["head.weight"].T


def mdlm_by_torch(name: str, tokens: torch.Tensor) -> torch.Tensor:
    """The logits by ``scaled_dot_product_attention``, complex numbers for the rotation, and ``nn.LayerNorm``."""
    held, config = weights(name), dict(TABLE.diffusions[name].config)
    width, heads = int(config["hidden_dim"]), int(config["n_heads"])  # type: ignore[arg-type]
    size = width // heads
    time = torch.cat([torch.zeros(128).cos(), torch.zeros(128).sin()]).double()
    silu = torch.nn.SiLU()

    def at(prefix: str, x: torch.Tensor) -> torch.Tensor:
        product = x @ held[f"{prefix}.weight"].T
        return product + held[f"{prefix}.bias"] if f"{prefix}.bias" in held else product

    def norm(prefix: str, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        layer = torch.nn.LayerNorm(width, bias=False).double()
        layer.load_state_dict({"weight": held[f"{prefix}.weight"]})
        normal: torch.Tensor = layer(x)
        return normal * (1 + scale) + shift

    condition = silu(at("sigma_map.mlp.2", silu(at("sigma_map.mlp.0", time))))
    rates = 1 / 10000 ** (torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones(1).double(), torch.outer(torch.arange(tokens.shape[1]).double(), rates))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    stream = held["vocab_embed.embedding"][tokens]
    for layer in range(int(config["n_blocks"])):  # type: ignore[arg-type]
        prefix = f"blocks.{layer}"
        parts = at(f"{prefix}.adaLN_modulation", condition).chunk(6, -1)
        x = at(f"{prefix}.attn_qkv", norm(f"{prefix}.norm1", stream, parts[0], parts[1]))
        q, k, v = x.reshape(*x.shape[:2], 3, heads, size).permute(2, 0, 3, 1, 4)
        x = torch.nn.functional.scaled_dot_product_attention(rotated(q), rotated(k), v)
        stream = stream + parts[2] * at(f"{prefix}.attn_out", x.permute(0, 2, 1, 3).reshape(stream.shape))
        x = at(f"{prefix}.mlp.0", norm(f"{prefix}.norm2", stream, parts[3], parts[4]))
        stream = stream + parts[5] * at(f"{prefix}.mlp.2", torch.nn.GELU("tanh")(x))
    shift, scale = at("output_layer.adaLN_modulation", condition).chunk(2, -1)
    return at("output_layer.linear", norm("output_layer.norm_final", stream, shift, scale))


PLAIN = [id for id in RIGHT if ROWS[id].fn == "diffusion_forward" and "edit" not in ROWS[id].args]


@pytest.mark.every(8)
@pytest.mark.parametrize("call", PLAIN)
def test_the_layers_of_torch_give_the_logits(call: str) -> None:
    row: Any = ROWS[call]
    tokens, before = torch.tensor(row.args["tokens"]), row.args.get("self_conditioning")
    kind = TABLE.diffusions[row.diffusion].config["model_type"]
    with torch.no_grad():
        if kind == "mdlm":
            found = mdlm_by_torch(row.diffusion, tokens)
        else:
            found = othello_by_torch(row.diffusion, tokens, None if before is None else torch.tensor(before))
    np.testing.assert_allclose(found.numpy(), truth(call)["logits"].value, rtol=1e-10, atol=1e-12)


# --- edits, in numpy from the hook on ---------------------------------------------------------------


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def edited(call: str) -> Values:
    """Every hook with the row's edit, from ``einsum`` and the layers' formulas."""
    row: Any = ROWS[call]
    config: Any = TABLE.diffusions[row.diffusion].config
    held = {key: tensor.numpy() for key, tensor in weights(row.diffusion).items()}
    mdlm, edit = config["model_type"] == "mdlm", row.args.get("edit", {"hook": ""})
    found: Values = {}

    def at(name: str, x: Array) -> Array:
        found[name] = x
        if edit["hook"] != name:
            return x
        given = ARRAYS[edit["tensor"]] if "tensor" in edit else np.zeros(1)
        x = x.copy()
        if edit["kind"] == "patch_at":
            x[:, edit["position"]] = given[:, 0]
        elif edit["kind"] == "knockout":
            for query, key in edit["edges"]:
                x[:, :, query, key] = -np.inf
        else:
            replaced, factor = np.broadcast_to(given, x.shape), edit.get("factor", 0.0)
            x = {"replace": replaced, "add": x + given}[edit["kind"]] if "tensor" in edit else x * factor
        return x

    def linear(name: str, x: Array) -> Array:
        return np.asarray(np.einsum("...i,oi->...o", x, held[f"{name}.weight"]) + held.get(f"{name}.bias", 0))

    def norm(name: str, x: Array) -> Array:
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return np.asarray(normal * held[f"{name}.weight"] + held.get(f"{name}.bias", 0))

    def gelu(x: Array) -> Array:
        return torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh" if mdlm else "none").numpy()

    def silu(x: Array) -> Array:
        return np.asarray(x / (1 + np.exp(-x)))

    def rotated(x: Array) -> Array:
        size, out = x.shape[-1], x.copy()
        for position in range(x.shape[2]) if mdlm else ():
            for pair in range(size // 2):
                angle = position * 10000 ** (-2 * pair / size)
                first, second = x[:, :, position, pair], x[:, :, position, pair + size // 2]
                out[:, :, position, pair] = first * math.cos(angle) - second * math.sin(angle)
                out[:, :, position, pair + size // 2] = first * math.sin(angle) + second * math.cos(angle)
        return out

    tokens = np.array(row.args["tokens"])
    time = np.concatenate([np.ones(128), np.zeros(128)])
    condition = silu(linear("sigma_map.mlp.2", silu(linear("sigma_map.mlp.0", time)))) if mdlm else time
    layers, heads = (config["n_blocks"], config["n_heads"]) if mdlm else (config["n_layer"], config["n_head"])
    names = ("norm1", "norm2", "attn_qkv", "attn_out") if mdlm else ("ln1", "ln2", "attn.qkv", "attn.proj")
    if mdlm:
        stream = held["vocab_embed.embedding"][tokens]
    else:
        stream = held["tok_emb.weight"][tokens] + held["pos_emb.weight"][: tokens.shape[1]]
        if (before := row.args.get("self_conditioning")) is not None:
            stream = stream + held["self_cond_emb.weight"][np.array(before)]
    stream = at("hook_embed", stream)
    ones = np.ones(1)
    for layer in range(layers):
        p = f"blocks.{layer}."
        mods = np.split(linear(f"{p}adaLN_modulation", condition), 6) if mdlm else [0 * ones, 0 * ones, ones] * 2
        stream = at(f"{p}hook_resid_pre", stream)
        x = linear(p + names[2], norm(p + names[0], stream) * (1 + mods[1]) + mods[0])
        parts = x.reshape(*x.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
        q, k, v = (at(f"{p}attn.hook_{name}", part) for name, part in zip("qkv", parts, strict=True))
        scores = np.einsum("bhqd,bhkd->bhqk", rotated(q), rotated(k)) / math.sqrt(q.shape[-1])
        if config.get("causal"):
            scores = np.where(np.triu(np.ones(scores.shape[-2:]), 1) > 0, -np.inf, scores)
        pattern = at(f"{p}attn.hook_pattern", softmax(at(f"{p}attn.hook_scores", scores)))
        x = np.einsum("bhqk,bhkd->bqhd", pattern, v).reshape(stream.shape)
        x = at(f"{p}hook_attn_out", linear(p + names[3], x) * mods[2])
        stream = at(f"{p}hook_resid_mid", stream + x)
        x = at(f"{p}mlp.hook_pre", norm(p + names[1], stream) * (1 + mods[4]) + mods[3])
        x = at(f"{p}mlp.hook_post", linear(f"{p}mlp.2", gelu(linear(f"{p}mlp.0", x))))
        stream = at(f"{p}hook_resid_post", stream + at(f"{p}hook_mlp_out", x * mods[5]))
    if mdlm:
        shift, scale = np.split(linear("output_layer.adaLN_modulation", condition), 2)
        final = at("hook_final_norm", norm("output_layer.norm_final", stream) * (1 + scale) + shift)
    else:
        final = at("hook_final_norm", norm("ln_f", stream))
    return found | {"logits": linear("output_layer.linear" if mdlm else "head", final)}


@pytest.mark.every(12)
@pytest.mark.parametrize("call", [id for id in RIGHT if ROWS[id].fn == "diffusion_forward"])
def test_numpy_gives_every_hook_and_an_edit_is_seen(call: str) -> None:
    found, expected = edited(call), truth(call)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor.value, rtol=1e-9, atol=1e-11)
    args: dict[str, Any] = dict(ROWS[call].args)
    if "edit" in args:
        hook = args["edit"]["hook"]
        plain = edited_without(call)
        names = list(found)
        behind = [name for name in names[names.index(hook) + 1 :] if not np.allclose(found[name], plain[name])]
        assert "logits" in behind
        assert all(np.allclose(found[name], plain[name]) for name in names[: names.index(hook) + 1])


def edited_without(call: str) -> Values:
    row = ROWS[call]
    ROWS["plain"] = row.model_copy(update={"args": {key: each for key, each in row.args.items() if key != "edit"}})
    try:
        return edited("plain")
    finally:
        del ROWS["plain"]


@pytest.mark.every(3)
@pytest.mark.parametrize("call", [id for id in RIGHT if ROWS[id].fn == "diffusion_sample"])
def test_the_sampler_takes_the_likeliest_token_of_each_masked_position(call: str) -> None:
    args: Any = ROWS[call].args
    start = [*args["prompt"], *[args["mask"]] * args["seq_len"]][: args["seq_len"]]
    row = ROWS[call].model_copy(update={"args": {"tokens": [start]}, "fn": "diffusion_forward"})
    ROWS["forward"] = row
    try:
        logits = edited("forward")["logits"][0]
    finally:
        del ROWS["forward"]
    logits[:, args["mask"]] = -np.inf
    final = [
        int(best) if token == args["mask"] else token for token, best in zip(start, logits.argmax(-1), strict=True)
    ]
    assert right(call)["value"].tolist() == final
    if "steps" not in args:
        assert right(call)["trajectory"].tolist() == [start, final]


def test_several_steps_with_two_masked_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS["othello/sample-steps-0"]
    monkeypatch.setitem(ROWS, "two", row.model_copy(update={"args": row.args | {"seq_len": 6}}))
    with pytest.raises(CaseTableError, match="only one place"):
        right("two")


def test_a_token_that_is_not_sure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("candle_mi_parity.coverage.calls_diffusion._SURE", 0.5)
    with pytest.raises(CaseTableError, match="not sure"):
        truth_of(ROWS["mdlm/sample"], TABLE, cache_root())


def test_no_weight_of_a_model_is_zero_and_the_modulation_matters() -> None:
    for name in TABLE.diffusions:
        assert all(bool(tensor.any(-1).all()) for tensor in weights(name).values())
    model = load_diffusion(where("mdlm"))
    tokens = torch.tensor([[3, 17, 18]])
    before = model.forward(tokens)["logits"]
    for key in [key for key in model._weights if "adaLN" in key or "sigma_map.mlp.2" in key]:
        kept = model._weights[key]
        model._weights[key] = kept * 0
        assert not torch.allclose(model.forward(tokens)["logits"], before)
        model._weights[key] = kept


# --- faults -----------------------------------------------------------------------------------------


def other(call: str, of: str) -> tuple[str, Values]:
    """The right answer to another call."""
    return call, {name: value for name, value in right(of).items() if name in right(call)}


PLANTED: dict[str, Callable[[], tuple[str, Values]]] = {
    "no rotation": lambda: changed(
        "mdlm/plain",
        lambda _: np.einsum("bhqd,bhkd->bhqk", *(right("mdlm/plain")[f"blocks.0.attn.hook_{n}"] for n in "qk")) / 2,
        "blocks.0.attn.hook_scores",
    ),
    "a causal mask": lambda: changed("mdlm/plain", np.tril, "blocks.0.attn.hook_pattern"),
    "no causal mask": lambda: changed(
        "othello-causal/plain", lambda x: np.where(np.isinf(x), 0, x), "blocks.0.attn.hook_scores"
    ),
    "the output before its gate": lambda: changed(
        "mdlm/plain", lambda _: right("mdlm/plain")["blocks.0.mlp.hook_post"], "blocks.0.hook_mlp_out"
    ),
    "no shift": lambda: changed("mdlm/plain", lambda x: x - x.mean(), "hook_final_norm"),
    "the edit at the next position": lambda: changed(
        "othello/patch-post", lambda x: np.roll(x, 1, axis=1), "blocks.1.hook_resid_pre"
    ),
    "an edit without effect": lambda: other("othello/scale-attn-out", "othello/plain"),
    "a knockout without effect": lambda: other("othello-causal/knockout", "othello-causal/plain"),
    "self-conditioning without effect": lambda: other("before/given", "before/none-given"),
    "none taken for a token": lambda: other("before/all-none", "before/given"),
    "bias left out": lambda: changed("othello/project-rows", lambda x: x + 1e-5),
    "the mask sampled": lambda: changed("mdlm/sample", lambda x: np.where(np.arange(8) == 7, 18, x)),
    "the prompt sampled": lambda: changed("othello/sample", lambda x: np.where(np.arange(7) == 0, 4, x)),
    "a neighbour's embedding": lambda: changed("mdlm/embedding", lambda x: np.roll(x, 1)),
    "the first positions of a batch": lambda: changed("othello/batch", lambda x: x[[0, 0]], "logits"),
    "NaN": lambda: changed("mdlm/no-capture", lambda x: x * np.nan, "logits"),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fails(name: str) -> None:
    call, values = PLANTED[name]()
    assert passes(call, right(call)) and not passes(call, values)


def test_a_layer_norm_in_one_pass_has_the_same_value_and_a_larger_noise() -> None:
    (call,) = [call for row, call in load_known_calls().matches(TABLE) if row.id == "CMI201"]
    one, two = truth(call, Formula.LAYER_NORM_IN_ONE_PASS), truth(call)
    for name in two:
        np.testing.assert_allclose(one[name].value, two[name].value, rtol=1e-9)
    key = "blocks.0.attn.hook_k"
    assert np.sqrt(np.square(one[key].noise).mean()) > 3 * np.sqrt(np.square(two[key].noise).mean())


def test_a_formula_with_a_larger_noise_explains_and_one_with_the_same_does_not() -> None:
    row, right_values = ROWS["othello/small"], truth("othello/small")
    assert _differs(row, right_values, truth("othello/small", Formula.LAYER_NORM_IN_ONE_PASS))
    assert not _differs(row, right_values, right_values)
    assert not _differs(ROWS["mdlm/small"], truth("mdlm/small"), truth("mdlm/small", Formula.LAYER_NORM_IN_ONE_PASS))
