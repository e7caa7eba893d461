"""Generated models packed as AutoAWQ and GPTQModel store them, from the formats' definitions.

The quantisation rounds to the nearest; only the layout of the files matters here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.generate import bit_stream
from candle_mi_parity.spec.cases import PackedModel

PACKER = 3
"""Part of the key of cached models; raise it when the packed weights change."""
COLUMNS_OF_A_WORD = (0, 2, 4, 6, 1, 3, 5, 7)
"""Place in a 32-bit word → column among eight (``AWQ_ORDER`` of AutoAWQ)."""
Tensors = dict[str, np.ndarray]


def packed_model(model: PackedModel, plain: Path, cache: Path) -> Path:
    """The directory of a packed model, made on first use.

    :param plain: the directory of the generated model; it has one file of weights.
    """
    key = content_key("packed", PACKER, plain.name, model.model_dump(exclude={"plain"}))
    return publish(cache / "models" / key, partial(_pack, model, plain))


def quantization_config(model: PackedModel) -> dict[str, object]:
    """``quantization_config`` as the library writes it."""
    common = {"bits": model.bits, "group_size": model.group_size, "quant_method": model.quant_method}
    if model.quant_method == "awq":
        return common | {"version": "gemm", "zero_point": True, "modules_to_not_convert": model.skip or None}
    return common | {
        "desc_act": model.act_order,
        "sym": model.zeros == "symmetric",
        "checkpoint_format": model.checkpoint_format,
        "lm_head": model.head,
    }


def _pack(model: PackedModel, plain: Path, out: Path) -> None:
    tensors: Tensors = {}
    for name, array in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if (module.endswith("_proj") and module not in model.skip) or (module == "lm_head" and model.head):
            tensors |= packed(name.removesuffix(".weight"), array, model)
        else:  # in the libraries, too, these are in the model's format
            tensors[name] = array.astype(np.float16)
    header = {"format": "pt"}
    if model.metadata:
        header |= {"gptq_bits": str(model.bits), "gptq_group_size": str(model.group_size)}
    _save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, header, model.shards, out)
    config = read_config(plain) | {"quantization_config": quantization_config(model)}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save(tensors: Tensors, header: dict[str, str], shards: int, out: Path) -> None:
    names = list(tensors)
    files = {"model.safetensors": names}
    if shards > 1:
        files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, held in files.items():
        (out / file).write_bytes(_with_metadata(save({name: tensors[name] for name in held}), header))


def _with_metadata(file: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with metadata in the given order; safetensors takes any, another each time."""
    size = int.from_bytes(file[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(file[8 : 8 + size]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + size :]


def packed(base: str, weight: np.ndarray, model: PackedModel) -> Tensors:
    """The tensors of one weight [out, in].

    :param base: the weight's name without ``.weight``.
    """
    codes, zeros, scales, groups = quantized(base, weight, model)
    most = np.uint32((1 << model.bits) - 1)
    if model.quant_method == "awq":
        order = [8 * word + column for word in range(len(weight) // 8) for column in COLUMNS_OF_A_WORD]
        stored = {"qweight": _words(codes[:, order], 4), "qzeros": _words(zeros[:, order], 4)}
    else:
        less = (zeros - (model.checkpoint_format == "gptq")) & most  # of 0, the largest number
        stored = {"qweight": _words(codes.T, model.bits).T, "qzeros": _words(less, model.bits)}
        stored["g_idx"] = groups.astype(np.int32)
    return {f"{base}.{name}": array for name, array in (stored | {"scales": scales}).items()}


def quantized(base: str, weight: np.ndarray, model: PackedModel) -> tuple[np.ndarray, ...]:
    """Codes [in, out], zero points and scales [groups, out], and the group of each input: w ≈ (code − zero) · scale.

    Codes and zero points are uint32 below 2^bits, scales float16.
    """
    inputs, most = weight.shape[1], (1 << model.bits) - 1
    size = inputs if model.group_size == -1 else model.group_size
    groups = np.arange(inputs) // size
    if model.act_order:  # the inputs of a group lie anywhere
        groups = groups[np.argsort(bit_stream(f"act-order:{base}").random_raw(inputs), kind="stable")]
    each: Callable[[np.ufunc], np.ndarray] = lambda reduce: np.stack(  # noqa: E731
        [reduce.reduce(weight[:, groups == group], axis=1) for group in range(groups.max() + 1)]
    )
    low, high = np.minimum(each(np.minimum), 0), np.maximum(each(np.maximum), 0)
    scales = ((high - low) / most).astype(np.float16)
    zeros = np.round(-low / scales)
    if model.zeros == "symmetric":
        scales = (2 * np.maximum(high, -low) / most).astype(np.float16)
        zeros = np.full_like(low, (most + 1) // 2)
    elif model.zeros == "ends":  # a 0 in the highest field of a word, where all readers of version 1 agree
        zeros = np.where(np.arange(len(weight)) % (32 // model.bits) == 32 // model.bits - 1, 0, most) + 0 * low
    zeros = np.clip(zeros, 0, most)
    codes = np.clip(np.round(weight.T / scales[groups].astype(np.float32)) + zeros[groups], 0, most)
    return codes.astype(np.uint32), zeros.astype(np.uint32), scales, groups


def _words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Rows of unsigned fields → 32-bit words, the first field lowest, int32."""
    parts = fields.reshape(len(fields), -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)
    words: np.ndarray = np.bitwise_or.reduce(parts, axis=-1).astype(np.uint32)
    return words.view(np.int32)
