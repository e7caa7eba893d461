"""Hypothesis strategies for calls of a transcoder's functions, and what rounding or order leaves undecided in one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from candle_mi_parity.compare.gate import ELEMENT_GATE, UNIT
from candle_mi_parity.coverage.calls import CallRow, CallTable, TranscoderRow
from candle_mi_parity.coverage.calls_transcoders import TRANSCODERS, TorchTranscoder
from candle_mi_parity.coverage.calls_truth import with_noise
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.hunt.call_inputs import ID, NUMBERS, SIZE, single, tensor, tensors
from candle_mi_parity.spec.transcoder import Layout
from candle_mi_parity.trace.truth import TruthTensor

_FINITE = NUMBERS[:3]
_THRESHOLDS = st.one_of(
    st.integers(-2, 4).map(lambda at: at / 2), st.sampled_from([single(at) for at in (1e-8, 1e30)])
)
_STRENGTHS = st.one_of(st.integers(-4, 4).map(float), st.sampled_from([single(at) for at in (0.7, 1e-8, 1e8)]))


@st.composite
def _transcoders(draw: DrawFn) -> TranscoderRow:
    layout: Layout = draw(st.sampled_from(("clt", "clt-index", "plt", "gemma-scope")))
    features, scope = draw(st.integers(1, 5)), layout == "gemma-scope"
    jumps = scope or draw(st.booleans())
    return TranscoderRow(
        layout=layout,
        layers=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 4)),
        features=features,
        seed=draw(st.integers(0, 9)),
        threshold=draw(st.lists(_THRESHOLDS, min_size=features, max_size=features)) if jumps else [],
        dtype="float32" if scope else draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        identity=draw(st.booleans()),
        dead=draw(st.lists(st.integers(0, features - 1), max_size=2, unique=True)),
        skip=layout == "plt" and draw(st.booleans()),
    )


@st.composite
def _call(draw: DrawFn, fn: str) -> CallTable:
    row = draw(_transcoders())
    width = row.width + (draw(st.integers(0, 29)) == 29)  # seldom another one
    shape: tuple[int, ...] = (width,)
    # Of layers those that are there, seldom the next; of indices some are beyond the features.
    layer = draw(st.integers(0, 19).map(lambda at: at % row.layers if at < 19 else row.layers))
    target = layer + (draw(st.integers(0, 2)) if row.crosses or not draw(st.integers(0, 9)) else 0)
    target = target if not draw(st.integers(0, 9)) else min(target, row.layers - 1)
    indices = draw(st.lists(st.integers(0, row.features - (draw(st.integers(0, 9)) > 0)), min_size=1, max_size=3))
    features = [[layer if not place else draw(st.integers(0, layer)), index] for place, index in enumerate(indices)]
    args: dict[str, Any] = {}
    names = ["a"]
    if fn.startswith("clt_encode") or fn == "clt_top_k":
        args = {"x": "a", "layer": layer}
    elif fn.startswith("clt_decoder"):
        args = {"layer": layer, "target": target}
    elif fn == "clt_load_skip_matrix":
        args = {"layer": layer}
    elif fn == "clt_extract_decoder_vectors":
        args = {"features": features, "target": target}
    elif fn == "clt_inject":
        shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), width)
        wanted = [[*each, target] for each in features]
        position = draw(st.integers(0, shape[1] - (draw(st.integers(0, 9)) > 0)))
        args = {"residual": "a", "features": wanted, "position": position, "strength": draw(_STRENGTHS)}
    elif fn != "clt_config":
        k = draw(st.one_of(st.just(1000), SIZE))
        args = {"scoring": {"target": target, "k": k, "cosine": draw(st.booleans())}, "direction": "a"}
    if fn == "clt_top_k":
        args["k"] = draw(SIZE)
    if fn == "clt_attribution_graph":
        args["least"] = draw(st.sampled_from([0.0, 0.25, 1.0]))
    if fn == "clt_score_features_batch":
        names = draw(st.sampled_from([["a"], ["a", "b"], []]))
        del args["direction"]
        args["directions"] = names
    named = {name: tensor(draw(tensors(shape, _FINITE)), shape) for name in names}
    selects = fn.startswith("clt_encode") or fn == "clt_top_k"
    exact = fn in _COPIES or (selects and row.identity)
    call = CallRow(id=ID, fn=fn, args=args, transcoder="transcoder", exact=exact)
    return CallTable(tensors=named, transcoders={"transcoder": row}, call=[call])


_COPIES = (
    *("clt_config", "clt_decoder_vector", "clt_decoder_matrix", "clt_extract_decoder_vectors"),
    "clt_load_skip_matrix",
)
"""Functions that compute nothing."""
CALLS: dict[str, Callable[[], SearchStrategy[CallTable]]] = {fn: partial(_call, fn) for fn in TRANSCODERS}


def _slack(found: TruthTensor) -> np.ndarray:
    return np.asarray(ELEMENT_GATE * (found.noise + UNIT * np.abs(found.value)))


def decided(table: CallTable, arrays: dict[str, np.ndarray], formulas: Collection[Formula]) -> CallRow | str:
    """The table's call with what the comparison has to know of ties; or what rounding or order may decide.

    :param formulas: known wrong formulas.
    """
    (row,) = table.call
    assert row.transcoder is not None
    clt = TorchTranscoder(table.transcoders[row.transcoder], formulas)
    args: dict[str, Any] = dict(row.args)
    if row.fn in ("clt_encode", "clt_top_k"):
        return _features(row, clt, torch.from_numpy(arrays[args["x"]]).double())
    if "scoring" not in args:
        return row
    for name in args["directions"] if "directions" in args else [args["direction"]]:
        direction = torch.from_numpy(arrays[name]).double()
        every = args["scoring"] | {"k": 1000}
        batch = row.fn == "clt_score_features_batch"
        once = TRANSCODERS["clt_score_features"][1]
        found, _ = with_noise(row, lambda: once(clt, direction, every, batch=batch), True)  # noqa: B023
        if why := _near(found["value"], args["scoring"]["k"], args.get("least", 0.0)):
            return why
    return row


def _features(row: CallRow, clt: TorchTranscoder, x: torch.Tensor) -> CallRow | str:
    layer = cast(int, row.args["layer"])
    found, _ = with_noise(row, lambda: {"pre": clt.pre(x, layer)}, not row.exact)
    pre, slack = found["pre"].value, _slack(found["pre"])
    theta = np.asarray(clt.row.weights()[layer].get("threshold", np.zeros(1)))
    if not row.exact and ((np.abs(pre - theta) <= slack) | (np.abs(pre) <= slack)).any():
        return "a feature lies within rounding of its threshold"
    if row.fn == "clt_encode":
        return row
    k, features = cast(int, row.args["k"]), clt.encode(x, layer).numpy()
    order = np.argsort(-features, kind="stable")
    if not 0 < k < len(order) or features[order[k - 1]] == 0:
        return row
    last, following = order[k - 1], order[k]
    if row.exact:
        return row.model_copy(update={"ties": bool(features[last] == features[following])})
    near = features[last] - features[following] <= slack[last] + slack[following]
    return "the k-th and the next feature are equal within rounding" if near else row


def _near(scores: TruthTensor, k: int, least: float) -> str:
    listed = np.isfinite(scores.value)
    order = np.argsort(-scores.value[listed], kind="stable")
    value, slack = scores.value[listed][order], _slack(scores)[listed][order]
    if 0 < k < len(value) and value[k - 1] - value[k] <= slack[k - 1] + slack[k]:
        return "the k-th and the next score are equal within rounding"
    if least and (np.abs(np.abs(value) - least) <= slack).any():
        return "a score lies within rounding of the least"
    return ""
