"""Token ids: candle-mi's tokenizer against transformers', on a case's text and on ``fixtures/texts.json``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.spelling import Candidate
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.files.untrusted import read_json, validated
from candle_mi_parity.models.prepared_case import tokenizer
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.trace.release import StoredRelease, text_name
from candle_mi_parity.trace.trace import CandleMi, Part

TIMEOUT_SECONDS = 120.0


class Tokens(Part):
    """The token ids of a corpus, as the emitter writes them.

    :ivar encode: ids with the special tokens that the tokenizer adds; None for a refused text.
    :ivar encode_raw: ids without special tokens.
    :ivar decode: the decoded text of ``encode``.
    :ivar offsets: first byte and the one after the last of each id in ``encode``, one after the other; None in what
        was stored before offsets were asked.
    """

    format: Literal["candle-mi-parity/tokens/1"]
    emitter: str
    candle_mi: CandleMi
    tokenizer_digest: str
    encode: list[list[int] | None]
    encode_raw: list[list[int] | None]
    decode: list[str | None]
    offsets: list[list[int] | None] | None = None
    errors: dict[str, str]


@dataclass(frozen=True)
class TextIds:
    """The ids that a candidate's own tokenizer gives for a case's text.

    :ivar ids: None if it was not asked.
    :ivar why: why it was not asked; empty if the candidate has no tokenizer of its own.
    """

    ids: list[int] | None = None
    why: str = ""


class TextTokens(Part):
    """The ids of one case's text as they are stored."""

    format: Literal["candle-mi-parity/text/1"] = "candle-mi-parity/text/1"
    case: str
    text: str
    tokenizer_digest: str
    ids: list[int]


def load_texts() -> list[str]:
    """The corpus."""
    texts: list[str] = json.loads((FIXTURES / "texts.json").read_text(encoding="utf-8"))
    return texts


def emit_tokens(candidate: Candidate, cache: Path, model_dir: Path, out: Path, log: Callable[[str], None]) -> Path:
    """Tokenise the corpus with candle-mi; returns the JSON file.

    :raises EmitterError: the emitter refused, crashed or hung.
    """
    with EmitterProcess(build(candidate, cache, log).path) as emitter:
        return tokenize(emitter, model_dir, load_texts(), out)


def tokenize(emitter: EmitterProcess, model_dir: Path, texts: list[str], out: Path, loader: str = "hf") -> Path:
    """Tokenise texts with the ``tokenizer.json`` of a model; returns the JSON file.

    :param loader: ``pretrained`` for the tokenizer that ``MIModel::from_pretrained`` takes.

    :raises EmitterError: the emitter refused, crashed or hung.
    """
    request = {
        "format": "candle-mi-parity/tokenize/1",
        "tokenizer": str(model_dir / "tokenizer.json"),
        "texts": texts,
        "loader": loader,
        "out": str(out),
    }
    return emitter.emit(request, TIMEOUT_SECONDS)


def text_ids(
    emitter: EmitterProcess, identity: CandleMi, model_dir: Path, text: str, out: Path, loader: str = "hf"
) -> TextIds:
    """The ids of one text, with the special tokens that the tokenizer adds.

    :raises EmitterError: candle-mi refused the tokenizer or the text, or the emitter crashed or hung.
    :raises TraceError: the tokens are of another candle-mi or tokenizer.
    """
    if not (model_dir / "tokenizer.json").is_file():
        return TextIds(why="the model has no tokenizer.json, the only format that candle-mi reads")
    tokens = read_tokens(tokenize(emitter, model_dir, [text], out, loader))
    if tokens.candle_mi != identity or tokens.tokenizer_digest != file_digest(model_dir / "tokenizer.json"):
        raise TraceError(f"{out}: the tokens are of another candle-mi or another tokenizer.json")
    if len(tokens.encode) != 1 or (ids := tokens.encode[0]) is None:
        raise EmitterError("model", f"tokenizer: {tokens.errors.get('0', 'no ids')}")
    return TextIds(ids)


def stored_text_ids(stored: StoredRelease, case: str, text: str, model_dir: Path) -> TextIds:
    """The ids that were stored for a case.

    :raises TraceError: they are of another candle-mi, text or tokenizer.
    """
    found = stored.release.cases.get(case)
    if found is None or found.text is None:
        return TextIds(why="its ids are not stored for this case")
    document = stored.document(text_name(case), found.text)
    tokens = validated(TextTokens, document, f"{stored.index}: {case}", TraceError)
    expected = (case, text, file_digest(model_dir / "tokenizer.json"))
    if (tokens.case, tokens.text, tokens.tokenizer_digest) != expected:
        raise TraceError(f"{stored.index}: the ids of {case} are of another case, text or tokenizer.json")
    return TextIds(tokens.ids)


def read_tokens(path: Path) -> Tokens:
    """:raises TraceError: the file is not valid."""
    return validated(Tokens, read_json(path, TraceError), path, TraceError)


def stored_tokens(index: Path) -> Tokens:
    """The tokenised corpus of a stored release.

    :raises TraceError: none is stored, or the file is not valid.
    """
    stored = StoredRelease(index)
    if stored.release.tokens is None:
        raise TraceError(f"{index}: the corpus is not stored")
    document = stored.document("tokens", stored.release.tokens, "emitter", "candle_mi")
    return validated(Tokens, document, index, TraceError)


def differences(tokens: Tokens, model_dir: Path) -> list[str]:
    """One line for each text whose ids or decoded text differ from transformers'.

    :raises TraceError: the tokens are of another tokenizer or of another number of texts.
    """
    texts = load_texts()
    if tokens.tokenizer_digest != file_digest(model_dir / "tokenizer.json"):
        raise TraceError("the tokens are of another tokenizer.json")
    if not len(texts) == len(tokens.encode) == len(tokens.encode_raw) == len(tokens.decode):
        raise TraceError(f"{len(tokens.encode)} texts were tokenised, the corpus has {len(texts)}")
    reference: Any = tokenizer(model_dir)
    lines = []
    for index, text in enumerate(texts):
        ids = reference(text)["input_ids"]
        expected = {
            "encode": ids,
            "encode_raw": reference(text, add_special_tokens=False)["input_ids"],
            "decode": reference.decode(ids, clean_up_tokenization_spaces=False),
        }
        for name, value in expected.items():
            if (got := getattr(tokens, name)[index]) != value:
                lines.append(f"text {index} {text[:30]!a}: {name} gives {got!a}, expected {value!a}")
    return lines
