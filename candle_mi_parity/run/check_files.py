"""What is wrong with the files of a model directory, in one sentence each: found, expected, where."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.models.checkpoint import StoredTensor, read_config, weight_files, weight_tensors
from candle_mi_parity.models.dequantize import METHODS

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""Files of which a model directory with a tokenizer holds at least one."""
_MARKS = {
    ".quant_map": "4-bit weights of bitsandbytes",
    ".SCB": "8-bit weights of bitsandbytes",
    ".qweight": "packed weights of AWQ or GPTQ",
}
"""Ending of a tensor's name → what it is a part of."""


def require_usable(directory: Path) -> None:
    """Refuse a model whose config lacks its type or contradicts its weights, and weights that cannot be read.

    :raises ModelError: what was found, what was expected, and where.
    """
    config, where = read_config(directory), f"{directory}/config.json"
    if not isinstance(kind := config.get("model_type"), str) or not kind:
        found = f"model_type is {json.dumps(kind)}" if "model_type" in config else "there is no model_type"
        raise ModelError(f'{where}: {found}, expected the name of an architecture, such as "llama"')
    stored = weight_tensors(directory)
    marks = {mark: name for mark in _MARKS for name in stored if name.endswith(mark)}
    marks = {mark: name for mark, name in marks.items() if not name.endswith(".nested_quant_map")}
    given = config.get("quantization_config")
    if given is None:
        if marks:
            mark, name = next(iter(marks.items()))
            raise ModelError(
                f"{where}: there is no quantization_config, and the files hold {_MARKS[mark]}, such as "
                f"{one_line(name)}; expected the quantization_config with which they were made"
            )
        return
    if not isinstance(given, dict) or given.get("quant_method") not in METHODS:
        found = f"quant_method is {json.dumps(given.get('quant_method'))}" if isinstance(given, dict) else "it is "
        found += "" if isinstance(given, dict) else json.dumps(given)
        raise ModelError(
            f"{where}: quantization_config: {one_line(found)}, expected an object whose quant_method is one of "
            f"{', '.join(METHODS)}"
        )
    _require_method(where, given, marks)
    if given["quant_method"] != "bitsandbytes":
        _require_packing(where, given, stored)


def _require_method(where: str, given: Mapping[str, object], marks: dict[str, str]) -> None:
    """:raises ModelError: the weights are those of another method than the config says."""
    method = str(given["quant_method"])
    expected = {".qweight"} if method != "bitsandbytes" else {".quant_map", ".SCB"}
    if method == "bitsandbytes" and given.get("load_in_4bit") is not given.get("load_in_8bit"):
        expected = {".quant_map"} if given.get("load_in_4bit") else {".SCB"}
        method += " in 4 bits" if given.get("load_in_4bit") else " in 8 bits"
    if expected & marks.keys():
        return
    endings = " or ".join(f"*{mark}" for mark in sorted(expected))
    mark, name = next(iter(marks.items()), ("", ""))
    held = f"{_MARKS[mark]}, such as {one_line(name)}" if mark else "plain weights alone"
    raise ModelError(
        f"{where}: quantization_config says {one_line(method)}, whose weights have tensors named {endings}, and the "
        f"files hold {held}; expected weights and quantization_config of the same method"
    )


_LAYOUTS = {"awq": ("version", ("gemm", "exllama", "ipex")), "gptq": ("checkpoint_format", ("gptq", "gptq_v2"))}
"""Method → the key that names how the weights are packed, and its values that are read here, as without the key."""


def _require_packing(where: str, given: Mapping[str, object], stored: Mapping[str, StoredTensor]) -> None:
    """:raises ModelError: an unknown layout, or method, bits or group_size contradict the shapes of weights."""
    awq, bits, size = given["quant_method"] == "awq", given.get("bits", 4), given.get("group_size", 128)
    where = f"{where}: quantization_config"
    key, known = _LAYOUTS[str(given["quant_method"])]
    if (layout := given.get(key)) is not None and str(layout).lower() not in known:
        raise ModelError(f"{where}: {key} is {one_line(json.dumps(layout))}, expected one of {', '.join(known)}")
    if type(bits) is not int:
        raise ModelError(f"{where}: bits is {one_line(json.dumps(bits))}, expected a whole number such as 4")
    if type(size) is not int or (size != -1 and size < 1):
        raise ModelError(
            f"{where}: group_size is {one_line(json.dumps(size))}, expected -1 or a positive whole number"
        )
    for name in stored:
        base = name.removesuffix(".qweight")
        parts = [stored[each].shape for each in (name, f"{base}.qzeros", f"{base}.scales") if each in stored]
        if base == name or len(parts) < 3 or any(len(shape) != 2 for shape in parts) or 0 in parts[2]:
            continue  # what is missing is said when it is dequantised
        (rows, columns), (_, zeros), (groups, outputs) = parts
        if zeros < outputs and columns == (outputs if awq else zeros):
            raise ModelError(
                f"{where} says {'awq' if awq else 'gptq'}, and the qweight of {one_line(base)} has {columns} columns "
                f"for {outputs} outputs, as {'GPTQ' if awq else 'AWQ'} packs it; expected weights and "
                "quantization_config of the same method"
            )
        really = (columns if awq else zeros) * 32 / outputs
        if really != bits:
            raise ModelError(
                f"{where} says {bits} bits, and {one_line(base)} is packed in {really:g}: its "
                f"{'qweight' if awq else 'qzeros'} has {columns if awq else zeros} words a row for {outputs} outputs"
            )
        inputs = rows if awq else int(rows * 32 / really)
        if size > 0 and (said := math.ceil(inputs / size)) != groups:
            raise ModelError(
                f"{where} says group_size {size}, which makes {said} groups of "
                f"the {inputs} inputs of {one_line(base)}, and the file has the scales of {groups}"
            )


def nonfinite_weight(directory: Path) -> str:
    """The first weight with a NaN or an infinity; empty if there is none, or if a file cannot be read."""
    try:
        for path in weight_files(directory):
            file = TensorFile(path)
            for name in sorted(file.keys()):
                kind, shape = file.kind(name)
                if kind == "BF16":
                    broken = (np.frombuffer(file.raw(name), "<u2") & 0x7F80) == 0x7F80
                elif kind in ("F16", "F32", "F64"):
                    broken = ~np.isfinite(file.tensor(name)).reshape(-1)
                else:
                    continue
                if broken.any():
                    at = [int(place) for place in np.unravel_index(int(broken.argmax()), shape)]
                    return (
                        f"{path}: {one_line(name)} holds NaN or infinity in {int(broken.sum())} of {broken.size} "
                        f"numbers, first at {at}; expected finite weights, and there is no truth without"
                    )
    except (OSError, SafetensorError):
        return ""
    return ""


def tokenizer_fault(directory: Path) -> str:
    """What is wrong with ``tokenizer.json``; empty if it can be read or is not there."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return ""
    expected = "expected the file that save_pretrained writes; --tokens takes token ids without a tokenizer"
    if not path.stat().st_size:
        return f"{path} is empty; {expected}"
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        return f"{path} is not valid JSON ({one_line(str(error))}); {expected}"
    import tokenizers

    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        return f"{path} is no tokenizer that the tokenizers library can read ({one_line(str(error))}); {expected}"
    return ""
