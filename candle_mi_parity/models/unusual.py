"""Generated weights with unusual statistics, and files with an unusual layout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from candle_mi_parity.errors import ModelError
from candle_mi_parity.spec.cases import Layout, Statistic
from candle_mi_parity.spec.paths import FIXTURES

Arrays = dict[str, np.ndarray]
_FORMATS = (Layout.FLOAT16, Layout.BFLOAT16, Layout.FLOAT64)


def _twins(array: np.ndarray) -> np.ndarray:
    """Every second row as the row before it."""
    return np.repeat(array[::2], 2, axis=0)[: len(array)]


def _of_norm(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, int], np.ndarray]:
    """A change of a norm's effective weights, ``offset + weight``, on the stored ones."""
    return lambda array, offset: change(array + offset) - offset


def _every_second(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.where(np.arange(array.size) % 2, factor * np.abs(array), array)


_EMBEDDINGS = ("embed_tokens.weight", "embeddings.weight")
_DECAYS = (".time_decay", ".w_lora.lora.2.bias")
_QUERIES = ("q_proj.weight", "qkv_proj.weight", ".attn.r_proj.weight", ".attention.receptance.weight")
_MLP = (
    *("gate_proj.weight", "up_proj.weight", "gate_up_proj.weight", "c_fc.weight"),
    *(".ffn.key.weight", ".feed_forward.key.weight"),
)
_HEADS = ("lm_head.weight", "head.weight")
_NORMS = ("norm.weight", ".ln1.weight", ".ln2.weight", ".ln_x.weight", ".ln_out.weight", ".pre_ln.weight")
_VECTORS = re.compile(r"\.(x_[rwkvag]|k_[ka]|r_k|time_(maa_[xwkvrg]|decay|faaaa))$")
"""The parameters of RWKV's time mixing that are no matrices."""
_REMOVED = (".k_k", ".attention.key.weight")
_NOT_MATRICES = (*_NORMS, ".bias", *_EMBEDDINGS)


def _is_matrix(name: str) -> bool:
    return not (name.endswith(_NOT_MATRICES) or _VECTORS.search(name))


_RULES: dict[Statistic, tuple[Callable[[str], bool], Callable[[np.ndarray, int], np.ndarray]]] = {
    Statistic.EMBEDDING_MEAN: (lambda name: name.endswith(_EMBEDDINGS), lambda array, _: array + 4),
    Statistic.EMBEDDING_TINY: (lambda name: name.endswith(_EMBEDDINGS), lambda array, _: array / 1024),
    Statistic.EMBEDDING_HUGE: (lambda name: name.endswith(_EMBEDDINGS), lambda array, _: array * 1024),
    Statistic.EMBEDDING_EQUAL: (lambda name: name.endswith(_EMBEDDINGS), lambda array, _: _twins(array)),
    Statistic.HEAD_EQUAL: (lambda name: name in _HEADS, lambda array, _: _twins(array)),
    Statistic.NORM_ZERO: (lambda name: name.endswith(_NORMS), _of_norm(_every_second(0))),
    Statistic.NORM_NEGATIVE: (lambda name: name.endswith(_NORMS), _of_norm(_every_second(-1))),
    Statistic.NORM_LARGE: (lambda name: name.endswith(_NORMS), _of_norm(lambda array: array * 32)),
    Statistic.BIAS_LARGE: (lambda name: name.endswith(".bias"), lambda array, _: array * 32),
    Statistic.QUERY_LARGE: (lambda name: name.endswith(_QUERIES), lambda array, _: array * 16),
    Statistic.MATRICES_TINY: (_is_matrix, lambda array, _: array / 1024),
    Statistic.MLP_LARGE: (lambda name: name.endswith(_MLP), lambda array, _: array * 16),
    Statistic.DECAY_WEAK: (lambda name: name.endswith(_DECAYS), lambda array, _: array - 6),
    Statistic.DECAY_STRONG: (lambda name: name.endswith(_DECAYS), lambda array, _: array + 2),
    Statistic.DECAY_WHOLE: (lambda name: name.endswith(_DECAYS), lambda array, _: array + 8),
    Statistic.KEY_TINY: (lambda name: name.endswith(_REMOVED), lambda array, _: array / 2**20),
}
"""Statistic → the tensors that it concerns, and the change of an array, given the norm's offset."""


def varied(arrays: Mapping[str, np.ndarray], norm_offset: int, statistics: Sequence[Statistic]) -> Arrays:
    """The weights with the statistics, float32, applied in their order.

    :raises ModelError: a statistic concerns no tensor of the model.
    """
    found = dict(arrays)
    for statistic in statistics:
        concerns, change = _RULES[statistic]
        names = [name for name in found if concerns(name)]
        if not names:
            raise ModelError(f"the model has no tensor that the statistic {statistic} concerns")
        found |= {name: change(found[name], norm_offset).astype(np.float32) for name in names}
    return found


def write_unusual(arrays: Arrays, layout: Sequence[Layout], shards: int, out: Path) -> None:
    """Write the weights in a layout.

    :raises ModelError: the layout concerns no tensor of the model.
    """
    tensors = dict(arrays)
    if Layout.STORED_HEAD in layout:
        if "lm_head.weight" in tensors:
            raise ModelError("the model's head is not tied: stored-head concerns no tensor")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    if Layout.MISSING_NORM in layout:
        del tensors["model.norm.weight"]
    if Layout.EXTRA_TENSORS in layout:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.full(2, 0.5, np.float32)
        tensors["model.extra.weight"] = np.full((2, 3), 0.5, np.float32)
    if Layout.NO_PREFIX in layout:
        tensors = {name.removeprefix("model."): array for name, array in tensors.items()}
    if Layout.TOKENIZER in layout:
        for path in (FIXTURES / "tokenizer").iterdir():
            shutil.copyfile(path, out / path.name)
    names = sorted(tensors)
    stem, ending = ("pytorch_model", "bin") if Layout.PICKLE in layout else ("model", "safetensors")
    files = {f"{stem}.{ending}": names}
    if shards > 1:
        files = {f"{stem}-{i + 1:05}-of-{shards:05}.{ending}": names[i::shards] for i in range(shards)}
        weight_map = {name: file for file, held in files.items() for name in held}
        index = {"metadata": {"total_size": sum(map(np.size, tensors.values()))}, "weight_map": weight_map}
        (out / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, held in files.items():
        _save({name: tensors[name] for name in held}, layout, out / file)
    if Layout.SHARDS_BESIDE in layout:
        if shards > 1 or "model.norm.weight" not in tensors:
            raise ModelError("shards-beside is of one file with a final norm")
        shard = f"{stem}-00001-of-00001.{ending}"
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (out / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        other = {"model.norm.weight": np.ones_like(tensors["model.norm.weight"])}
        _save(tensors | other, layout, out / shard)


def _save(arrays: Arrays, layout: Sequence[Layout], path: Path) -> None:
    import torch
    from safetensors.torch import save_file  # numpy has no bfloat16

    dtype: torch.dtype = getattr(torch, next((one for one in layout if one in _FORMATS), "float32"))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(dtype) for name, array in arrays.items()}
    if Layout.PICKLE in layout:
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})
