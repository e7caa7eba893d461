"""What ``repro`` takes as it is, takes in part, or refuses in one sentence."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.repro.command import named, repro
from candle_mi_parity.repro.crate import Dependencies
from candle_mi_parity.repro.prove import TestOutcome
from candle_mi_parity.repro.repro import RefusedError, ReproError, reproduce
from candle_mi_parity.repro.write import Origin, write_folder
from candle_mi_parity.spec.cases import Case, load_cases, select
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import FIXTURES, cache_root
from candle_mi_parity.trace.trace import CandleMi, InMemory
from candle_mi_parity.trace.truth import Truth
from tests.support.command import command, one_line


class Odd(TorchSource):
    """The control, whose logits are wrong for some token ids."""

    def __init__(self, meets: Callable[[list[list[int]]], bool]) -> None:
        super().__init__()
        self._meets = meets

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        made = super().trace(subject, mode, truth, inputs)
        if self._meets(subject.tokens):
            made.arrays["logits"] = (made.arrays["logits"][0] * 1.01, None)
        return made


def case_of(id: str) -> Case:
    [case] = select(load_cases(), [id])
    return case


def test_of_a_batch_the_row_that_diverges_is_kept(tmp_path: Path) -> None:
    case = Case.model_validate({
        "id": "llama/planted",
        "model": {"source": "tiny", "config": "models/llama.json", "dialect": "hub", "change": {"rope_theta": 100.0}},
        "tokens": {"random": 3, "batch": 2},
    })  # fmt: skip
    rows = prepare(case, tmp_path / "cache").tokens
    assert rows[0][2] > 8 and rows[0][1:] != rows[1][1:]
    second = Odd(lambda tokens: rows[1] in tokens)
    found = reproduce(case, second, tmp_path / "cache", lambda line: None)
    assert list(found.pair.case.tokens) == rows[1] and found.first.name == "logits"
    only_together = Odd(lambda tokens: len(tokens) > 1)
    with pytest.raises(ReproError, match="as a batch of 2, and no row of it does alone"):
        reproduce(case, only_together, tmp_path / "cache", lambda line: None)


def test_a_refusal_says_who_refuses_and_what_transformers_does(tmp_path: Path) -> None:
    class Refusing(TorchSource):
        def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
            raise EmitterError(kind, "config error: no such thing")

    kind = "crash"
    with pytest.raises(EmitterError):
        reproduce(case_of("llama/hub"), Refusing(), tmp_path, lambda line: None)
    kind = "model"
    with pytest.raises(RefusedError) as raised:
        reproduce(case_of("llama/hub"), Refusing(), tmp_path, lambda line: None)
    assert re.fullmatch(
        r"llama/hub: candle-mi refuses it, and transformers computes it, with \d+ tensors to compare; there is no "
        r"number of candle-mi's to reproduce\. Its message is: model: config error: no such thing",
        str(raised.value),
    )


def test_a_run_offers_no_command_that_repro_refuses(tmp_path: Path) -> None:
    table = load_explanations()
    for id, offered in ("llama/hub", True), ("llama/edit-add-attention", False):
        source = Odd(lambda tokens: True)
        result = judge_case(case_of(id), source, "0.2.2", tmp_path, table, Progress()).result
        assert result.status is Status.FAIL and bool(result.shrink) is offered
        told = [note for note in result.notes if note.startswith("`repro` makes no Rust test of this: ")]
        assert len(told) == (not offered)


@pytest.mark.thorough
def test_a_quantised_checkpoint_is_reproduced_as_it_is(tmp_path: Path) -> None:
    case = case_of("llama/nf4-128")
    found = reproduce(case, Odd(lambda tokens: True), cache_root(), lambda line: None)
    checkout = "0.2.2 of `path:../candle-mi` (not the release; sha256 of its files bb)"
    write_folder(found, Origin(checkout, "again", ""), Dependencies("", "", None, b"", tmp_path), tmp_path / "folder")
    [test] = (tmp_path / "folder" / "tests").glob("*.rs")
    model, issue = test.with_suffix("") / "model", (tmp_path / "folder" / "ISSUE.md").read_text()
    assert (model / "model.safetensors").read_bytes() == (
        FIXTURES / "quantized/nf4-128/model.safetensors"
    ).read_bytes()
    assert "MIModel::from_pretrained(&" in test.read_text() and found.first.name == "logits"
    assert "copy tests/*" not in issue and "candle-mi 0.2.2 of `path:../candle-mi` (not the release;" in issue
    script = tmp_path / "folder" / "check.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert found.first.worst is not None
    assert float(done.stdout) == pytest.approx(found.first.worst.expected, rel=1e-5)


def test_a_checkout_is_not_named_as_the_release() -> None:
    release = CandleMi(version="0.2.2", source="registry", checksum="a" * 64, revision=None, tree_digest=None)
    changed = release.model_copy(update={"source": "path", "checksum": None, "tree_digest": "b" * 64})
    assert named(release, "0.2.2") == "0.2.2"
    assert named(changed, "path:../it") == f"0.2.2 of `path:../it` (not the release; sha256 of its files {'b' * 64})"


@pytest.mark.thorough
@pytest.mark.rust
@pytest.mark.xdist_group("repro")
def test_the_rust_test_of_a_quantised_checkpoint_loads_it_and_compares(tmp_path: Path) -> None:
    [found] = repro("llama/nf4-nested-320", "0.2.2", tmp_path, cache_root(), lambda line: None, proof=True)
    assert found.proof is TestOutcome.DIFFERS
    assert (
        "the first that differs is model.layers.0.self_attn.k_proj.weight" in (found.folder / "ISSUE.md").read_text()
    )


@pytest.mark.rust
@pytest.mark.parametrize(
    "case, message",
    [
        ("rwkv7/edit-resid-pre", "no Rust test is written for add at blocks.1.hook_resid_pre"),
        ("llama/hub", "nothing diverges"),
        ("llama/edit-add-attention", "no Rust test is written"),
        ("llama/awq-one-group", "This is known: CMI069, "),
    ],
)
def test_what_cannot_be_reproduced_is_one_line(tmp_path: Path, case: str, message: str) -> None:
    assert message in one_line(command("repro", case, "--out", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_stored_candidate_cannot_be_asked(tmp_path: Path) -> None:
    message = one_line(command("repro", "llama/v5", "--candidate", "stored:0.2.2", "--out", str(tmp_path)))
    assert "`repro` must build candle-mi" in message
