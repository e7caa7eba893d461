"""The oracle: float64 everywhere, every hook in its place, reproducible to the bit, and cached without loss."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from candle_mi_parity.errors import OracleError
from candle_mi_parity.oracle.compute import sample
from candle_mi_parity.oracle.hooks import Recorder, attention, forward, load_model
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.rounding import MatmulScales, Truth64
from candle_mi_parity.spec.families import FAMILIES
from candle_mi_parity.spec.hook_points import hook_names
from tests.harness.test_hooks import relative
from tests.support.planting import changed_model, real

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
    there = real("gemma2/hub")
    again = Oracle(there.subject, tmp_path).truth()
    assert list(again.tensors) == list(there.truth.tensors)
    for name, tensor in again.tensors.items():
        np.testing.assert_array_equal(tensor.value, there.truth.tensors[name].value, err_msg=name)
        np.testing.assert_array_equal(tensor.noise, there.truth.tensors[name].noise, err_msg=name)
    assert again.scalars == there.truth.scalars and again.meta == there.truth.meta


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


def test_attention_without_a_mask_is_refused() -> None:
    one = torch.zeros(1, 1, 1, 4)
    with pytest.raises(OracleError, match="no attention mask"):
        attention(nn.Identity(), one, one, one, None, 0.5)
