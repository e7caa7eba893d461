"""Proof that it can fail: one mistake in a copy of a real trace, caught at the tensor where it was planted.

The twin without the mistake passes in the same way, so that nothing but the mistake is what was caught. A fault in
the model is planted in transformers' float32 run, which then goes on to the logits as it would in candle-mi.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from candle_mi_parity.cases import RandomTokens
from candle_mi_parity.verdict import Status
from proof.planting import Arrays, Real, changed_model, failures, first, judge, planted, real, real_of, rerun, write

Fault = Callable[[Arrays], None]


def at(name: str, change: Callable[[np.ndarray], object]) -> Fault:
    """Change one tensor: in place, or by what ``change`` returns."""

    def plant(arrays: Arrays) -> None:
        changed = change(arrays[name])
        if isinstance(changed, np.ndarray):
            arrays[name] = changed

    return plant


def swap(*names: str) -> Fault:
    def plant(arrays: Arrays) -> None:
        one, other = names
        arrays[one], arrays[other] = arrays[other], arrays[one]

    return plant


def half_values(arrays: Arrays) -> None:
    for name, array in arrays.items():
        arrays[name] = array.astype(np.float16).astype(np.float32)


def half_dtype(arrays: Arrays) -> None:
    for name, array in arrays.items():
        arrays[name] = array.astype(np.float16)


def one_layer_off(arrays: Arrays) -> None:
    """Layer i's tensors under the name of layer i + 1."""
    for layer in (2, 1):
        for name in [name for name in arrays if name.startswith(f"blocks.{layer}.")]:
            arrays[name] = arrays[name.replace(f"blocks.{layer}.", f"blocks.{layer - 1}.")]


def naive_hidden_states(arrays: Arrays) -> None:
    """``hidden_states[L + 1]`` as layer L's output: after the final norm for the last layer."""
    arrays["blocks.2.hook_resid_post"] = arrays["hook_final_norm"]


def put(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(index, value)


def scaled(index: tuple[int, ...], factor: float) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(index, array[index] * factor)


Q1, POST = "blocks.1.attn.hook_q", "blocks.1.mlp.hook_post"
FAULTS: dict[str, tuple[Fault, str, str]] = {
    "one NaN": (at(POST, put((0, 5, 7), np.nan)), POST, "nonfinite"),
    "one infinity": (at(POST, put((0, 5, 7), np.inf)), POST, "nonfinite"),
    "NaN in the logits": (at("logits", put((0, 23, 210), np.nan)), "logits", "nonfinite"),
    "NaN at a masked score": (at("blocks.0.attn.hook_scores", put((0, 0, 0, 9), np.nan)),
                              "blocks.0.attn.hook_scores", "nonfinite"),
    "a tensor is missing": (lambda arrays: arrays.pop(POST).fill(0), POST, "missing"),
    "a tensor too many": (lambda arrays: arrays.update(extra=arrays[POST]), "extra", "unexpected"),
    "a tensor misnamed": (lambda a: a.update({"blocks.1.mlp.hook_POST": a.pop(POST)}), POST, "missing"),
    "axes transposed": (at(Q1, lambda x: x.swapaxes(1, 2)), Q1, "shape"),
    "batch axis dropped": (at(POST, lambda x: x[0]), POST, "shape"),
    "one row for all": (at(POST, lambda x: x[:, :1]), POST, "shape"),
    "no element": (at(POST, lambda x: x[:, :0]), POST, "shape"),
    "transposed under the right shape": (at(Q1, lambda x: x.swapaxes(1, 2).reshape(x.shape)), Q1, "values"),
    "two heads swapped": (at(Q1, lambda x: x[:, [1, 0, 2, 3]]), Q1, "values"),
    "two positions swapped": (at(POST, lambda x: x[:, [1, 0, *range(2, 24)]]), POST, "values"),
    "one sign flipped": (at(POST, scaled((0, 11, 3), -1.0)), POST, "values"),
    "one position 1e-5 off": (at(POST, scaled((0, 11), 1 + 1e-5)), POST, "values"),
    "one logit 1 % off": (at("logits", scaled((0, 23, 100), 1.01)), "logits", "values"),
    "a layer scaled by 1 + 1e-5": (at(POST, scaled((0,), 1 + 1e-5)), POST, "values"),
    "two names exchanged": (swap("blocks.0.hook_resid_mid", "blocks.0.hook_resid_pre"),
                                "blocks.0.hook_resid_pre", "values"),
    "the embedding's last bit": (at("hook_embed", lambda x: np.nextafter(x, np.float32(9))), "hook_embed", "values"),
    "rounded to float16": (half_values, "hook_embed", "values"),
    "float16": (half_dtype, "hook_embed", "dtype"),
    "float64": (at(POST, lambda x: x.astype(np.float64)), POST, "dtype"),
    "captured one layer off": (one_layer_off, "blocks.1.hook_resid_pre", "values"),
    "hidden_states as resid_post": (naive_hidden_states, "blocks.2.hook_resid_post", "values"),
    "embedding as layer 0's output": (lambda a: a.update({"blocks.0.hook_resid_post": a["hook_embed"]}),
                                      "blocks.0.hook_resid_post", "values"),
    "attn_out holds resid_mid": (lambda a: a.update({"blocks.0.hook_attn_out": a["blocks.0.hook_resid_mid"]}),
                                 "blocks.0.hook_attn_out", "values"),
    "mlp_out holds resid_post": (lambda a: a.update({"blocks.0.hook_mlp_out": a["blocks.0.hook_resid_post"]}),
                                 "blocks.0.hook_mlp_out", "values"),
    "attention to the future": (at("blocks.1.attn.hook_pattern", put((0, 2, 4, 5), 1e-30)),
                                "blocks.1.attn.hook_pattern", "masked"),
    "a zeroed tensor": (at(POST, lambda x: np.zeros_like(x)), POST, "values"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_numbers_is_caught_where_it_was_planted(tmp_path: Path, name: str) -> None:
    plant, where, reason = FAULTS[name]
    there = real("llama/hub")
    arrays = there.arrays
    plant(arrays)
    found = first(judge(there, write(tmp_path / "planted", there, arrays)))
    assert (found.name, found.reason) == (where, reason), f"{name}: {found.message()}"
    assert not failures(judge(there, write(tmp_path / "twin", there))), "the twin fails as well"


@pytest.mark.parametrize(
    "name", ["hidden_states as resid_post", "attn_out holds resid_mid", "two heads swapped", "one sign flipped"]
)
def test_a_fault_in_one_capture_accuses_no_other_tensor(tmp_path: Path, name: str) -> None:
    plant, where, _ = FAULTS[name]
    there = real("llama/hub")
    arrays = there.arrays
    plant(arrays)
    assert failures(judge(there, write(tmp_path, there, arrays))) == [where]


MODELS: dict[str, tuple[str, dict[str, object], str]] = {
    "rms_norm_eps × 10": ("llama/hub", {"rms_norm_eps": 1e-4}, "blocks.0.attn.hook_q"),
    "rope theta + 0.1 %": ("llama/hub", {"rope_theta": 500500.0}, "blocks.0.attn.hook_scores"),
    "rope theta at its default": ("llama/hub", {"rope_theta": None}, "blocks.0.attn.hook_scores"),
    "erf in place of tanh": ("gemma2/hub", {"hidden_activation": "gelu"}, "blocks.0.mlp.hook_post"),
    "silu in place of gelu": ("gemma2/hub", {"hidden_activation": "silu"}, "blocks.0.mlp.hook_post"),
    "eps × 10, Gemma 2": ("gemma2/hub", {"rms_norm_eps": 1e-5}, "blocks.0.attn.hook_q"),
    "softcap 49": ("gemma2/hub", {"attn_logit_softcapping": 49.0}, "blocks.0.attn.hook_pattern"),
    "no softcap": ("gemma2/hub", {"attn_logit_softcapping": 1e6}, "blocks.0.attn.hook_pattern"),
    "no final softcap": ("gemma2/hub", {"final_logit_softcapping": 1e6}, "logits"),
    "another scale": ("gemma2/hub", {"query_pre_attn_scalar": 20}, "blocks.0.attn.hook_scores"),
    "window 7 for 8": ("mistral/window", {"sliding_window": 7}, "blocks.0.attn.hook_pattern"),
    "no window": ("qwen2/window", {"use_sliding_window": False}, "blocks.1.attn.hook_pattern"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_fault_in_the_model_is_caught_at_the_first_hook_it_reaches(tmp_path: Path, name: str) -> None:
    case_id, change, where = MODELS[name]
    there = real(case_id)
    base = there.subject.model_dir
    for directory, changes, expected in (("planted", change, [where]), ("twin", {}, [])):
        model = changed_model(tmp_path / directory / "model", base, **changes)
        results = judge(there, write(tmp_path / directory, there, rerun(there, model)))
        assert failures(results)[:1] == expected, f"{name}: {directory}"


def test_a_window_longer_than_the_prompt_changes_nothing(tmp_path: Path) -> None:
    there = real("mistral/hub")
    model = changed_model(tmp_path / "model", there.subject.model_dir, sliding_window=24)
    assert not failures(judge(there, write(tmp_path, there, rerun(there, model)))), "24 positions fit a window of 24"


def square() -> Real:
    """Llama with as many positions as heads, where two axes of q have the same length."""
    case = real("llama/hub").subject.case
    return real_of(case.model_copy(update={"tokens": RandomTokens(random=4)}))


def test_equal_axes_swapped_are_caught_by_their_values(tmp_path: Path) -> None:
    there, name = square(), "blocks.0.attn.hook_q"
    found = there.arrays[name]
    assert found.shape == (1, 4, 4, 20)
    results = planted(tmp_path / "planted", there, **{name: np.ascontiguousarray(found.swapaxes(1, 2))})
    assert (first(results).name, first(results).reason) == (name, "values")
    assert not failures(planted(tmp_path / "twin", there))


def test_two_axes_of_equal_length_swapped_are_caught_by_their_values(tmp_path: Path) -> None:
    there, name = real("llama/hub"), "blocks.0.attn.hook_scores"
    found = there.arrays[name]
    assert found.shape == (1, 4, 24, 24)
    results = planted(tmp_path, there, **{name: np.ascontiguousarray(found.swapaxes(2, 3))})
    assert (first(results).name, first(results).reason) == (name, "values")


def test_a_forced_run_leaves_a_fault_in_its_own_half_layer(tmp_path: Path) -> None:
    there = real("llama/hub", "forced")
    assert not failures(judge(there, write(tmp_path / "twin", there)))
    model = changed_model(tmp_path / "model", there.subject.model_dir, rope_theta=500500.0)
    failed = failures(judge(there, write(tmp_path / "planted", there, rerun(there, model))))
    scores, rest = "attn.hook_scores", {"attn.hook_pattern", "hook_attn_out", "hook_resid_mid"}
    assert [name for name in failed if name.endswith(scores)] == [f"blocks.{i}.{scores}" for i in range(3)]
    own = {name.partition(".")[2].partition(".")[2] for name in failed if name.startswith("blocks.")}
    assert own <= {scores} | rest, "a fault in attention was carried into the MLP or the next layer"


def test_every_result_of_the_twin_is_a_pass_with_room_to_spare(tmp_path: Path) -> None:
    results = judge(real("gemma2/hub"), write(tmp_path, real("gemma2/hub")))
    assert {result.status for result in results} == {Status.PASS}
    assert max(result.position_ratio for result in results) < 4
    assert max(result.element_ratio for result in results) < 16
