"""Judge candle-mi's tokenizer on real tokenizers: ids with and without special tokens, texts and offsets, exactly.

candle-mi documents offsets in bytes; those of transformers, which counts characters, are converted.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from candle_mi_parity.candidate.sources import LiveSource
from candle_mi_parity.candidate.tokens import Tokens, load_texts, read_tokens, tokenize
from candle_mi_parity.compare.verdict import CaseResult, Explained, Status, TensorResult
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.cache import cached, content_key, publish
from candle_mi_parity.files.digest import digest_files, file_digest
from candle_mi_parity.files.versions import version
from candle_mi_parity.judge.case import taking_errors
from candle_mi_parity.models.prepared_case import tokenizer
from candle_mi_parity.models.tokenizers import FILES, KnownTokenizer
from candle_mi_parity.oracle.provenance import library_versions

KINDS = ("encode", "encode_raw", "decode", "offsets")
Answers = dict[str, list[Any]]


def judge_tokenizer(
    name: str, directory: Path, source: LiveSource, known: KnownTokenizer | None, cache: Path, out: Path, again: str
) -> CaseResult:
    """One tokenizer on the whole corpus.

    :param directory: holds ``tokenizer.json`` and ``tokenizer_config.json``.
    :param known: the cause that is known of the candidate's release; None if it has to agree.
    """
    result = CaseResult(f"tokens/{name}", "tokens", "", Status.ERROR, again)
    with taking_errors(result):
        result.digest = digest_files([directory / file for file in FILES])
        expected = reference(directory, cache, written=False)  # first: what transformers cannot load is no FAIL
        tokens = _answers(directory, source, cache, out)
        if tokens.candle_mi != source.identity or tokens.tokenizer_digest != file_digest(
            directory / "tokenizer.json"
        ):
            raise TraceError(f"{out}: the tokens are of another candle-mi or another tokenizer.json")
        if tokens.offsets is None:
            raise TraceError(f"{out}: there are no offsets")
        judge_tokens(result, tokens, expected)
        if result.status is Status.FAIL and known is not None:
            _explain(result, tokens, directory, cache, known)
    return result


def _answers(directory: Path, source: LiveSource, cache: Path, out: Path) -> Tokens:
    """The answers of a build on the corpus; a large tokenizer takes seconds to load, so that they are asked once.

    :raises EmitterError: candle-mi refuses the tokenizer, or the emitter crashes or hangs.
    :raises TraceError: the answer is invalid.
    """

    def ask(to: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tokenize(source.emitter, directory, load_texts(), out), to / "answers.json")

    key = content_key(source.build_key, file_digest(directory / "tokenizer.json"), load_texts())
    kept = publish(cache / "answers" / key, ask)
    try:
        return read_tokens(kept / "answers.json")
    except TraceError:  # the file was damaged in the cache, or the answer is invalid
        shutil.rmtree(kept)
        return read_tokens(publish(kept, ask) / "answers.json")


def judge_tokens(result: CaseResult, tokens: Tokens, expected: Answers) -> None:
    """Compare the answers with the expected ones, text by text; offsets if there are some."""
    got = {kind: answers for kind in KINDS if (answers := getattr(tokens, kind)) is not None}
    result.tensors = [_judge(kind, answers, expected[kind]) for kind, answers in got.items()]
    result.expected = len(result.tensors)
    failed = any(tensor.status is Status.FAIL for tensor in result.tensors)
    result.status = Status.FAIL if failed else Status.PASS


def _judge(kind: str, got: list[Any], expected: list[Any]) -> TensorResult:
    texts = load_texts()
    if len(got) != len(texts):
        detail = f"{len(got)} texts were answered, expected {len(texts)}"
        return TensorResult(kind, Status.FAIL, "missing", compared=len(got), exact=True, detail=detail)
    wrong = [place for place in range(len(texts)) if got[place] != expected[place]]
    if not wrong:
        return TensorResult(kind, Status.PASS, compared=len(texts), exact=True)
    first = wrong[0]
    detail = f"text {first} {texts[first][:30]!a} gives {got[first]!a}, expected {expected[first]!a}"
    return TensorResult(
        kind, Status.FAIL, "values", compared=len(texts), past=len(wrong), exact=True, detail=detail[:600]
    )


def _explain(result: CaseResult, tokens: Tokens, directory: Path, cache: Path, known: KnownTokenizer) -> None:
    """KNOWN if every answer is that of ``tokenizer.json`` as it is written."""
    under = CaseResult(result.id, "tokens", "", Status.FAIL, "")
    judge_tokens(under, tokens, reference(directory, cache, written=True))
    if under.status is Status.PASS:
        ratios = {tensor.name: 0.0 for tensor in under.tensors}
        result.explained = Explained([known.id], known.says, "tokenizer.json as it is written", ratios, known.remedy)
        result.status = Status.KNOWN
    else:
        first = next(tensor for tensor in under.tensors if tensor.status is Status.FAIL)
        result.unexplained = f"not {known.id}: {first.name} is not that of tokenizer.json as written: {first.detail}"


def reference(directory: Path, cache: Path, written: bool) -> Answers:
    """transformers' answers on the corpus, from the cache or computed.

    :param written: of ``tokenizer.json`` as it is written, in place of the class that the config names.
    :raises ModelError: transformers cannot load the tokenizer.
    """
    libraries = library_versions() | {"tokenizers": version("tokenizers")}
    key = [digest_files([directory / file for file in FILES]), load_texts(), libraries, written, KINDS]
    return dict(cached(cache, "tokens", key, lambda: _compute(directory, written)))


def _compute(directory: Path, written: bool) -> Answers:
    return tokenised(load_reference(directory, written), load_texts())


def load_reference(directory: Path, written: bool) -> Any:
    """transformers' tokenizer.

    :param written: of ``tokenizer.json`` as it is written, in place of the class that the config names.
    :raises ModelError: transformers cannot load it.
    """
    return AsWritten(directory) if written else tokenizer(directory)


class AsWritten:
    """``tokenizer.json`` by the tokenizers library alone, which obeys its ``truncation`` and ``padding``.

    transformers switches both off, unless the call asks for them.
    """

    def __init__(self, directory: Path) -> None:
        import tokenizers

        self._read = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))

    def __call__(self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = True) -> Any:
        found = self._read.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": found.ids, "offset_mapping": found.offsets}

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool = False) -> str:
        return str(self._read.decode(ids, skip_special_tokens=False))


def tokenised(one: Any, texts: list[str]) -> Answers:
    """The answers of one of transformers' tokenizers."""
    encoded = [one(text, return_offsets_mapping=True) for text in texts]
    ids = [each["input_ids"] for each in encoded]
    return {
        "encode": ids,
        "encode_raw": [one(text, add_special_tokens=False)["input_ids"] for text in texts],
        "decode": [one.decode(row, clean_up_tokenization_spaces=False) for row in ids],
        "offsets": [
            [place for span in each["offset_mapping"] for place in in_bytes(text, span)]
            for text, each in zip(texts, encoded, strict=True)
        ],
    }


def in_bytes(text: str, span: tuple[int, int]) -> tuple[int, int]:
    """A range of characters as one of bytes."""
    start, end = (len(text[:at].encode()) for at in span)
    return start, end
