"""A case with a text: candle-mi's own tokenizer has to give transformers' ids (public case E3)."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.sources import Source, StatelessSource, StoredSource
from candle_mi_parity.candidate.store import Storing, StoringSource
from candle_mi_parity.candidate.tokens import TextIds, text_ids
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.run.diff import Pair, PairedSource
from candle_mi_parity.spec.cases import Case, LocalModel
from candle_mi_parity.trace.trace import InMemory
from tests.support.planting import CASES, RELEASE, judged, real

TEXT = "The capital of"
WITH_SPACE, WITHOUT_SPACE = [1, 100, 101], [1, 99, 101]
"""The first ids with the space that tokenizer.json puts before the first word, and without it."""


def model(directory: Path, **config: object) -> Case:
    """A tiny Llama with a tokenizer whose Metaspace prepends a space, as far as ``tokenizer_config.json`` lets it."""
    shutil.copytree(real("llama/hub").subject.model_dir, directory)
    letters = ["<unk>", "<s>", "</s>", "▁", *(chr(code) for code in range(33, 127))]
    vocabulary, merges = {letter: index for index, letter in enumerate(letters)}, []
    for one, other in (("T", "h"), ("Th", "e"), ("▁", "The"), ("▁", "c")):
        merges.append((one, other))
        vocabulary[one + other] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer"} | special | config)
    )
    row = {"id": "llama/text", "tokens": None, "text": TEXT, "model": LocalModel(source="local", path=str(directory))}
    return CASES["llama/hub"].model_copy(update=row)


@dataclass
class Asked(StatelessSource):
    """torch's numbers, with a tokenizer that gives a fixed answer."""

    answer: TextIds | EmitterError
    identity = RELEASE

    def text_ids(self, subject: PreparedCase) -> TextIds:
        if isinstance(self.answer, EmitterError):
            raise self.answer
        return self.answer

    def trace(self, *asked: Any) -> InMemory:
        return TorchSource().trace(*asked)


def test_other_ids_fail_before_anything_is_computed(tmp_path: Path) -> None:
    case = model(tmp_path / "model", add_prefix_space=False)
    ids = prepare(case, tmp_path).tokens[0]
    assert ids[:3] == WITHOUT_SPACE
    found = judged(case, Asked(TextIds([*WITH_SPACE, *ids[3:]])), tmp_path)
    assert (found.status, found.compared, found.expected) == (Status.FAIL, 1, 1)
    first = found.first_divergence
    assert first is not None and first.name == "tokens"
    assert "gives other ids from place 1 on" in first.detail
    assert first.detail.endswith(f"got {[*WITH_SPACE, *ids[3:]]}, transformers gives {ids}")
    assert first.detail in found.message() and not (tmp_path / "truth").exists(), "nothing was computed"
    same = judged(case, Asked(TextIds(ids)), tmp_path)
    assert (same.status, same.notes) == (Status.PASS, []) and same.compared > 40
    assert judged(case, Asked(TextIds(ids[1:])), tmp_path).status is Status.FAIL, "the BOS is missing"
    assert judged(case, Asked(TextIds([*ids, 2])), tmp_path).status is Status.FAIL, "an EOS too many"


def test_a_tokenizer_that_was_not_asked_is_noted_and_a_refused_text_is_a_refused_case(tmp_path: Path) -> None:
    case = model(tmp_path / "model")
    found = judged(case, Asked(TextIds(why="its ids are not stored for this case")), tmp_path)
    assert found.status is Status.PASS
    assert found.notes == ["candle-mi's tokenizer was not asked: its ids are not stored for this case"]
    with TorchSource() as control:
        assert judged(case, control, tmp_path).notes == [], "transformers has no tokenizer beside its own"
    asked = text_ids(EmitterProcess(Path("/nonexistent")), RELEASE, tmp_path, TEXT, tmp_path / "out.json")
    assert asked.ids is None and "no tokenizer.json" in asked.why
    found = judged(case, Asked(EmitterError("model", "tokenizer: no such thing")), tmp_path)
    assert found.failure is not None and found.failure.refused
    assert found.error == "model: tokenizer: no such thing" and not found.tensors


def test_each_side_of_a_diff_is_asked(tmp_path: Path) -> None:
    subject = prepare(model(tmp_path / "model"), tmp_path)
    pair = Pair(Asked(TextIds([1])), Asked(TextIds([2])))
    assert [PairedSource(pair, side).text_ids(subject).ids for side in (0, 1)] == [[1], [2]]


# --- what is stored


def stored(index: Path, subject: PreparedCase, answer: TextIds | EmitterError) -> StoredSource:
    refused = pytest.raises(EmitterError) if isinstance(answer, EmitterError) else nullcontext()
    with Storing(index, whole=True) as keep, refused:
        StoringSource(Asked(answer), keep).text_ids(subject)
    return StoredSource(index)


def test_stored_ids_and_a_stored_refusal_are_read_back(tmp_path: Path) -> None:
    subject = prepare(model(tmp_path / "model"), tmp_path)
    index = tmp_path / "kept" / "release.json"
    assert stored(index, subject, TextIds([1, 7])).text_ids(subject) == TextIds([1, 7])
    asked = stored(index, subject, TextIds(why="not asked")).text_ids(subject)
    assert asked.ids is None and asked.why
    refusing = stored(index, subject, EmitterError("model", "tokenizer: no"))
    assert judged(subject.case, refusing, tmp_path).error == "model: tokenizer: no"


def test_stored_ids_of_another_text_or_tokenizer_are_stale(tmp_path: Path) -> None:
    case = model(tmp_path / "model")
    subject = prepare(case, tmp_path)
    source = stored(tmp_path / "kept" / "release.json", subject, TextIds(subject.tokens[0]))
    other = case.model_copy(update={"text": "The capitals"})
    for stale in (other, model(tmp_path / "other").model_copy(update={"id": case.id})):
        if stale is not other:
            path = tmp_path / "other" / "tokenizer.json"
            path.write_text(path.read_text() + "\n")
        found = judged(stale, source, tmp_path)
        assert found.status is Status.ERROR and "of another case, text or tokenizer.json" in found.error
    (path,) = (tmp_path / "kept" / "traces").rglob("*.json")
    path.write_text(path.read_text().replace(": [", ": [7, "))
    assert "its bytes have sha256" in judged(case, source, tmp_path).error


@pytest.mark.rust
def test_candle_mi_does_not_read_tokenizer_config(live: Source, tmp_path: Path) -> None:
    """Its released tokenizer reads ``tokenizer.json`` alone, where transformers honours ``add_prefix_space`` too."""
    found = judged(model(tmp_path / "model", add_prefix_space=False), live, tmp_path)
    expected = (f"got {str(WITH_SPACE)[:-1]}", f"transformers gives {str(WITHOUT_SPACE)[:-1]}")
    assert found.status is Status.FAIL and all(part in found.message() for part in expected)
    shutil.rmtree(tmp_path / "model")
    twin = judged(model(tmp_path / "model"), live, tmp_path)
    assert (twin.status, twin.notes) == (Status.PASS, []), twin.message()
