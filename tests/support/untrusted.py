"""Small valid files of the untrusted kinds, random damage to them, and how a reader must refuse a damaged one."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save_file

from candle_mi_parity.errors import ParityError

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


ODD: list[Any] = [
    None, True, -1, 0, 2**63, 10**400, float("nan"), float("inf"), 1e300, "", "\x1b[2J", "../x", "/dev/zero",
    "\ud800", "a" * 5000, [], {}, [None], [2**62] * 9,
]  # fmt: skip
json_values = st.recursive(
    st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [(*path, key) for key in keys] + [found for key in keys for found in places(tree[key], (*path, key))]


@st.composite
def damaged_tree(draw: st.DrawFn, tree: Any) -> bytes:
    """A JSON document in which one value is replaced or removed."""
    changed = copy.deepcopy(tree)
    *way, last = draw(st.sampled_from(places(tree)))
    holder = functools.reduce(lambda found, key: found[key], way, changed)
    if draw(st.booleans()):
        holder[last] = draw(json_values)
    else:
        del holder[last]
    return json.dumps(changed).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file in which some bytes are replaced, removed or added."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 64)))
    return content[:start] + draw(st.binary(max_size=64)) + content[end:]
