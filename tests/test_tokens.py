"""candle-mi's tokenizer gives transformers' token ids on a corpus of difficult texts."""

from pathlib import Path

import pytest

from candle_mi_parity.candidate.sources import StoredSource
from candle_mi_parity.candidate.spelling import parse_candidate, stored_releases
from candle_mi_parity.candidate.tokens import TextIds, Tokens, differences, emit_tokens, read_tokens, stored_tokens
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.paths import OUTPUTS, cache_root

CASES = {case.id: case for case in load_cases()}
STORED = [OUTPUTS / f"{release}.json" for release in stored_releases(OUTPUTS)]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return model_directory(CASES["smollm2/hub"].model, cache_root())


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_tokens(path: Path, model_dir: Path) -> None:
    assert differences(stored_tokens(path), model_dir) == []


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.text and case.lane == "default"])
def test_stored_ids_of_the_text_cases(path: Path, name: str) -> None:
    subject = prepare(CASES[name], cache_root())
    assert StoredSource(path).text_ids(subject) == TextIds(subject.tokens[0])


@pytest.mark.rust
def test_live_tokens(model_dir: Path, tmp_path: Path) -> None:
    path = emit_tokens(parse_candidate("0.2.2"), cache_root(), model_dir, tmp_path / "tokens.json", print)
    assert differences(read_tokens(path), model_dir) == []


def test_one_wrong_id_is_seen(model_dir: Path) -> None:
    tokens = stored_tokens(STORED[0])
    encode = [list(ids) if ids is not None else None for ids in tokens.encode]
    assert encode[1]
    encode[1][0] += 1
    spoilt = Tokens(**(dict(tokens) | {"encode": encode}))
    assert len(differences(spoilt, model_dir)) == 1
