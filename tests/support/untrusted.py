"""Small valid files of the untrusted kinds, and how a reader must refuse a damaged one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from candle_mi_parity.errors import ParityError
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.spec.cases import Case, LocalModel
from tests.support.planting import CASES, real

CFG: dict[str, Any] = {
    "d_in": 4, "d_sae": 6, "dtype": "float32", "architecture": "jumprelu", "activation_fn_str": "relu",
    "activation_fn_kwargs": {"k": 3}, "apply_b_dec_to_input": True, "normalize_activations": "none",
    "sae_lens_version": "5.10.0", "hook_name": "blocks.1.hook_resid_post", "metadata": {"sae_lens_version": "6.1.0"},
}  # fmt: skip
"""``cfg.json`` of a SAELens directory."""

REFERENCE: dict[str, Any] = {
    "model_id": "google/gemma-2-2b", "prompt": "The capital of France is", "hook_layer": 12,
    "hook_name": "blocks.12.hook_resid_post", "sae_repo": "google/gemma-scope-2b-pt-res",
    "sae_npz_path": "layer_12/width_16k/average_l0_82/params.npz", "d_in": 2304, "d_sae": 16384,
    "architecture": "JumpReLU", "tokens": ["<bos>", "The"], "n_tokens": 2, "reconstruction_mse": 0.5,
    "n_active_last_pos": 2, "top_features_last_pos": [{"index": 3, "value": 1.5}, {"index": 5, "value": 0.5}],
    "resid_last_first10": [0.5] * 10, "encoded_last_first10": [0.0] * 10, "decoded_last_first10": [0.25] * 10,
    "resid_last_norm": 1.0, "encoded_last_norm": 1.0, "decoded_last_norm": 1.0,
}  # fmt: skip
"""A flat JSON of ``sae_validation.py``."""


def refused(read: Callable[[], object]) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(ParityError) as caught:
        read()
    message = str(caught.value)
    assert message and "\n" not in message and message.isprintable() and len(message) < 1500
    return message


def sae_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (4, 6), "W_dec": (6, 4), "b_enc": (6,), "b_dec": (4,), "threshold": (6,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def saelens(directory: Path) -> Path:
    """A SAELens directory."""
    directory.mkdir(exist_ok=True)
    (directory / "cfg.json").write_text(json.dumps(CFG))
    save_file(sae_arrays(), directory / "sae_weights.safetensors")
    return directory


def model(directory: Path, **change: object) -> Case:
    """A case of a copy of the tiny Llama whose config is changed; None takes a key away."""
    source = real("llama/hub").subject.model_dir
    directory.mkdir()
    config = {key: value for key, value in (read_config(source) | change).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "model.safetensors", directory)
    return CASES["llama/hub"].model_copy(update={"model": LocalModel(source="local", path=str(directory))})
