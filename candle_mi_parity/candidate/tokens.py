"""Token ids: candle-mi against transformers on one ``tokenizer.json``, over ``fixtures/texts.json``.

The texts hold Unicode of many scripts, emoji, long white space, code, special tokens in text, the empty string.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.process import EmitterProcess
from candle_mi_parity.candidate.spelling import Candidate
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.models.prepared_case import tokenizer
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.trace.trace import CandleMi, read_json

TIMEOUT_SECONDS = 120.0


class Tokens(BaseModel):
    """What the emitter wrote.

    :ivar encode: ids with the special tokens that the tokenizer adds, None where it refused the text.
    :ivar encode_raw: ids without them.
    :ivar decode: text of the ids of ``encode``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["candle-mi-parity/tokens/1"]
    emitter: str
    candle_mi: CandleMi
    tokenizer_digest: str
    encode: list[list[int] | None]
    encode_raw: list[list[int] | None]
    decode: list[str | None]
    errors: dict[str, str]


def load_texts() -> list[str]:
    """The corpus."""
    texts: list[str] = json.loads((FIXTURES / "texts.json").read_text(encoding="utf-8"))
    return texts


def emit_tokens(candidate: Candidate, cache: Path, model_dir: Path, out: Path, log: Callable[[str], None]) -> Path:
    """Have candle-mi tokenise the corpus; the JSON file it wrote.

    :raises EmitterError: the emitter refused, crashed or hung.
    """
    request = {
        "format": "candle-mi-parity/tokenize/1",
        "tokenizer": str(model_dir / "tokenizer.json"),
        "texts": load_texts(),
        "out": str(out),
    }
    with EmitterProcess(build(candidate, cache, log).path) as emitter:
        return emitter.emit(request, TIMEOUT_SECONDS)


def read_tokens(path: Path) -> Tokens:
    """:raises TraceError: not such a file."""
    try:
        return Tokens.model_validate(read_json(path))
    except ValidationError as error:
        raise TraceError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error


def differences(tokens: Tokens, model_dir: Path) -> list[str]:
    """One line for each text whose ids or decoded text are not transformers'; token ids have no tolerance.

    :raises TraceError: another tokenizer, or another number of texts.
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
