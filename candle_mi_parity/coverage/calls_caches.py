"""The reference of caches of attention and activations, of masks, of calibrations, and of lists of tensors.

The known wrong formulas of these functions stand beside the right ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from candle_mi_parity.coverage.calls_measures import Named, dtype_name
from candle_mi_parity.coverage.calls_offsets import texts
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.models.transformers_private import private
from candle_mi_parity.trace.formats import round_to_dtype

Formulas = Collection[Formula]
SMALL = float(np.float32(1e-10))
DOSES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
"""Those that ``DOSE_LEVELS`` documents."""


def _from(_: Formulas, patterns: list[torch.Tensor], layer: int, position: int, dtype: str | None = None) -> Named:
    """Mean over heads of the weights [B, H, T, S] from a position, of the first row of the batch.

    :param dtype: to which the patterns are rounded; the mean is float32.
    """
    return {"value": _stored(patterns[layer], dtype)[0, :, position].mean(0)}


def _to(_: Formulas, patterns: list[torch.Tensor], layer: int, position: int, dtype: str | None = None) -> Named:
    return {"value": _stored(patterns[layer], dtype)[0, :, :, position].mean(0)}


def _stored(pattern: torch.Tensor, dtype: str | None) -> torch.Tensor:
    if dtype is None:
        return pattern
    return torch.from_numpy(round_to_dtype(pattern.numpy(), dtype)).to(pattern.dtype)


def _top(formulas: Formulas, patterns: list[torch.Tensor], layer: int, position: int, k: int) -> Named:
    """All weights, and all positions in the order of ``torch.sort``: NaN first, and of equal ones the first first.

    The comparison takes the first k.
    """
    weights = patterns[layer][0, :, position].mean(0)
    order = torch.sort(weights, descending=True, stable=True).indices
    if Formula.NAN_EQUALS_ALL in formulas:
        order = torch.tensor(_inserted(weights.tolist()), dtype=torch.int64)
    return {"positions": order.double(), "weights": weights}


def _inserted(weights: list[float]) -> list[int]:
    """An insertion sort, largest first, in which NaN is neither larger nor smaller than anything."""
    order: list[int] = []
    for at, weight in enumerate(weights):
        place = at
        while place and weight > weights[order[place - 1]]:
            place -= 1
        order.insert(place, at)
    return order


def _position(_: Formulas, layers: list[torch.Tensor], layer: int, position: int) -> Named:
    return {"value": layers[layer][position]}


def _vectors(_: Formulas, layers: list[torch.Tensor], half: bool) -> Named:
    """One after the other, of bfloat16 if ``half``."""
    flat = np.concatenate([each.numpy().ravel() for each in layers] or [np.zeros(0)])
    with np.errstate(over="ignore"):  # to infinity
        return {"value": torch.from_numpy(round_to_dtype(flat, "bfloat16") if half else flat).double()}


def _bidirectional(_: Formulas, seq_len: int) -> Named:
    """As transformers' mask of a model that is not causal."""
    return _additive(seq_len, seq_len, 0, private("masking_utils.bidirectional_mask_function"))


def _generation(
    formulas: Formulas, new_seq_len: int, total_seq_len: int, start_pos: int, dtype: str | None = None
) -> Named:
    """As transformers' mask of queries from ``start_pos`` on over ``total_seq_len`` keys."""
    free = new_seq_len == 1 and Formula.ONE_QUERY_SEES_ALL in formulas
    rule = private(f"masking_utils.{'bidirectional' if free else 'causal'}_mask_function")
    return _additive(new_seq_len, total_seq_len, start_pos, rule) | dtype_name(dtype)


def _additive(queries: int, keys: int, offset: int, rule: Callable[..., object]) -> Named:
    if not queries or not keys:
        return {"value": torch.zeros(1, 1, queries, keys, dtype=torch.float64)}
    seen = private("masking_utils.sdpa_mask")(
        1, queries, keys, q_offset=offset, mask_function=rule, allow_is_causal_skip=False
    )
    assert seen is not None
    return {"value": torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)}


def _single(number: float) -> torch.Tensor:
    """A float32 argument."""
    return torch.tensor(float(np.float32(number)), dtype=torch.float64)


def _calibration(formulas: Formulas, source: float, baseline: float, target: float) -> Named:
    """Attention of a source condition and a target level over that of the target condition, and multiples of it."""
    below = _single(baseline)
    ratios = {name: _single(number) / below for name, number in (("ratio", source), ("for_target", target))}
    ratios["to_source"] = ratios["ratio"]
    if Formula.SMALL_BASELINE in formulas and not below > SMALL:
        ratios = {name: torch.full_like(below, float(name != "ratio")) for name in ratios}
    doses = torch.tensor(DOSES, dtype=torch.float64)
    return {**ratios, "doses": doses, "levels": doses * below}


def _ratio(formulas: Formulas, steered: float, baseline: float | None = None) -> Named:
    """No value without measurements."""
    if baseline is None or (Formula.SMALL_BASELINE in formulas and not _single(baseline) > SMALL):
        return {"value": torch.zeros(0, dtype=torch.float64)}
    return {"value": (_single(steered) / _single(baseline))[None]}


def _scale(formulas: Formulas, points: list[tuple[float, float]], target: float) -> Named:
    """Linear interpolation between the first two measured points with the level between theirs, as ``np.interp``'s.

    No value outside the measured range. At a measured level the scale is that of the point.
    """
    wanted = _single(target)
    curve = [(_single(scale), _single(level)) for scale, level in points]
    levels = np.array([level for _, level in points], np.float32)
    # Of the inputs as they are: the noise of a subtraction must not decide which formula a sample follows.
    near = np.abs(np.diff(levels)) < np.float32(SMALL)
    for ((scale, level), (next_scale, next_level)), flat in zip(pairwise(curve), near.tolist(), strict=True):
        if not torch.minimum(level, next_level) <= wanted <= torch.maximum(level, next_level):
            continue
        if Formula.SEGMENTS_APART in formulas and flat:
            continue
        if level == next_level:
            return {"value": scale[None]}
        return {"value": (scale + (wanted - level) / (next_level - level) * (next_scale - scale))[None]}
    if len(curve) == 1 and curve[0][1] == wanted and Formula.SEGMENTS_APART not in formulas:
        return {"value": curve[0][0][None]}
    return {"value": torch.zeros(0, dtype=torch.float64)}


def _names(formulas: Formulas, path: Path) -> Named:
    """The names that safetensors gives, sorted, because candle-mi documents no order.

    :raises ValueError: safetensors cannot open the file.
    """
    if Formula.HEADER_ALONE in formulas:
        data = (path / "model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {"text": texts(sorted(header.keys() - {"__metadata__"}))}
    try:
        with safe_open(path / "model.safetensors", "numpy") as file:
            return {"text": texts(sorted(file.keys()))}
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def _index(_: Formulas, path: Path) -> Named:
    """The keys of the index's ``weight_map``, sorted.

    :raises ValueError: there is no index, or no such map in it.
    """
    try:
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return {"text": texts(sorted(index["weight_map"].keys()))}
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"no weight_map: {error}") from error


CACHES: dict[str, tuple[frozenset[Formula], Callable[..., Named]]] = {
    "attention_from_position": (frozenset(), _from),
    "attention_to_position": (frozenset(), _to),
    "top_attended_positions": (frozenset({Formula.NAN_EQUALS_ALL}), _top),
    "get_position": (frozenset(), _position),
    "to_f32_vecs": (frozenset(), _vectors),
    "create_bidirectional_mask": (frozenset(), _bidirectional),
    "create_generation_mask": (frozenset({Formula.ONE_QUERY_SEES_ALL}), _generation),
    "steering_calibration": (frozenset({Formula.SMALL_BASELINE}), _calibration),
    "attention_ratio": (frozenset({Formula.SMALL_BASELINE}), _ratio),
    "scale_for_target": (frozenset({Formula.SEGMENTS_APART}), _scale),
    "tensor_names_from_safetensors": (frozenset({Formula.HEADER_ALONE}), _names),
    "tensor_names_from_index": (frozenset(), _index),
}
"""Function → its wrong formulas, and what computes it with some of them."""
