"""The reference of a tokenizer's functions for single tokens and for where tokens stand in a text.

It is transformers' fast tokenizer, whose ``offset_mapping`` counts characters. A token that the post-processor adds,
as ``<s>`` before a text, is of no character: ``char_to_token`` never gives it, and nothing here does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from candle_mi_parity.coverage.calls import CallRow
from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.calls_model_truth import load_tokenizer
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.coverage.tokens_judge import in_bytes

Formulas = Collection[Formula]
NONE = -1
"""No token, or no character."""


@dataclass(frozen=True)
class Spelt:
    """A text as tokens.

    :ivar spans: the first character of each token, and the one after its last; 0 and 0 of an added token.
    :ivar added: whether the post-processor added the token.
    """

    ids: list[int]
    tokens: list[str]
    spans: list[tuple[int, int]]
    added: list[bool]

    def nearest(self, at: int) -> int:
        """The token with the character, or else the first of those whose middle is nearest to it."""
        if (found := self.containing(at)) != NONE:
            return found
        far = {token: abs(sum(span) / 2 - at) for token, span in self._of_text()}
        return min(far, key=lambda token: far[token], default=NONE)

    def containing(self, at: int) -> int:
        """As transformers' ``char_to_token``."""
        return next((token for token, (start, end) in self._of_text() if start <= at < end), NONE)

    def starting(self, at: int) -> int:
        """The first token that starts at the character or later."""
        return next((token for token, (start, _) in self._of_text() if start >= at), NONE)

    def overlapping(self, first: int, last: int) -> list[int]:
        """The tokens with a character from ``first`` to before ``last``."""
        return [token for token, (start, end) in enumerate(self.spans) if max(start, first) < min(end, last)]

    def around(self, first: int, last: int) -> list[int]:
        """The same, but for a range without characters the token around it."""
        return [token for token, (start, end) in enumerate(self.spans) if start < last and end > first]

    def _of_text(self) -> list[tuple[int, tuple[int, int]]]:
        return [(token, span) for token, span in enumerate(self.spans) if not self.added[token]]


def spelt(directory: Path, text: str, formulas: Formulas = (), special: bool = True) -> Spelt:
    """A text as tokens.

    :param formulas: known wrong ones.
    :param special: whether the tokenizer may add tokens.
    """
    found = load_tokenizer(directory)(text, add_special_tokens=special, return_offsets_mapping=True)
    spans = [(start, end) for start, end in found["offset_mapping"]]
    if Formula.BYTE_OFFSETS in formulas:
        spans = [in_bytes(text, span) for span in spans]
    added = [sequence is None for sequence in found.sequence_ids()]
    if Formula.ADDED_TOKENS_COUNTED in formulas:
        added = [False] * len(added)
    return Spelt(found["input_ids"], found.tokens(), spans, added)


def texts(each: Sequence[str]) -> torch.Tensor:
    """Texts as the list of their bytes, each ended by 0."""
    return _numbers([byte for text in each for byte in (*text.encode(), 0)])


def _numbers(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _encode(directory: Path, formulas: Formulas, text: str) -> Named:
    return _encoding(spelt(directory, text, formulas))


def _encode_raw(directory: Path, formulas: Formulas, text: str) -> Named:
    return _encoding(spelt(directory, text, formulas, special=False))


def _encoding(found: Spelt) -> Named:
    starts, ends = ([span[side] for span in found.spans] for side in (0, 1))
    return {
        "ids": _numbers(found.ids),
        "text": texts(found.tokens),
        "start": _numbers(starts),
        "end": _numbers(ends),
    }


def _decode_token(directory: Path, _: Formulas, token: int) -> Named:
    return {"text": texts([load_tokenizer(directory).decode([token], clean_up_tokenization_spaces=False)])}


def _find_token_id(directory: Path, formulas: Formulas, word: str) -> Named:
    """The token of the word after a space, or else of the word alone.

    :raises ValueError: neither is one token.
    """
    special = Formula.AFTER_AN_ADDED_TOKEN in formulas
    spellings = [
        load_tokenizer(directory)(text, add_special_tokens=special)["input_ids"] for text in (f" {word}", word)
    ]
    found = [ids[-1] for ids in spellings if len(ids) == 1 + special]
    if not found and special:
        found = spellings[0][-1:]
    if not found:
        raise ValueError(f"{word!r} is not one token")
    return {"token": _numbers(found)[0]}


def _char_to_token(directory: Path, formulas: Formulas, text: str, positions: list[int]) -> Named:
    found = spelt(directory, text, formulas)
    return {"token": _numbers([found.containing(at) for at in positions])}


def _char_to_token_fuzzy(directory: Path, formulas: Formulas, text: str, positions: list[int]) -> Named:
    found = spelt(directory, text, formulas)
    return {"token": _numbers([found.nearest(at) for at in positions])}


def _char_to_token_start(directory: Path, formulas: Formulas, text: str, positions: list[int]) -> Named:
    found = spelt(directory, text, formulas)
    return {"token": _numbers([found.starting(at) for at in positions])}


def _char_range_to_tokens(directory: Path, formulas: Formulas, text: str, start: int, end: int) -> Named:
    return {"tokens": _numbers(_overlapping(spelt(directory, text, formulas), formulas)(start, end))}


def _overlapping(found: Spelt, formulas: Formulas) -> Callable[[int, int], list[int]]:
    return found.around if Formula.AROUND_AN_EMPTY_RANGE in formulas else found.overlapping


def _token_to_char_range(directory: Path, formulas: Formulas, text: str, tokens: list[int]) -> Named:
    spans = dict(enumerate(spelt(directory, text, formulas).spans))
    found = [spans.get(token, (NONE, NONE)) for token in tokens]
    return {"start": _numbers([span[0] for span in found]), "end": _numbers([span[1] for span in found])}


def _label_spans(directory: Path, formulas: Formulas, text: str, spans: list[tuple[str, int, int]]) -> Named:
    """A token's label is the name of the first span with one of its characters; the last of each name is marked."""
    found = spelt(directory, text, formulas)
    labels = ["other"] * len(found.ids)
    for name, start, end in reversed(spans):
        for token in _overlapping(found, formulas)(start, end):
            labels[token] = name
    names = [name for name, _, _ in spans]
    for name in names if Formula.FINAL_OF_EACH_SPAN in formulas else dict.fromkeys(names):
        if name in labels:
            labels[len(labels) - 1 - labels[::-1].index(name)] = f"{name}_final"
    return {"text": texts(labels)}


def _convert_positions(directory: Path, formulas: Formulas, text: str, positions: list[int]) -> Named:
    found = spelt(directory, text, formulas)
    tokens = [found.nearest(at) for at in positions]
    return {
        "token": _numbers(tokens),
        "text": texts(["" if token == NONE else found.tokens[token] for token in tokens]),
        "exact": _numbers([found.containing(at) != NONE for at in positions]),
    }


_PLACES = frozenset({Formula.BYTE_OFFSETS, Formula.ADDED_TOKENS_COUNTED})
OFFSETS: dict[str, tuple[frozenset[Formula], Callable[..., Named]]] = {
    "encode_with_offsets": (_PLACES, _encode),
    "encode_raw_with_offsets": (_PLACES, _encode_raw),
    "decode_token": (frozenset(), _decode_token),
    "find_token_id": (frozenset({Formula.AFTER_AN_ADDED_TOKEN}), _find_token_id),
    "char_to_token": (_PLACES, _char_to_token),
    "char_to_token_fuzzy": (_PLACES, _char_to_token_fuzzy),
    "char_to_token_start": (_PLACES, _char_to_token_start),
    "char_range_to_tokens": (_PLACES | {Formula.AROUND_AN_EMPTY_RANGE}, _char_range_to_tokens),
    "token_to_char_range": (_PLACES, _token_to_char_range),
    "label_spans": (_PLACES | {Formula.AROUND_AN_EMPTY_RANGE, Formula.FINAL_OF_EACH_SPAN}, _label_spans),
    "convert_positions": (_PLACES, _convert_positions),
}
"""Function → its wrong formulas, and what computes it with some of them."""


def offsets(row: CallRow, directory: Path, formulas: Formulas) -> Named:
    """The results of a call.

    :param directory: of the tokenizer.
    :raises ValueError: transformers' tokenizer has no such answer.
    """
    args: Any = row.args
    return OFFSETS[row.fn][1](directory, formulas, **args)
