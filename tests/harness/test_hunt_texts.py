"""The hunt in texts finds a planted fault in the shortest text, also behind a known difference, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from candle_mi_parity.compare.hunt_result import Cause, Tally
from candle_mi_parity.coverage.tokens_judge import Answers, tokenised
from candle_mi_parity.errors import TraceError
from candle_mi_parity.hunt import texts as module
from candle_mi_parity.hunt.texts import generated, hunt_texts, reductions, special_tokens, texts

SPECIAL = "<|end|>"


class Letters:
    """A tokenizer with one id for each character, and a first id that special tokens add."""

    def __init__(self, seen: Callable[[str], str] = lambda text: text) -> None:
        self._seen = seen

    def __call__(self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> Any:
        seen = self._seen(text)
        spans = [(0, 0)] * add_special_tokens + [(at, at + 1) for at in range(len(seen))]
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in seen], "offset_mapping": spans}

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return "".join(chr(id) for id in ids)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer of the class that its config names; as ``tokenizer.json`` is written it reads é as e."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": SPECIAL}]}))
    monkeypatch.setattr(module, "load_reference", lambda _, written: WRITTEN if written else Letters())
    return tmp_path


WRITTEN = Letters(lambda text: text.replace("é", "e"))


def hunt(one: Letters, directory: Path, version: str = "", name: str = "llama2") -> tuple[Tally, list[Cause]]:
    return hunt_texts(lambda batch: tokenised(one, batch), name, directory, version, 3, 200)


def test_a_right_tokenizer_agrees(directory: Path) -> None:
    tally, causes = hunt(Letters(), directory)
    assert (tally, causes) == (Tally(tried=200, agree=200), [])


def test_a_tokenizer_that_strips_is_found_in_the_shortest_text(directory: Path) -> None:
    _, causes = hunt(Letters(str.strip), directory)
    plain = next(cause for cause in causes if cause.reason == "values")
    assert len(plain.smallest["text"]) == 1
    assert plain.smallest["text"].isspace()
    assert plain.first == "encode"


def test_a_special_token_that_is_not_recognised_is_found(directory: Path) -> None:
    _, causes = hunt(Letters(lambda text: text.replace(SPECIAL, "")), directory)
    assert [(cause.reason, cause.smallest) for cause in causes] == [
        ("values, a special token in the text", {"text": SPECIAL})
    ]


def test_what_is_known_is_subtracted_and_a_fault_behind_it_is_found(directory: Path) -> None:
    tally, causes = hunt(WRITTEN, directory, "0.2.2")
    assert not causes
    assert tally.known["CMI201"] > 5
    behind = Letters(lambda text: text.replace("é", "e").replace("0", "O"))
    _, causes = hunt(behind, directory, "0.2.2")
    assert {cause.smallest["text"] for cause in causes if cause.reason == "values"} == {"0"}


def test_an_unknown_difference_is_explained_by_tokenizer_json(directory: Path) -> None:
    _, causes = hunt(WRITTEN, directory, "0.2.2", "qwen3")
    assert causes[0].explained == "tokenizer.json as it is written"
    assert causes[0].smallest == {"text": "é"}


def test_a_refused_text_and_too_few_answers(directory: Path) -> None:
    def refuses(batch: list[str]) -> Answers:
        found = tokenised(Letters(), batch)
        found["encode"] = [None if "\t" in text else ids for text, ids in zip(batch, found["encode"], strict=True)]
        return found

    _, causes = hunt_texts(refuses, "llama2", directory, "", 3, 200)
    assert [cause.smallest for cause in causes if cause.reason == "refused"] == [{"text": "\t"}]
    with pytest.raises(TraceError, match="texts were answered"):
        hunt_texts(lambda batch: tokenised(Letters(), batch[1:]), "llama2", directory, "", 3, 20)


def test_the_texts_are_of_every_kind_and_the_same_for_a_seed(directory: Path) -> None:
    strategy = texts(special_tokens(directory))
    found = generated(strategy, 400, 1)
    assert found == generated(strategy, 400, 1)
    everything = "".join(found)
    assert "" in found
    assert SPECIAL in everything
    assert max(len(text) for text in found) > 200
    assert {ord(letter) >> 16 for letter in everything} >= {0, 1, 14}
    assert not any(0xD800 <= ord(letter) < 0xE000 for letter in everything)
    assert all(any(kind in text for text in found) for kind in ("\u200d", "\u3000", "\u0301", "\x00", "漢", "٣"))


def test_reductions_are_smaller() -> None:
    assert set(reductions("ab")) == {"a", "b", "aa"}
    assert list(reductions("")) == []
