"""Quantised checkpoints as plain ones, with the weights that their files define.

Each format's own library defines the weights: bitsandbytes computes in float32, in the order that is followed here,
and the products of AutoAWQ and GPTQModel are exact in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.models.checkpoint import StoredTensor, model_digest, read_config, weight_files, weight_tensors
from candle_mi_parity.models.generate import write_safetensors
from candle_mi_parity.spec.counterfactual import Dequantization
from candle_mi_parity.trace.formats import round_to_dtype

DEQUANTIZER = 1
"""Part of the key of cached plain models; raise it when their weights change."""
METHODS = ("bitsandbytes", "awq", "gptq")
"""Values of ``quantization_config.quant_method`` that are read."""
INT8_STEP = np.float32(7.874015718698502e-3)
"""1/127, as bitsandbytes writes it."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column → its place among the eight of a 32-bit word (``AWQ_REVERSE_ORDER`` of AutoAWQ)."""
PLAIN_FORMATS = ("F32", "F16", "BF16")
_COMPANIONS = re.compile(
    r"(.+\.weight)\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4))"
    r"|(.+)\.(?:SCB|weight_format|qzeros|scales|g_idx)"
)

Readings = Sequence[Dequantization]
_State = dict[str, Any]


def quantization_of(directory: Path) -> dict[str, object] | None:
    """``quantization_config`` of a model directory, or None for plain weights.

    :raises ModelError: a method that is not in :data:`METHODS`.
    """
    found = read_config(directory).get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(found, dict) or method not in METHODS:
        raise ModelError(
            f"{directory}/config.json: quantization_config with quant_method {one_line(repr(method))}; the weights "
            f"can be dequantised for {', '.join(METHODS)}"
        )
    return found


def plain_model(directory: Path, cache: Path) -> Path:
    """A directory with the dequantised weights in float32, made on first use; the other files are linked.

    :raises ModelError: see :func:`write_plain`.
    """
    key = content_key("dequantized", DEQUANTIZER, model_digest(directory))
    return publish(cache / "models" / key, partial(write_plain, directory))


def write_plain(directory: Path, out: Path, readings: Readings = ()) -> None:
    """Write a quantised checkpoint as a plain one.

    :param readings: in what the weights are read otherwise, for a counterfactual.
    :raises ModelError: a tensor is missing, has another format or shape than its method stores, or is not known.
    """
    weights = QuantizedWeights(directory, readings)
    plain = [name for name in weights.stored if name not in weights.quantized and not weights.consumed(name)]
    shapes = {name: weights.shape(name) for name in weights.quantized}
    shapes |= {name: weights.stored[name].shape for name in plain}

    def values(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        yield weights.dequantized(name) if name in weights.quantized else weights.plain(name)

    write_safetensors(out / "model.safetensors", shapes, values)
    config = {key: value for key, value in read_config(directory).items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in directory.iterdir():
        if path.is_file() and path.name != "config.json" and ".safetensors" not in path.name:
            (out / path.name).symlink_to(path.resolve())


def quantized_names(directory: Path) -> list[str]:
    """The weights that a checkpoint stores quantised, in the order of the layers."""

    def order(name: str) -> tuple[int, bool, str]:
        layer = re.search(r"\.(\d+)\.", name)
        return int(layer[1]) if layer else 1 << 30, ".mlp." in name, name

    return sorted(QuantizedWeights(directory).quantized, key=order)


class _Format(NamedTuple):
    """How a weight is stored.

    :ivar base: the weight's name without ``.weight``.
    """

    kind: Literal["4bit", "int8", "awq", "gptq"]
    base: str


class QuantizedWeights:
    """The tensors of a quantised checkpoint.

    :param readings: see :func:`write_plain`.
    :ivar stored: every tensor of the files.
    :ivar quantized: name of a weight → how it is stored.
    """

    def __init__(self, directory: Path, readings: Readings = ()) -> None:
        self._directory, self._readings = directory, frozenset(readings)
        self._config = quantization_of(directory) or {}
        self.stored: Mapping[str, StoredTensor] = weight_tensors(directory)
        self._files = {path: TensorFile(path) for path in weight_files(directory)}
        self.quantized = dict(self._found())
        if not self.quantized:
            raise ModelError(f"{directory}: config.json has a quantization_config, and no tensor is quantised")

    def _found(self) -> Iterator[tuple[str, _Format]]:
        method = self._config.get("quant_method")
        for name in self.stored:
            base = name.rpartition(".")[0]
            if method == "bitsandbytes" and f"{name}.quant_map" in self.stored:
                yield name, _Format("4bit", base)
            elif method == "bitsandbytes" and name.endswith(".weight") and f"{base}.SCB" in self.stored:
                yield name, _Format("int8", base)
            elif method == "awq" and name.endswith(".qweight"):
                yield f"{base}.weight", _Format("awq", base)
            elif method == "gptq" and name.endswith(".qweight"):
                yield f"{base}.weight", _Format("gptq", base)

    def consumed(self, name: str) -> bool:
        """Whether a tensor is a part of a quantised weight."""
        if name.endswith(".qweight"):
            return True
        found = _COMPANIONS.fullmatch(name)
        return found is not None and (found[1] or f"{found[2]}.weight") in self.quantized

    def shape(self, name: str) -> tuple[int, ...]:
        """[out, in] of a quantised weight."""
        form = self.quantized[name]
        if form.kind == "4bit":
            rows, columns = self.state(name)["shape"]
            return int(rows), int(columns)
        if form.kind == "int8":
            return self.stored[name].shape
        rows, columns = self._kind(f"{form.base}.qweight", "I32")
        return (columns, rows * self._per_word) if form.kind == "gptq" else (columns * self._per_word, rows)

    def plain(self, name: str) -> np.ndarray:
        """A tensor that is stored as it is, float32."""
        if self._file(name).kind(name)[0] not in PLAIN_FORMATS:
            raise self._odd(name, f"is {self._file(name).kind(name)[0]}, which is no plain weight")
        return self.array(name).astype(np.float32)

    def dequantized(self, name: str) -> np.ndarray:
        """A quantised weight, float32 [out, in]."""
        form = self.quantized[name]
        try:
            read = {"4bit": self._four_bit, "int8": self._int8, "awq": self._awq, "gptq": self._gptq}[form.kind]
            weight = read(name)
        except (ValueError, IndexError, TypeError) as error:
            raise self._odd(name, f"does not fit its scales: {one_line(str(error))}") from error
        if weight.shape != self.shape(name):
            raise self._odd(name, f"has shape {weight.shape}, expected {self.shape(name)}")
        rounded = Dequantization.ROUNDED_TO_BFLOAT16 in self._readings
        return round_to_dtype(weight, "bfloat16") if rounded else weight

    def _four_bit(self, name: str) -> np.ndarray:
        """Blocks of 4-bit codes (QLoRA, 2023), the first of two in the upper half of a byte."""
        state, codes = self.state(name), self._bytes(name)
        values = self.array(f"{name}.quant_map", "F32")[np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)]
        weight: np.ndarray = values * self._largest(name, state)[np.arange(values.size) // int(state["blocksize"])]
        return weight.reshape(state["shape"])

    def _bytes(self, name: str) -> np.ndarray:
        """The bytes of a 4-bit weight, in whichever format they are stored."""
        return np.frombuffer(self._file(name).raw(name), np.uint8)

    def _largest(self, name: str, state: _State) -> np.ndarray:
        """The largest value of each block, float32; with double quantisation, stored as 8-bit codes in blocks."""
        if f"{name}.nested_absmax" not in self.stored:
            return self.array(f"{name}.absmax", "F32")
        codes, scales = self.array(f"{name}.absmax", "U8"), self.array(f"{name}.nested_absmax", "F32")
        size = int(state["nested_blocksize"])
        if Dequantization.NESTED_BLOCKS_EQUAL in self._readings:
            size = -(-len(codes) // len(scales))
        values = self.array(f"{name}.nested_quant_map", "F32")[codes]
        largest: np.ndarray = values * scales[np.arange(len(codes)) // size] + np.float32(state["nested_offset"])
        return largest

    def _int8(self, name: str) -> np.ndarray:
        """One largest value a row (LLM.int8(), 2022)."""
        scale = self.array(f"{self.quantized[name].base}.SCB", "F32").reshape(-1, 1)
        weight: np.ndarray = (self.array(name, "I8").astype(np.float32) * scale) * INT8_STEP
        return weight

    def _awq(self, name: str) -> np.ndarray:
        """(q − zero) · scale, eight columns a word in AutoAWQ's order."""
        base = self.quantized[name].base
        words, zeros = (self._fields(f"{base}.{part}", 4)[..., AWQ_ORDER] for part in ("qweight", "qzeros"))
        codes, zeros = (one.reshape(len(one), -1) for one in (words, zeros))
        return self._scaled(codes, zeros, base, np.arange(len(codes)) // self._group(len(codes)))

    def _gptq(self, name: str) -> np.ndarray:
        """(q − zero) · scale, 32/bits rows a word; version 1 stores the words of the zero points less 1 a field."""
        base, bits = self.quantized[name].base, self.bits
        words = self._fields(f"{base}.qweight", bits)
        codes = words.transpose(0, 2, 1).reshape(-1, words.shape[1])
        stored = self.array(f"{base}.qzeros", "I32").view(np.uint32)
        one_each = np.uint32(sum(1 << place for place in range(0, 32, bits)))
        unpacked = partial(fields, bits=bits)
        if self._config.get("checkpoint_format") == "gptq_v2":
            zeros = unpacked(stored) + (Dequantization.GPTQ_V2_AS_V1 in self._readings)
        elif Dequantization.ZERO_POINTS_NOT_WRAPPED in self._readings:
            zeros = unpacked(stored) + 1
        else:
            zeros = unpacked(stored + one_each)  # as GPTQModel, a carry goes into the next field
        groups = np.arange(len(codes)) // self._group(len(codes))
        if f"{base}.g_idx" in self.stored:
            groups = self.array(f"{base}.g_idx", "I32")
        return self._scaled(codes, zeros.reshape(len(zeros), -1), base, groups)

    def _scaled(self, codes: np.ndarray, zeros: np.ndarray, base: str, groups: np.ndarray) -> np.ndarray:
        """Codes [in, out], zero points [groups, out], the group of each input → float32 [out, in]."""
        scales = self.array(f"{base}.scales").astype(np.float32)
        if zeros.shape != scales.shape or groups.max() + 1 != len(scales):
            raise ValueError(f"{groups.max() + 1} groups, zero points {zeros.shape}, scales {scales.shape}")
        weight: np.ndarray = (codes - zeros[groups]).astype(np.float32) * scales[groups]
        return weight.T

    def _fields(self, name: str, bits: int) -> np.ndarray:
        return fields(self.array(name, "I32").view(np.uint32), bits)

    def header(self) -> dict[str, str]:
        """The metadata of the first file."""
        return next(iter(self._files.values())).metadata()

    @property
    def bits(self) -> int:
        """Bits of a code of AWQ or GPTQ."""
        bits = self._config.get("bits", 4)
        if bits not in ((4,) if self._config.get("quant_method") == "awq" else (4, 8)):
            raise ModelError(f"{self._directory}/config.json: {one_line(repr(bits))} bits cannot be dequantised here")
        return int(str(bits))

    @property
    def _per_word(self) -> int:
        return 32 // self.bits

    def _group(self, inputs: int) -> int:
        size = self._config.get("group_size", 128)
        if not isinstance(size, int) or (size != -1 and size < 1):
            raise ModelError(f"{self._directory}/config.json: group_size is {one_line(repr(size))}")
        return inputs if size == -1 else size

    def state(self, name: str) -> _State:
        """The JSON of a 4-bit weight's ``quant_state``."""
        key = next((key for key in self.stored if key.startswith(f"{name}.quant_state.bitsandbytes__")), None)
        if key is None:
            raise self._odd(name, "has no quant_state")
        try:
            state = json.loads(self.array(key, "U8").tobytes())
        except ValueError as error:
            raise self._odd(key, f"is not JSON: {error}") from error
        nested = ("nested_blocksize", "nested_offset") if f"{name}.nested_absmax" in self.stored else ()
        if not isinstance(state, dict) or not all(key in state for key in ("shape", "blocksize", *nested)):
            raise self._odd(key, f"lacks a part of the quant_state: {one_line(repr(state))}")
        return state

    def _file(self, name: str) -> TensorFile:
        if name not in self.stored:
            raise self._odd(name, "is missing")
        return self._files[self.stored[name].file]

    def _kind(self, name: str, dtype: str) -> tuple[int, int]:
        """The shape of a matrix of a format."""
        found, shape = self._file(name).kind(name)
        if found != dtype or len(shape) != 2:
            raise self._odd(name, f"is {found} {shape}, expected a matrix of {dtype}")
        return shape[0], shape[1]

    def array(self, name: str, dtype: str = "") -> np.ndarray:
        """A tensor; bfloat16 as float32.

        :param dtype: the format that it must have; empty for any.
        """
        file = self._file(name)
        try:
            found, shape = file.kind(name)
            if dtype and found != dtype:
                raise self._odd(name, f"is {found}, expected {dtype}")
            if found == "BF16":
                return (np.frombuffer(file.raw(name), "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
            return file.tensor(name)
        except (SafetensorError, OSError, TypeError) as error:
            raise self._odd(name, f"cannot be read: {one_line(str(error))}") from error

    def _odd(self, name: str, what: str) -> ModelError:
        return ModelError(f"{self._directory}: {one_line(name)} {what}")


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned fields of 32-bit words, lowest first, as a further last axis; int32."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words[..., None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.int32)
