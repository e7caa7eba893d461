"""RWKV's tokenizer: the truth from the package rwkv, and from a search of all tokens; and planted faults.

The package is not part of the set-up. Where it is not installed, the tests that need it are skipped.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.coverage.calls_rwkv import RWKV, Vocabulary
from candle_mi_parity.coverage.calls_vocabularies import VocabularyRow, world
from candle_mi_parity.coverage.formulas import Formula
from tests.support.calls import ROWS, TABLE, Values, changed, other, passes, right, where

OURS = {row.id: row for row in TABLE.call if row.fn in RWKV}


@cache
def package(name: str) -> Any:
    """BlinkDL's tokenizer with one of the table's vocabularies, read from its file."""
    found = importlib.util.find_spec("rwkv")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("rwkv is not installed: pip install '.[rwkv]' beside this suite's packages")
    # Its own __init__ needs no torch, but model.py beside it compiles kernels where it is imported.
    spec = importlib.util.spec_from_file_location(
        "rwkv_tokenizer", f"{found.submodule_search_locations[0]}/rwkv_tokenizer.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TRIE_TOKENIZER(TABLE.vocabularies[name].at(where(name)))


def by_package(call: str) -> Values:
    """The answer that the package gives to a call."""
    row: Any = ROWS[call]
    tokenizer, args = package(row.vocabulary), row.args
    if row.fn == "rwkv_vocab_size":
        return {"value": np.array(float(len(tokenizer.idx2token)))}
    if row.fn == "rwkv_encode":
        each = [tokenizer.encode(text) for text in args["texts"]]
        ids = np.array([float(id) for found in each for id in (*found, -1)])
        return {"tokens": ids, "raw": ids, "text": in_bytes([tokenizer.decode(found) for found in each])}
    if row.fn == "rwkv_encode_with_offsets":
        ids = tokenizer.encode(args["text"])
        ends = np.cumsum([len(tokenizer.idx2token[id]) for id in ids])
        starts = np.concatenate([[0], ends[:-1]])
        return {"tokens": np.array(ids, float), "offsets": np.stack([starts, ends], 1).ravel().astype(float)}
    if row.fn == "rwkv_find_token_id":
        found = (tokenizer.encode(text) for text in (f" {args['word']}", args["word"]))
        return {"token": np.array(float(next(ids[0] for ids in found if len(ids) == 1)))}
    return {"text": in_bytes([tokenizer.decode(args["tokens"] if "tokens" in args else [args["token"]])])}


def in_bytes(texts: list[str]) -> np.ndarray:
    return np.array([float(byte) for text in texts for byte in (*text.encode(), 0)])


@pytest.mark.parametrize("call", [id for id, row in OURS.items() if not row.raises])
def test_the_package_gives_the_truth(call: str) -> None:
    assert passes(call, by_package(call))


def test_world_is_the_packages_own_vocabulary(tmp_path: Path) -> None:
    """Its digest is written here, so that the copy is checked where the package is not installed."""
    assert [id for id, _ in world()] == list(range(1, 65530))
    VocabularyRow().write(tmp_path)
    text = VocabularyRow().at(tmp_path).read_bytes()
    assert hashlib.sha256(text).hexdigest() == "8324476023347dec2964625ccb2075c864d250a9c6d9a74f36daba628de8c008"


@pytest.mark.parametrize("name", [name for name, row in TABLE.vocabularies.items() if not row.off])
def test_each_token_is_the_longest_that_fits(name: str) -> None:
    vocabulary = Vocabulary(TABLE.vocabularies[name])
    tokens = set(vocabulary.tokens.values())
    rows: Any = [
        row for row in OURS.values() if row.vocabulary == name and row.fn == "rwkv_encode" and not row.raises
    ]
    for text in (text for row in rows for text in row.args["texts"]):
        source, found = text.encode(), vocabulary.encode(text)
        assert [start for _, start, _ in found] == [0, *(end for _, _, end in found)][: len(found)]
        assert b"".join(vocabulary.tokens[id] for id, _, _ in found) == source
        for _, start, end in found:
            assert not any(
                source[start:longer] in tokens for longer in range(end + 1, min(len(source), end + 130) + 1)
            )


@pytest.mark.thorough
def test_a_text_comes_back_from_its_ids_whatever_its_characters() -> None:
    vocabulary = Vocabulary(VocabularyRow())
    draw = np.random.Generator(np.random.PCG64(3))
    points = [int(point) for point in draw.integers(0, 0x110000, 3000) if not 0xD800 <= point < 0xE000]
    text = "".join(map(chr, points))
    assert vocabulary.decode([id for id, _, _ in vocabulary.encode(text)]) == text


PLANTED: dict[str, Callable[[], tuple[str, Values]]] = {
    "a token more": lambda: changed("rwkv-size/world", lambda size: size + 1, "value"),
    "the shortest token": lambda: other("rwkv-encode/backtrack", texts=["a", "b", "c"]),
    "a token before the text": lambda: changed("rwkv-encode/ascii", lambda ids: np.concatenate([[0], ids]), "tokens"),
    "ids from 0": lambda: changed("rwkv-encode/scripts", lambda ids: ids - (ids > 0), "raw"),
    "the first of equal tokens": lambda: changed(
        "rwkv-encode/equal-tokens", lambda ids: np.where(ids == 259, 257, ids), "tokens"
    ),
    "a byte lost": lambda: changed("rwkv-encode/planes", lambda data: np.delete(data, 1), "text"),
    "offsets in characters": lambda: changed("rwkv-offsets/world", lambda at: np.minimum(at, 8), "offsets"),
    "the halves of a character apart": lambda: other("rwkv-decode/halves", tokens=[196]),
    "another token": lambda: other("rwkv-decode-token/world", token=33156),
    "the bare word first": lambda: changed("rwkv-find/cat", lambda _: 32, "token"),
    "nothing for no token": lambda: (
        "rwkv-decode/end-of-text",
        right("rwkv-decode/end-of-text", Formula.NO_TOKEN_IS_EMPTY),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fails(name: str) -> None:
    call, values = PLANTED[name]()
    assert passes(call, right(call)) and not passes(call, values)


def test_every_function_is_called_and_faulty_once() -> None:
    assert {ROWS[make()[0]].fn for make in PLANTED.values()} == set(RWKV) == {row.fn for row in OURS.values()}
