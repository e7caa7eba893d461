"""Hypothesis strategies for direct calls of measures and SAEs, each with its own small table of tensors.

Shapes are those that candle-mi documents. Values, indices and sizes are ordinary, at an end, or beyond it. A strategy
shrinks towards small shapes and integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from candle_mi_parity.coverage.calls import CallRow, CallTable, InputTensor, SaeRow

ID = "generated"
_EDGES = (
    *(0.0, -0.0, 1.0, 2.0**-149, -(2.0**-149), 1e-40, 2.0**-126, 1e-30, -1e-30, 1e-12, 1e-8, 1.5e-8, -1e-8),
    *(2.0**-23, 1 + 2.0**-23, 1 - 2.0**-24, 30.0, -30.0, 88.5, -88.5, 104.0, -104.0, 1e4, -1e4, 2.0**24 + 2),
    *(1e12, -1e12, 1e19, 1e30, -1e30, 3.4e38, -3.4e38),
)
_SPECIAL = ("nan", "inf", "-inf")
"""As strings, because the digest of a table is that of its JSON."""
Number = float | str
Architecture = Literal["standard", "jumprelu", "topk"]


def single(number: float) -> float:
    return float(np.float32(number))


_WHOLE = st.integers(-4, 4).map(float)
_USUAL = st.floats(-8, 8, width=32)
_EDGE = st.sampled_from(tuple(single(edge) for edge in _EDGES))
_ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
NUMBERS: tuple[SearchStrategy[Number], ...] = (
    _WHOLE,
    _USUAL,
    st.one_of(_USUAL, _EDGE),
    _EDGE,
    st.one_of(_EDGE, _ANY),
    st.one_of(_WHOLE, st.sampled_from(_SPECIAL)),
)
"""Kinds of values; a tensor is of one kind, so that its numbers are of sizes that matter to one another."""
SIZE = st.integers(0, 40).map(lambda at: at // 8 + 1 if at < 40 else 0)
"""1 to 5, seldom 0."""
INDEX = st.integers(0, 7)
"""Of an axis of at most 5: also at the end and beyond it."""


@st.composite
def tensors(draw: DrawFn, shape: tuple[int, ...], kinds: tuple[SearchStrategy[Number], ...] = NUMBERS) -> Any:
    """Nested lists of float32 values, as in ``fixtures/calls.toml``."""
    kind = draw(st.sampled_from(kinds))
    count = int(np.prod(shape))
    values = draw(st.lists(kind, min_size=count, max_size=count))
    return np.array(values, dtype=object).reshape(shape).tolist()


def tensor(values: Any, shape: tuple[int, ...]) -> InputTensor:
    # An empty list has no shape, which the row then gives; its numbers are drawn from a seed, and there are none.
    return InputTensor(values=values) if 0 not in shape else InputTensor(shape=list(shape))


@st.composite
def _logits(draw: DrawFn, count: int) -> tuple[dict[str, InputTensor], list[int]]:
    """Tensors ``a``, ``b``, … of one shape [vocab], [seq, vocab] or [1, seq, vocab]."""
    vocab, axes = draw(SIZE), draw(st.integers(1, 3))
    shape = (vocab,) if axes == 1 else (*(1,) * (axes - 2), draw(SIZE), vocab)
    return {name: tensor(draw(tensors(shape)), shape) for name in "ab"[:count]}, list(shape)


def one_call(fn: str, args: dict[str, Any], named: dict[str, InputTensor], exact: bool = False) -> CallTable:
    return CallTable(tensors=named, call=[CallRow(id=ID, fn=fn, args=args, exact=exact)])


@st.composite
def _kl(draw: DrawFn) -> CallTable:
    named, shape = draw(_logits(2))
    if shape[-1] > 1 and draw(st.integers(0, 19)) == 19:  # of another vocabulary
        other = (*shape[:-1], shape[-1] + 1)
        named["b"] = tensor(draw(tensors(other)), other)
    return one_call("kl_divergence", {"baseline": "a", "other": "b"}, named)


@st.composite
def _logit_diff(draw: DrawFn) -> CallTable:
    named, _ = draw(_logits(2))
    return one_call("logit_diff", {"baseline": "a", "ablated": "b", "token": draw(INDEX)}, named)


@st.composite
def _top_changed(draw: DrawFn) -> CallTable:
    named, _ = draw(_logits(2))
    return one_call("top_changed_tokens", {"baseline": "a", "ablated": "b", "k": draw(INDEX)}, named)


@st.composite
def _token_prob(draw: DrawFn) -> CallTable:
    named, _ = draw(_logits(1))
    return one_call("extract_token_prob", {"logits": "a", "token": draw(INDEX)}, named)


@st.composite
def _sample(draw: DrawFn) -> CallTable:
    vocab = draw(SIZE)
    return one_call("sample_token", {"logits": "a"}, {"a": tensor(draw(tensors((vocab,))), (vocab,))}, exact=True)


@st.composite
def pattern(draw: DrawFn) -> tuple[dict[str, InputTensor], int]:
    """Attention weights [batch, heads, seq, seq]: rows that sum to 1, causal or not; seldom NaN or infinite."""
    batch, heads, seq = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(SIZE)
    shape = (batch, heads, seq, seq)
    sizes = st.one_of(st.integers(1, 4).map(float), st.sampled_from([0.0, 1e-4, 1e-8, 1e-11, 1e-30]))
    count = int(np.prod(shape))
    weights = np.array(draw(st.lists(sizes, min_size=count, max_size=count)), dtype=np.float64).reshape(shape)
    if draw(st.booleans()):
        weights = np.tril(weights)
    weights[weights.sum(-1) == 0] = 1.0
    rows: Any = (weights / weights.sum(-1, keepdims=True)).astype(np.float32).astype(object)
    if count and draw(st.integers(0, 9)) == 9:
        rows.flat[draw(st.integers(0, count - 1))] = draw(st.sampled_from(_SPECIAL))
    return {"a": tensor(rows.tolist(), shape)}, seq


_EDGE_PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).map(list), min_size=0, max_size=4)
_HEADS = st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=2)


def _with_heads(args: dict[str, Any], heads: list[int] | None) -> dict[str, Any]:
    return args if heads is None else args | {"heads": heads}


@st.composite
def _attention(draw: DrawFn) -> CallTable:
    named, _ = draw(pattern())
    args = {"attention": "a", "from": draw(INDEX), "targets": draw(st.lists(INDEX, max_size=3))}
    return one_call("measure_attention_to_targets", args, named)


@st.composite
def _steering(draw: DrawFn) -> CallTable:
    named, _ = draw(pattern())
    args = _with_heads({"attention": "a", "edges": draw(_EDGE_PAIRS)}, draw(_HEADS))
    sizes = st.one_of(st.integers(0, 4).map(float), st.sampled_from([0.25, 0.5, 0.9, -1.0, 1e-6, 1e-12, 1e30]))
    args[draw(st.sampled_from(["scale", "set_value"]))] = draw(sizes)
    return one_call("apply_steering", args, named)


@st.composite
def _knockout(draw: DrawFn) -> CallTable:
    args = {"edges": draw(_EDGE_PAIRS), "n_heads": draw(st.integers(0, 3)), "seq_len": draw(SIZE)}
    return one_call("create_knockout_mask", _with_heads(args, draw(_HEADS)), {}, exact=True)


@st.composite
def _causal(draw: DrawFn) -> CallTable:
    return one_call("create_causal_mask", {"seq_len": draw(st.integers(0, 33))}, {}, exact=True)


@st.composite
def _position_delta(draw: DrawFn) -> CallTable:
    width = draw(SIZE)
    args = {"direction": "a", "position": draw(INDEX), "seq_len": draw(SIZE)}
    return one_call("position_delta", args, {"a": tensor(draw(tensors((width,))), (width,))}, exact=True)


@st.composite
def _pca(draw: DrawFn) -> CallTable:
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    # Of more components than there are, candle-mi gives random ones; no formula states them.
    args = {"matrix": "a", "k": draw(st.integers(1, min(2, *shape))), "iterations": 200}
    return one_call("pca_top_k", args, {"a": tensor(draw(tensors(shape)), shape)})


_DECODER = (_WHOLE, _USUAL, st.one_of(_USUAL, st.sampled_from([1e-20, 1e10, -1e10, 0.0])))


@st.composite
def _sae(draw: DrawFn, architecture: Architecture, selecting: bool) -> SaeRow:
    """An SAE of 1 to 4 inputs and 1 to 5 features, some of them dead.

    :param selecting: each feature is one input times a power of 2, or dead with a bias, so that every pre-activation
        is exact in float32.
    """
    width, features = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    encoder, bias = np.zeros((width, features)), np.zeros(features)
    for feature in range(features):
        source = draw(st.integers(-1, width - 1))
        if source < 0:
            bias[feature] = draw(_WHOLE)
        elif selecting:
            encoder[source, feature] = draw(st.sampled_from([1.0, -1.0, 2.0, 0.5]))
        else:
            encoder[:, feature] = draw(st.lists(_USUAL, min_size=width, max_size=width))
            bias[feature] = draw(_USUAL)
    thresholds = st.one_of(_WHOLE, _USUAL, st.sampled_from([single(edge) for edge in (-1e30, -1e-8, 1e-8, 1e30)]))
    given: dict[str, Any] = {"W_enc": encoder.tolist(), "b_enc": bias.tolist()}
    given["W_dec"] = draw(tensors((features, width), _DECODER))
    given["b_dec"] = draw(tensors((width,), _DECODER))
    return SaeRow(
        architecture=architecture,
        width=width,
        features=features,
        k=draw(st.integers(1, features + 2)) if architecture == "topk" else 0,
        threshold=draw(st.lists(thresholds, min_size=features, max_size=features))
        if architecture == "jumprelu"
        else [],
        tensors=given,
    )


@st.composite
def _sae_call(draw: DrawFn, fn: str, architecture: Architecture) -> CallTable:
    # What encode_sparse returns is compared exactly.
    selecting = fn == "encode_sparse" or draw(st.booleans())
    sae = draw(_sae(architecture, selecting))
    row: dict[str, Any] = {"id": ID, "fn": fn, "sae": "sae"}
    named: dict[str, InputTensor] = {}
    if fn == "decoder_vector":
        row |= {"args": {"feature": draw(INDEX)}, "exact": True}
    else:
        width = sae.features if fn == "decode" else sae.width
        if draw(st.integers(0, 29)) == 29:
            width += 1
        leading: tuple[int, ...] = ()
        if fn != "encode_sparse":
            leading = draw(st.sampled_from([(1,), (2,), (1, 1), (1, 3), (2, 2), (0,), ()]))
        shape = (*leading, width)
        named["x"] = tensor(draw(tensors(shape)), shape)
        row["args"] = {"x": "x"}
        row["exact"] = selecting and fn in ("encode", "encode_with_strategy", "encode_sparse")
    if fn == "encode_with_strategy":
        row["args"]["strategy"] = draw(st.sampled_from(["auto", "cpu", "gpu"]))
    return CallTable(tensors=named, saes={"sae": sae}, call=[CallRow(**row)])


MEASURES: dict[str, Callable[[], SearchStrategy[CallTable]]] = {
    "kl_divergence": _kl,
    "logit_diff": _logit_diff,
    "top_changed_tokens": _top_changed,
    "extract_token_prob": _token_prob,
    "sample_token": _sample,
    "measure_attention_to_targets": _attention,
    "pca_top_k": _pca,
    "create_knockout_mask": _knockout,
    "apply_steering": _steering,
    "create_causal_mask": _causal,
    "position_delta": _position_delta,
}
_SAE_FUNCTIONS = ("encode", "encode_sparse", "decode", "reconstruct", "reconstruction_error", "decoder_vector")
_ARCHITECTURES: tuple[Architecture, ...] = ("standard", "jumprelu", "topk")
SAES: dict[str, SearchStrategy[CallTable]] = {
    **{f"{fn} of {kind}": _sae_call(fn, kind) for fn in _SAE_FUNCTIONS for kind in _ARCHITECTURES},
    "encode_with_strategy of topk": _sae_call("encode_with_strategy", "topk"),
}
