"""The reference of a tokenizer with an RWKV vocabulary: the longest token at each place, from the left.

So does ``TRIE_TOKENIZER`` of the package rwkv 0.8.32, with which the tests compare this. What its ``decode`` cannot
give, because an id has no token or the bytes are not UTF-8, is one U+FFFD.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from candle_mi_parity.coverage.calls import CallRow
from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.calls_offsets import texts
from candle_mi_parity.coverage.calls_vocabularies import VocabularyRow
from candle_mi_parity.coverage.formulas import Formula

Formulas = Collection[Formula]
END = -1
"""Of a text's ids."""


class Vocabulary:
    """Of equal tokens the last has the id.

    :ivar formulas: known wrong formulas; none for the truth.
    """

    def __init__(self, row: VocabularyRow, formulas: Formulas = ()) -> None:
        self.tokens, self.formulas = dict(row.ids()), formulas
        self._ids = {token: id for id, token in self.tokens.items()}
        self._longest = max(len(token) for token in self._ids)

    def encode(self, text: str) -> list[tuple[int, int, int]]:
        """Ids, each with its first byte and the one after its last.

        :raises ValueError: no token fits.
        """
        source, at, found = text.encode(), 0, []
        while at < len(source):
            ends = range(min(len(source), at + self._longest), at, -1)
            end = next((end for end in ends if source[at:end] in self._ids), None)
            if end is None:
                raise ValueError(f"no token fits at byte {at}")
            found.append((self._ids[source[at:end]], at, end))
            at = end
        return found

    def decode(self, ids: list[int]) -> str:
        missing = b"" if Formula.NO_TOKEN_IS_EMPTY in self.formulas else None
        found = [self.tokens.get(id, missing if id <= max(self.tokens) else None) for id in ids]
        try:
            return b"".join(token for token in found if token is not None).decode() if None not in found else "\ufffd"
        except UnicodeDecodeError:
            return "\ufffd"


def _list(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _size(vocabulary: Vocabulary) -> Named:
    counted = Formula.COUNTED_FROM_0 in vocabulary.formulas
    return {"value": torch.tensor(float(max(vocabulary.tokens) + 1 if counted else len(vocabulary.tokens)))}


def _encode(vocabulary: Vocabulary, **args: Any) -> Named:
    each = [[id for id, _, _ in vocabulary.encode(text)] for text in args["texts"]]
    ids = _list([id for found in each for id in (*found, END)])
    return {"tokens": ids, "raw": ids, "text": texts([vocabulary.decode(found) for found in each])}


def _offsets(vocabulary: Vocabulary, text: str) -> Named:
    found = vocabulary.encode(text)
    places = [place for _, start, end in found for place in (start, end)]
    return {"tokens": _list([id for id, _, _ in found]), "offsets": _list(places)}


def _find(vocabulary: Vocabulary, word: str) -> Named:
    """The one token of the word after a space, or of the word.

    :raises ValueError: there is none.
    """
    second = Formula.AFTER_AN_ADDED_TOKEN in vocabulary.formulas
    each = [vocabulary.encode(text) for text in (f" {word}", word)]
    for found in [ids for ids in each if len(ids) == 1 + second] + each[:second]:
        return {"token": torch.tensor(float(found[-1][0]))}
    raise ValueError(f"{word!r} is more than one token")


RWKV: dict[str, tuple[frozenset[Formula], Callable[..., Named]]] = {
    "rwkv_vocab_size": (frozenset({Formula.COUNTED_FROM_0}), _size),
    "rwkv_encode": (frozenset(), _encode),
    "rwkv_encode_with_offsets": (frozenset(), _offsets),
    "rwkv_decode": (
        frozenset({Formula.NO_TOKEN_IS_EMPTY}),
        lambda vocabulary, tokens: {"text": texts([vocabulary.decode(tokens)])},
    ),
    "rwkv_decode_token": (
        frozenset({Formula.NO_TOKEN_IS_EMPTY}),
        lambda vocabulary, token: {"text": texts([vocabulary.decode([token])])},
    ),
    "rwkv_find_token_id": (frozenset({Formula.AFTER_AN_ADDED_TOKEN}), _find),
}
"""Function → its wrong formulas, and what computes it with some of them."""


def rwkv_call(row: CallRow, vocabulary: VocabularyRow, formulas: Formulas) -> Named:
    """The results of a call; its texts are texts, whatever tensor has the same name."""
    args: Any = row.args
    return RWKV[row.fn][1](Vocabulary(vocabulary, formulas), **args)
