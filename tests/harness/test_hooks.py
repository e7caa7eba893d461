"""What each hook holds: against a llama layer written in numpy, and by the identities between hooks.

``hidden_states`` starts with the embedding and its last item is after the final norm: the output of layer L read from
it is wrong for the last layer.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from candle_mi_parity.errors import OracleError
from candle_mi_parity.oracle.hooks import Recorder, _recorder, load_model
from candle_mi_parity.oracle.provenance import modeling_files
from candle_mi_parity.oracle.rounding import MatmulScales, Truth64
from candle_mi_parity.spec.families import FAMILIES
from tests.support.planting import real


def values(case_id: str) -> dict[str, np.ndarray]:
    return {name: tensor.value for name, tensor in real(case_id).truth.tensors.items()}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.sqrt(np.square(found - expected).mean()) / np.sqrt(np.square(expected).mean()))


def by_hand() -> dict[str, np.ndarray]:
    """Layer 0 of the tiny llama in plain numpy, float64, from the safetensors file and config.json."""
    there = real("llama/hub")
    config = json.loads((there.subject.model_dir / "config.json").read_text())
    file = load_file(there.subject.model_dir / "model.safetensors")
    weights = {name: array.astype(np.float64) for name, array in file.items()}
    n_heads, n_kv, size = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    layer = "model.layers.0."

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt(np.square(x).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return np.asarray(x / scale * weights[f"{layer}{name}.weight"])

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ weights[f"{layer}{name}.weight"].T)

    def heads(x: np.ndarray, count: int) -> np.ndarray:
        return x.reshape(*x.shape[:2], count, size).swapaxes(1, 2)

    out: dict[str, np.ndarray] = {}
    x = weights["model.embed_tokens.weight"][np.array(there.subject.tokens)]
    length = x.shape[1]
    angles = np.arange(length)[:, None] * config["rope_theta"] ** -(np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate([f(angles)] * 2, -1) for f in (np.cos, np.sin))

    def rotate(y: np.ndarray) -> np.ndarray:
        half = size // 2
        return np.asarray(y * cos + np.concatenate([-y[..., half:], y[..., :half]], -1) * sin)

    out["hook_embed"] = out["blocks.0.hook_resid_pre"] = x
    h = norm(x, "input_layernorm")
    q, k, v = (
        out.setdefault(f"blocks.0.attn.hook_{letter}", heads(linear(h, f"self_attn.{letter}_proj"), count))
        for letter, count in (("q", n_heads), ("k", n_kv), ("v", n_kv))
    )
    k, v = rotate(k).repeat(n_heads // n_kv, 1), v.repeat(n_heads // n_kv, 1)
    scores = rotate(q) @ k.swapaxes(2, 3) / np.sqrt(size)
    out["blocks.0.attn.hook_scores"] = scores
    weight = np.where(np.tril(np.ones((length, length), bool)), np.exp(scores - scores.max(-1, keepdims=True)), 0)
    pattern = weight / weight.sum(-1, keepdims=True)
    out["blocks.0.attn.hook_pattern"] = pattern
    mixed = (pattern @ v).swapaxes(1, 2).reshape(1, length, -1)
    out["blocks.0.hook_attn_out"] = linear(mixed, "self_attn.o_proj")
    out["blocks.0.hook_resid_mid"] = mid = x + out["blocks.0.hook_attn_out"]
    out["blocks.0.mlp.hook_pre"] = h = norm(mid, "post_attention_layernorm")
    gate = linear(h, "mlp.gate_proj")
    out["blocks.0.mlp.hook_post"] = linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    out["blocks.0.hook_mlp_out"] = out["blocks.0.mlp.hook_post"]
    out["blocks.0.hook_resid_post"] = mid + out["blocks.0.hook_mlp_out"]
    return out


def test_a_layer_written_in_numpy_agrees_at_every_hook_and_float32_does_not() -> None:
    truth, hand = values("llama/hub"), by_hand()
    assert set(hand) == {name for name in truth if name == "hook_embed" or name.startswith("blocks.0.")}
    for name, expected in hand.items():
        assert relative(truth[name], expected) < 1e-12, name
    stream = "blocks.0.hook_resid_post"
    assert relative(real("llama/hub").arrays[stream], hand[stream]) > 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_add_up_to_the_residual_stream(family: str) -> None:
    truth = values(f"{family}/hub")
    for layer in range(3):
        at = {name: truth[f"blocks.{layer}.hook_{name}"] for name in ("resid_pre", "attn_out", "resid_mid")}
        at |= {name: truth[f"blocks.{layer}.hook_{name}"] for name in ("mlp_out", "resid_post")}
        assert relative(at["resid_pre"] + at["attn_out"], at["resid_mid"]) < 1e-15, f"{family}, layer {layer}"
        assert relative(at["resid_mid"] + at["mlp_out"], at["resid_post"]) < 1e-15, f"{family}, layer {layer}"
        before = truth["hook_embed"] if layer == 0 else truth[f"blocks.{layer - 1}.hook_resid_post"]
        np.testing.assert_array_equal(at["resid_pre"], before)


@pytest.mark.parametrize("case_id", [*(f"{family}/hub" for family in FAMILIES), "mistral/window", "gemma2/window"])
def test_pattern_rows_sum_to_1_and_are_0_where_masked(case_id: str) -> None:
    tensors = real(case_id).truth.tensors
    windows = set()
    for layer in range(3):
        tensor = tensors[f"blocks.{layer}.attn.hook_pattern"]
        pattern, allowed = tensor.value, tensor.allowed
        assert allowed is not None
        assert not allowed[np.triu_indices(24, 1)].any(), "the future is allowed"
        assert (pattern[..., ~allowed] == 0).all()
        assert (pattern[..., allowed] > 0).all()
        np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-14)
        windows.add(int(allowed.sum(-1).max()))
    expected = {"mistral/window": {8}, "gemma2/window": {8, 24}}.get(case_id, {24})
    assert windows == expected, "the sliding window is not where the config puts it"


@pytest.mark.parametrize(("case_id", "cap"), [("gemma2/hub", 50.0), ("gemma2/window", 50.0), ("llama/hub", None)])
def test_pattern_is_the_softmax_of_the_masked_and_capped_scores(case_id: str, cap: float | None) -> None:
    tensors = real(case_id).truth.tensors
    for layer in range(3):
        pattern = tensors[f"blocks.{layer}.attn.hook_pattern"]
        assert pattern.allowed is not None
        scores = tensors[f"blocks.{layer}.attn.hook_scores"].value
        capped = scores if cap is None else np.tanh(scores / cap) * cap
        weight = np.where(pattern.allowed, np.exp(capped), 0)
        assert relative(weight / weight.sum(-1, keepdims=True), pattern.value) < 1e-14
        if cap is not None:
            uncapped = np.where(pattern.allowed, np.exp(scores), 0)
            assert relative(uncapped / uncapped.sum(-1, keepdims=True), pattern.value) > 1e-6


def hidden_states() -> list[np.ndarray]:
    """What ``output_hidden_states`` returns, in float64."""
    subject = real("llama/hub").subject
    with Truth64(MatmulScales()), torch.no_grad():
        token = _recorder.set(Recorder())
        try:
            out = load_model(subject.model_dir)(
                torch.tensor(subject.tokens), output_hidden_states=True, use_cache=False
            )
        finally:
            _recorder.reset(token)
    return [state.numpy() for state in out.hidden_states]


def test_hidden_states_are_the_embedding_the_streams_and_the_final_norm() -> None:
    truth, states = values("llama/hub"), hidden_states()
    assert len(states) == 4
    np.testing.assert_array_equal(states[0], truth["hook_embed"])
    for layer in (0, 1):
        np.testing.assert_array_equal(states[layer + 1], truth[f"blocks.{layer}.hook_resid_post"])
    np.testing.assert_array_equal(states[3], truth["hook_final_norm"])
    assert relative(states[3], truth["blocks.2.hook_resid_post"]) > 0.1
    assert relative(states[0], truth["blocks.0.hook_resid_post"]) > 0.1


def test_gemma_scales_its_embedding_before_the_hook() -> None:
    subject = real("gemma/hub").subject
    table = load_file(subject.model_dir / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)
    rows = table[np.array(subject.tokens)]
    assert relative(values("gemma/hub")["hook_embed"], rows * np.sqrt(64)) < 1e-12


@pytest.mark.parametrize("model_type", ["no_such_family", "byt5"])  # byt5 is a tokenizer only
def test_a_family_without_model_code_is_refused(model_type: str) -> None:
    with pytest.raises(OracleError, match=f"no model_type '{model_type}'"):
        modeling_files(model_type)
