"""Hypothesis strategies for calls of caches, masks, calibrations and lists of tensors; see :mod:`call_inputs`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from candle_mi_parity.coverage.calls import CallRow, CallTable, InputTensor, WeightsRow
from candle_mi_parity.hunt import call_diffusion, call_training, call_transcoders
from candle_mi_parity.hunt.call_inputs import (
    ID,
    INDEX,
    MEASURES,
    SAES,
    SIZE,
    one_call,
    pattern,
    single,
    tensor,
    tensors,
)
from candle_mi_parity.hunt.call_rwkv import VOCABULARIES
from candle_mi_parity.hunt.call_stoicheia import STOICHEIA

_LAYER = st.integers(0, 2)
_SMALL = (0.0, 1e-30, 1e-12, 1e-11, 5e-11, 1e-10, 2e-10, 1e-8)
_LEVELS = st.one_of(st.integers(0, 8).map(lambda at: at / 8), st.sampled_from([single(each) for each in _SMALL]))
_SCALES = st.one_of(st.integers(-4, 8).map(float), st.sampled_from([single(each) for each in (1e-8, 1e8, 1e30)]))


@st.composite
def _attention(draw: DrawFn, fn: str) -> CallTable:
    """Layers of one shape or of another."""
    named: dict[str, InputTensor] = {}
    for name in "ab"[: draw(st.integers(1, 2))]:
        named[name] = draw(pattern())[0]["a"]
    args = {"patterns": [*named], "layer": draw(_LAYER), "position": draw(INDEX)}
    if fn != "top_attended_positions":
        return one_call(fn, args, named)
    # Means of powers of 2 over at most 2 heads are exact, and then the order of equal ones is compared.
    exact = draw(st.booleans())
    if exact:
        shape = (1, draw(st.integers(1, 2)), 1, draw(SIZE))
        count = int(np.prod(shape))
        weights = draw(st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5]), min_size=count, max_size=count))
        named = {"a": tensor(np.array(weights).reshape(shape).tolist(), shape)}
        args |= {"patterns": ["a"], "layer": 0, "position": 0}
    return one_call(fn, args | {"k": draw(INDEX)}, named, exact)


@st.composite
def _layers(draw: DrawFn) -> dict[str, InputTensor]:
    """Activations [seq, width]."""
    named = {}
    for name in "ab"[: draw(st.integers(1, 2))]:
        shape = (draw(SIZE), draw(SIZE))
        named[name] = tensor(draw(tensors(shape)), shape)
    return named


@st.composite
def _position(draw: DrawFn) -> CallTable:
    named = draw(_layers())
    args = {"layers": [*named], "layer": draw(_LAYER), "position": draw(INDEX)}
    return one_call("get_position", args, named, exact=True)


@st.composite
def _vectors(draw: DrawFn) -> CallTable:
    named = draw(_layers())
    return one_call("to_f32_vecs", {"layers": [*named], "half": draw(st.booleans())}, named, exact=True)


@st.composite
def _bidirectional(draw: DrawFn) -> CallTable:
    return one_call("create_bidirectional_mask", {"seq_len": draw(st.integers(0, 33))}, {}, exact=True)


@st.composite
def _generation(draw: DrawFn) -> CallTable:
    names = ("new_seq_len", "total_seq_len", "start_pos")
    return one_call("create_generation_mask", {name: draw(INDEX) for name in names}, {}, exact=True)


@st.composite
def _calibration(draw: DrawFn) -> CallTable:
    args = {"source": draw(_LEVELS), "baseline": draw(_LEVELS), "target": draw(_LEVELS)}
    return one_call("steering_calibration", args, {})


@st.composite
def _ratio(draw: DrawFn) -> CallTable:
    args = {"steered": draw(_LEVELS)}
    if draw(st.integers(0, 9)):
        args["baseline"] = draw(_LEVELS)
    return one_call("attention_ratio", args, {})


@st.composite
def _scale(draw: DrawFn) -> CallTable:
    points = draw(st.lists(st.tuples(_SCALES, _LEVELS).map(list), max_size=4))
    return one_call("scale_for_target", {"points": points, "target": draw(_LEVELS)}, {})


_NAMES = st.lists(st.text(st.sampled_from('ab."\\/ é☂𝔘'), max_size=4), max_size=4, unique=True)


@st.composite
def _names(draw: DrawFn) -> CallTable:
    metadata = draw(st.none() | st.dictionaries(st.sampled_from("ab"), st.sampled_from("ab"), max_size=2))
    row = WeightsRow(tensors=draw(_NAMES), metadata=metadata, cut=draw(st.sampled_from([0, 0, 0, 2, 9])))
    return _of_files("tensor_names_from_safetensors", row)


@st.composite
def _index(draw: DrawFn) -> CallTable:
    index: dict[str, Any] = {"metadata": {"total_size": 4}}
    index["weight_map"] = draw(st.one_of(_NAMES.map(lambda names: dict.fromkeys(names, "a/b")), _NAMES))
    if not draw(st.integers(0, 9)):
        del index["weight_map"]
    return _of_files("tensor_names_from_index", WeightsRow(index=index))


def _of_files(fn: str, row: WeightsRow) -> CallTable:
    return CallTable(tensors={}, weights={"files": row}, call=[CallRow(id=ID, fn=fn, weights="files", exact=True)])


_CACHES: dict[str, Callable[[], SearchStrategy[CallTable]]] = {
    "attention_from_position": partial(_attention, "attention_from_position"),
    "attention_to_position": partial(_attention, "attention_to_position"),
    "top_attended_positions": partial(_attention, "top_attended_positions"),
    "get_position": _position,
    "to_f32_vecs": _vectors,
    "create_bidirectional_mask": _bidirectional,
    "create_generation_mask": _generation,
    "steering_calibration": _calibration,
    "attention_ratio": _ratio,
    "scale_for_target": _scale,
    "tensor_names_from_safetensors": _names,
    "tensor_names_from_index": _index,
}


GENERATED: dict[str, SearchStrategy[CallTable]] = {
    **{fn: make() for fn, make in (MEASURES | _CACHES | STOICHEIA | VOCABULARIES).items()},
    **{fn: make() for part in (call_transcoders, call_training, call_diffusion) for fn, make in part.CALLS.items()},
    **SAES,
}
"""What is called → a strategy for a table with one call and its tensors."""
