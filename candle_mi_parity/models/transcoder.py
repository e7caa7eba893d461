"""The files of a generated transcoder, in the layouts that circuit-tracer reads and writes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.spec.transcoder import GeneratedTranscoder
from candle_mi_parity.trace.formats import round_to_dtype

SCOPE = "google/gemma-scope-2b-pt-transcoders"
"""The repository of Gemma Scope's weights, which circuit-tracer and candle-mi know by name."""
LAYOUT = 1
"""Version of the files; raise it when others are written for the same data."""
Weights = dict[str, np.ndarray]


def transcoder_path(spec: GeneratedTranscoder, layers: int, width: int, cache: Path) -> Path:
    """The directory of a transcoder for a model, written on first use.

    :param layers: number of the model's layers.
    :param width: the model's hidden size.
    """
    key = content_key("transcoder", LAYOUT, spec.model_dump(), layers, width)
    return publish(cache / "transcoders" / key, lambda out: write_transcoder(spec, layers, width, out))


def transcoder_weights(spec: GeneratedTranscoder, layers: int, width: int) -> list[Weights]:
    """The weights of each layer, float32 with values of the files' dtype.

    ``W_enc`` [F, d], ``b_enc`` [F], ``W_dec`` [F, targets, d], ``b_dec`` [d], and if there are any ``threshold`` [F]
    and ``W_skip`` [d, d].
    """
    draw = np.random.Generator(np.random.PCG64(spec.seed)).standard_normal
    found = []
    for layer in range(layers):
        arrays = {"W_enc": draw((spec.features, width)), "b_enc": draw(spec.features)}
        if spec.identity:
            arrays = {"W_enc": np.eye(spec.features, width), "b_enc": np.zeros(spec.features)}
        arrays["W_dec"] = draw((spec.features, spec.targets(layer, layers), width))
        arrays["W_dec"][spec.dead] = 0
        arrays["b_dec"] = draw(width)
        if spec.threshold:
            arrays["threshold"] = np.asarray(spec.threshold)
        if spec.skip:
            arrays["W_skip"] = draw((width, width))
        singles = {name: array.astype(np.float32) for name, array in arrays.items()}
        if spec.dtype != "float32":
            singles = {name: round_to_dtype(array, spec.dtype) for name, array in singles.items()}
        found.append(singles)
    return found


def write_transcoder(spec: GeneratedTranscoder, layers: int, width: int, out: Path) -> None:
    """Write ``config.yaml`` and the weights of each layer."""
    lines = ['model_name: "generated"', 'feature_output_hook: "hook_mlp_out"']
    lines.append(
        f'feature_input_hook: "{"ln2.hook_normalized" if spec.layout == "gemma-scope" else "hook_resid_mid"}"'
    )
    lines.append(f'model_kind: "{"cross_layer_transcoder" if spec.crosses else "transcoder_set"}"')
    all_weights = transcoder_weights(spec, layers, width)
    if spec.layout == "gemma-scope":
        names = [f"layer_{layer}/width_16k/average_l0_{70 + layer}/params.npz" for layer in range(layers)]
        lines += ["transcoders:", *(f'  - "hf://{SCOPE}/{name}"' for name in names)]
        (out / "features").mkdir(parents=True)
        for layer, (name, weights) in enumerate(zip(names, all_weights, strict=True)):
            (out / "features" / f"layer_{layer}.bin").write_bytes(b"")
            (out / SCOPE / name).parent.mkdir(parents=True)
            own = {"W_enc": np.ascontiguousarray(weights["W_enc"].T), "W_dec": weights["W_dec"][:, 0]}
            arrays: dict[str, Any] = weights | own
            np.savez(out / SCOPE / name, **arrays)
    else:
        out.mkdir(exist_ok=True)
        for layer, weights in enumerate(all_weights):
            _write_layer(spec, layer, weights, out)
    if spec.layout == "clt-index":
        (out / "features").mkdir()
        (out / "features" / "index.json.gz").write_bytes(gzip.compress(b"{}", mtime=0))
    (out / "config.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_layer(spec: GeneratedTranscoder, layer: int, weights: Weights, out: Path) -> None:
    import torch
    from safetensors.torch import save_file  # numpy has no bfloat16

    dtype: torch.dtype = getattr(torch, spec.dtype)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(dtype) for name, array in weights.items()}
    if spec.crosses:
        decoder = tensors.pop("W_dec")
        save_file({f"W_dec_{layer}": decoder}, out / f"W_dec_{layer}.safetensors")
        save_file({f"{name}_{layer}": array for name, array in tensors.items()}, out / f"W_enc_{layer}.safetensors")
        return
    tensors["W_dec"] = tensors["W_dec"][:, 0].contiguous()
    if "threshold" in tensors:
        tensors["activation_function.threshold"] = tensors.pop("threshold")
    save_file(tensors, out / f"layer_{layer}.safetensors")
