"""Hypothesis strategies for calls of a tokenizer with a small RWKV vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from candle_mi_parity.coverage.calls import CallRow, CallTable
from candle_mi_parity.coverage.calls_rwkv import RWKV
from candle_mi_parity.coverage.calls_vocabularies import VocabularyRow
from candle_mi_parity.hunt.call_inputs import ID

_BYTES = b'aab \xc3\xa9\xf0\x9f"\\\n\x00\x85'
_TEXT = st.text(st.sampled_from("aaab é\u00df'\"\\\n\x00\x85\u4e2d\U0001f600\U0010ffff"), max_size=8)
_ID = st.one_of(st.integers(0, 8), st.integers(95, 99), st.integers(190, 275))


@st.composite
def _vocabulary(draw: DrawFn, fn: str) -> VocabularyRow:
    """A single quote is in a token for one function alone: what a vocabulary does not load is the same for all."""
    parts = st.lists(st.sampled_from(_BYTES + b"'" * (fn == "rwkv_encode")), min_size=1, max_size=4)
    tokens = draw(st.lists(parts.map(lambda token: bytes(token).hex()), min_size=1, max_size=6))
    every_byte = draw(st.integers(0, 9)) > 0
    first = draw(st.sampled_from([None, None, 1, 260]) if not every_byte else st.sampled_from([None, None, 260]))
    return VocabularyRow(tokens=tokens, every_byte=every_byte, first=first, off=int(draw(st.integers(0, 29)) == 29))


@st.composite
def _call(draw: DrawFn, fn: str) -> CallTable:
    args: dict[str, Any] = {}
    if fn == "rwkv_encode":
        args["texts"] = draw(st.lists(_TEXT, min_size=1, max_size=2))
    elif fn == "rwkv_encode_with_offsets":
        args["text"] = draw(_TEXT)
    elif fn == "rwkv_decode":
        args["tokens"] = draw(st.lists(_ID, max_size=4))
    elif fn == "rwkv_decode_token":
        args["token"] = draw(_ID)
    elif fn == "rwkv_find_token_id":
        args["word"] = draw(_TEXT)
    call = CallRow(id=ID, fn=fn, args=args, vocabulary="vocabulary", exact=True)
    return CallTable(tensors={}, vocabularies={"vocabulary": draw(_vocabulary(fn))}, call=[call])


VOCABULARIES: dict[str, Callable[[], SearchStrategy[CallTable]]] = {fn: partial(_call, fn) for fn in RWKV}
