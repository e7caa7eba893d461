"""The oracle: what each hook holds, in float64 everywhere, reproducible to the bit.

The hooks are compared with a llama layer written in numpy, and by the identities between them.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from candle_mi_parity.errors import ModelError, OracleError
from candle_mi_parity.models.transformers_config import load_config
from candle_mi_parity.oracle.compute import sample
from candle_mi_parity.oracle.hooks import Recorder, attention, forward, load_model
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.provenance import modeling_files
from candle_mi_parity.oracle.rounding import MatmulScales, Truth64
from candle_mi_parity.spec.families import BIDIRECTIONAL, FAMILIES
from candle_mi_parity.spec.hook_points import hook_names
from candle_mi_parity.spec.paths import FIXTURES
from tests.support.planting import changed_model, real


def values(case_id: str) -> dict[str, np.ndarray]:
    return {name: tensor.value for name, tensor in real(case_id).truth.tensors.items()}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.sqrt(np.square(found - expected).mean()) / np.sqrt(np.square(expected).mean()))


def by_hand(case_id: str, allowed: np.ndarray) -> dict[str, np.ndarray]:
    """Layer 0 of a tiny llama in plain numpy, float64, from the safetensors file and config.json.

    :param allowed: boolean [T, T], which keys a query attends to.
    """
    there = real(case_id)
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
    weight = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
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
    truth, hand = values("llama/hub"), by_hand("llama/hub", np.tril(np.ones((24, 24), bool)))
    assert set(hand) == {name for name in truth if name == "hook_embed" or name.startswith("blocks.0.")}
    for name, expected in hand.items():
        assert relative(truth[name], expected) < 1e-12, name
    stream = "blocks.0.hook_resid_post"
    assert relative(real("llama/hub").arrays[stream], hand[stream]) > 1e-9


@pytest.mark.parametrize("case_id", ["a2d-llama/hub", "llama/bidirectional"])
def test_a_bidirectional_layer_written_in_numpy_agrees_at_every_hook(case_id: str) -> None:
    truth = values(case_id)
    for name, expected in by_hand(case_id, np.ones((6, 6), bool)).items():
        assert relative(truth[name], expected) < 1e-12, name
    causal = by_hand(case_id, np.tril(np.ones((6, 6), bool)))
    assert relative(truth["blocks.0.attn.hook_pattern"], causal["blocks.0.attn.hook_pattern"]) > 0.1


@pytest.mark.parametrize(
    "case_id", [*(f"{name}/hub" for name in BIDIRECTIONAL), "Dream/window-ignored", "a2d-qwen3/v5"]
)
def test_a_model_type_that_transformers_lacks_is_its_own_class_with_a_mask_of_zeros(case_id: str) -> None:
    """dllm gives its classes a mask [B, 1, T, T] of zeros in every layer, also in one with a window."""
    subject = real(case_id).subject
    given = json.loads((subject.model_dir / "config.json").read_text())
    kind = BIDIRECTIONAL[given["model_type"]]
    config = transformers.CONFIG_MAPPING[kind].from_dict(given | {"model_type": kind})
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, subject.model_dir, dtype=torch.float64)
    tokens, width = torch.tensor(subject.tokens), len(subject.tokens[0])
    with torch.no_grad():
        mask = torch.zeros(1, 1, width, width, dtype=torch.float64)
        masked = load(config=config, attn_implementation="eager")(tokens, attention_mask=mask).logits
        ours = load(config=load_config(subject.model_dir), attn_implementation="eager")(tokens).logits
        causal = load(config=config, attn_implementation="eager")(tokens).logits
    assert torch.equal(ours, masked) and not torch.allclose(ours, causal, rtol=0.1)
    # Its rotary table and norms are of float32, which the oracle's are not.
    assert relative(values(case_id)["logits"], masked.numpy()) < 1e-5


@pytest.mark.every(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_causal_false_is_a_mask_of_zeros_and_a_window_on_both_sides(family: str) -> None:
    tensors = real(f"{family}/bidirectional").truth.tensors
    pattern = tensors["blocks.0.attn.hook_pattern"]
    assert pattern.allowed is not None and pattern.allowed.all() and (pattern.value > 0).all()
    if "sliding_window" not in json.loads((FIXTURES / "models" / f"{family}.json").read_text()):
        return
    # 4 keys on either side, where a causal window of 4 has the query and 3 before it.
    near = np.abs(np.arange(10)[:, None] - np.arange(10)) <= 4
    tensors = real(f"{family}/bidirectional-window").truth.tensors
    windows = [tensor.allowed for name, tensor in tensors.items() if name.endswith("hook_pattern")]
    expected = {"gemma2": [near, near | True], "qwen2": [near | True, near], "qwen3": [near | True, near]}
    for allowed, mask in zip(windows, expected.get(family, [near]), strict=True):
        np.testing.assert_array_equal(allowed, mask)


def test_use_bidirectional_attention_on_which_transformers_disagrees_with_itself_is_refused(tmp_path: Path) -> None:
    directory = changed_model(
        tmp_path / "gemma", real("gemma/hub").subject.model_dir, use_bidirectional_attention=True
    )
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, directory, dtype=torch.float64)
    with torch.no_grad():
        eager, sdpa = (load(attn_implementation=kind)(torch.arange(8)[None]).logits for kind in ("eager", "sdpa"))
    assert not torch.allclose(eager, sdpa, rtol=0.01), "transformers agrees with itself: the key has a truth now"
    with pytest.raises(ModelError, match="no one truth"):
        load_model(directory)


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


def test_gemma_scales_its_embedding_before_the_hook() -> None:
    subject = real("gemma/hub").subject
    table = load_file(subject.model_dir / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)
    rows = table[np.array(subject.tokens)]
    assert relative(values("gemma/hub")["hook_embed"], rows * np.sqrt(64)) < 1e-12


# --- float64 everywhere, reproducible to the bit, and cached without loss -------------------------


HEAD_DIM, THETA = 20, 500000.0
PLAIN = THETA ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
SHORT, LONG = [1.0 + 0.1 * i for i in range(10)], [2.0 + 0.3 * i for i in range(10)]


def llama3(plain: np.ndarray) -> np.ndarray:
    """Factor 32 below the low frequency of a context of 64, none above the high one, a blend between."""
    turns = 64 / (2 * math.pi / plain)
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    return np.asarray((1 - smooth) * plain / 32 + smooth * plain)


ORIGINAL = {"original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 3.0, **ORIGINAL},
    "longrope": {"short_factor": SHORT, "long_factor": LONG, "factor": 3.0, **ORIGINAL},
    "llama3": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "proportional": {},
}
EXPECTED = {
    **dict.fromkeys(("default", "dynamic", "proportional"), PLAIN),
    "linear": PLAIN / 3,
    "longrope": PLAIN / SHORT,
    "llama3": llama3(PLAIN),
}


def llama_dir() -> Path:
    return real("llama/hub").subject.model_dir


@pytest.mark.parametrize("kind", sorted({"default", *ROPE_INIT_FUNCTIONS}))
def test_parameters_rotary_tables_and_results_are_float64(kind: str, tmp_path: Path) -> None:
    """A rope type that is new in transformers must be entered in ROPES."""
    parameters = {"rope_type": kind, "rope_theta": THETA, **ROPES[kind]}
    bare = changed_model(tmp_path / "bare", llama_dir(), rope_theta=None, rope_scaling=None)
    directory = changed_model(tmp_path / kind, bare, rope_parameters=parameters)
    model = load_model(directory)
    buffers = dict(model.named_buffers())
    narrow = {
        name: value.dtype
        for name, value in [*model.named_parameters(), *buffers.items()]
        if value.is_floating_point() and value.dtype != torch.float64
    }
    assert not narrow
    assert {value.dtype for value in captured(model, [[1, 5, 9]]).tensors.values()} == {torch.float64}
    found = buffers["model.rotary_emb.inv_freq"].numpy()
    assert (found != found.astype(np.float32)).sum() >= 8, f"inv_freq was rounded to float32: {found}"
    if kind in EXPECTED:
        np.testing.assert_allclose(found, EXPECTED[kind], rtol=2e-15)
    control = dict(load_model(directory, torch.float32).named_buffers())
    assert control["model.rotary_emb.inv_freq"].dtype == torch.float32


def test_the_seed_determines_the_noise_and_not_the_values() -> None:
    model, tokens = real("llama/hub").oracle.computation.model, torch.tensor([[1, 5, 9]])

    def run(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return sample(model, tokens, seed, lambda captured: {}, {})[1:]

    (value, noise), (value_2, noise_2), (value_3, noise_3) = run(1), run(1), run(2)
    assert all(torch.equal(value[name], value_2[name]) and torch.equal(value[name], value_3[name]) for name in value)
    assert all(torch.equal(noise[name], noise_2[name]) for name in noise)
    assert not torch.equal(noise["logits"], noise_3["logits"])


def test_a_truth_computed_again_is_the_cached_one_bit_for_bit(tmp_path: Path) -> None:
    """Both are made here: a cache may come from a machine whose processor adds up in another order."""
    subject = real("gemma2/hub").subject
    again, cached = (Oracle(subject, tmp_path / name).truth() for name in ("again", "cached"))
    assert list(again.tensors) == list(cached.tensors)
    for name, tensor in again.tensors.items():
        np.testing.assert_array_equal(tensor.value, cached.tensors[name].value, err_msg=name)
        np.testing.assert_array_equal(tensor.noise, cached.tensors[name].noise, err_msg=name)
    assert again.scalars == cached.scalars and again.meta == cached.meta


def test_the_teacher_forced_truth_differs_by_the_rounding_of_its_inputs() -> None:
    there = real("llama/hub", "forced")
    free, tensors, given = real("llama/hub").truth.tensors, there.truth.tensors, load_file(there.inputs)
    assert len(given) == 6 and not any(name.endswith("hook_resid_pre") for name in tensors)
    for name, array in given.items():
        error = np.abs(array - free[name].value)
        assert array.dtype == np.float32 and (error <= 2.0**-16 * np.abs(free[name].value)).all(), name
    errors = {name: relative(tensor.value, free[name].value) for name, tensor in tensors.items()}
    assert max(errors.values()) < 2.0**-14
    assert sum(error > 0 for error in errors.values()) > 30, "nothing was replaced"


def test_each_teacher_forced_half_layer_starts_from_its_input() -> None:
    there = real("llama/hub", "forced")
    given, tensors = load_file(there.inputs), there.truth.tensors
    for layer in range(3):
        at = f"blocks.{layer}.hook_"
        for start, added, end in (("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post")):
            expected = given[at + start].astype(np.float64) + tensors[at + added].value
            np.testing.assert_allclose(tensors[at + end].value, expected, rtol=0, atol=1e-14, err_msg=at + end)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fires_the_38_hooks_and_logits_in_execution_order(family: str) -> None:
    there = real(f"{family}/hub")
    names = [name for name in there.truth.tensors if not name.startswith(("sae", "lens"))]
    assert names == [*hook_names(3), "logits"] and len(names) == 39
    # The order in which modules were called, without q, k and v, which have no order among them.
    fired = list(captured(load_model(there.subject.model_dir), there.subject.tokens).tensors)
    order = [name for name in hook_names(3) if not name.endswith(("hook_q", "hook_k", "hook_v"))]
    assert [name for name in fired if name in order] == order
    for name, tensor in there.truth.tensors.items():
        assert tensor.noise.shape == tensor.value.shape and np.isfinite(tensor.noise).all(), name


def captured(model: nn.Module, tokens: list[list[int]]) -> Recorder:
    with Truth64(MatmulScales()), torch.no_grad():
        return forward(model, torch.tensor(tokens))


def test_a_family_without_model_code_and_attention_without_a_mask_are_refused() -> None:
    for model_type in ("no_such_family", "byt5"):  # byt5 is a tokenizer only
        with pytest.raises(OracleError, match=f"no source file of model_type '{model_type}'"):
            modeling_files(model_type)
    one = torch.zeros(1, 1, 1, 4)
    with pytest.raises(OracleError, match="no attention mask"):
        attention(nn.Identity(), one, one, one, None, 0.5)
