"""The properties of a quantised checkpoint's files that decide what candle-mi makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from candle_mi_parity.models.dequantize import QuantizedWeights, fields, quantization_of


def weight_facts(directory: Path) -> dict[str, object]:
    """The facts of ``weights.`` in a condition; empty for plain weights.

    Of 4-bit weights of bitsandbytes, ``short_block``: whether the last block of one is
    not full; ``short_nested_block``: whether one has several blocks of double quantisation and the last is not full.
    Of AWQ and GPTQ, ``inputs_differ``: whether not all have the same number of inputs; ``header``: whether the file's
    header names bits and a positive group size; ``zero_points_of_0``: whether a zero point of version 1 is stored as
    the largest number.
    """
    config = quantization_of(directory)
    if config is None:
        return {}
    weights = QuantizedWeights(directory)
    found: dict[str, object] = {}
    if config["quant_method"] == "bitsandbytes":
        blocks = list(_blocks(weights))
        found["short_block"] = any(size % block for size, block, _ in blocks)
        found["short_nested_block"] = any(
            nested and -(-size // block) > nested and -(-size // block) % nested for size, block, nested in blocks
        )
        return found
    header = weights.header()
    found["inputs_differ"] = len({weights.shape(name)[1] for name in weights.quantized}) > 1
    found["header"] = header.get("gptq_bits") in ("4", "8") and header.get("gptq_group_size", "").isdecimal()
    if config["quant_method"] == "gptq" and config.get("checkpoint_format") != "gptq_v2":
        most = (1 << weights.bits) - 1
        words = [weights.array(f"{form.base}.qzeros", "I32") for form in weights.quantized.values()]
        found["zero_points_of_0"] = any((fields(one.view(np.uint32), weights.bits) == most).any() for one in words)
    return found


def _blocks(weights: QuantizedWeights) -> Iterator[tuple[int, int, int]]:
    """Numbers in each 4-bit weight, those of a block, and blocks in a nested block or 0."""
    for name, form in weights.quantized.items():
        if form.kind == "4bit":
            state, (rows, columns) = weights.state(name), weights.shape(name)
            yield rows * columns, int(state["blocksize"]), int(state.get("nested_blocksize", 0))
