"""``transformer-lens``: it agrees where it does, a wrong map of its hooks fails, and what it lacks is said.

The first half runs TransformerLens and is skipped without it; the second needs none.
"""

import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from candle_mi_parity.candidate.program import ProgramSource
from candle_mi_parity.candidate.sources import Source, open_source
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.compare.verdict import Outcome, Status
from candle_mi_parity.spec.paths import ROOT, cache_root
from tests.support.planting import CASES, judged

LENS = ROOT / "candle_mi_parity" / "candidate" / "lens.py"
PORT = ROOT / "docs" / "examples" / "port.py"

needs_lens = pytest.mark.skipif(
    importlib.util.find_spec("transformer_lens") is None,
    reason="TransformerLens is not installed: pip install '.[lens]' beside this suite's packages",
)


def program(text: str, out: Path) -> Source:
    """A program in Python as a candidate."""
    path = out / "program.py"
    path.write_text(text, encoding="utf-8")
    return open_source(
        parse_candidate(f"command:{shlex.join([sys.executable, str(path)])}"), cache_root(), out / "traces", print
    )


@pytest.fixture(scope="module")
def lens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    out = tmp_path_factory.mktemp("lens")
    with open_source(parse_candidate("transformer-lens"), cache_root(), out, print) as source:
        assert isinstance(source, ProgramSource)
        yield source


AGREE = (
    "llama/hub",
    "mistral/hub",
    "qwen2/hub",
    "qwen3/hub",
    "gemma/hub",
    "phi3/hub",
    "starcoder2/hub",
    "qwen3/edit-qkv",
    "llama/edit-steer-set",
    "llama/edit-knockout",
    "llama/edit-zero-attention",
    "llama/pretrained-shards-beside",
)


@needs_lens
@pytest.mark.parametrize("case", AGREE)
def test_it_agrees(lens: Source, case: str) -> None:
    found = judged(CASES[case], lens)
    assert (found.status, found.error, found.notes) == (Status.PASS, "", [])
    assert {tensor.status for tensor in found.tensors} == {Status.PASS}


@needs_lens
def test_scores_before_a_soft_cap_are_not_compared_and_the_case_says_so(lens: Source) -> None:
    found = judged(CASES["gemma2/tie"], lens)
    assert (found.status, found.error) == (Status.PASS, "")
    assert "blocks.0.attn.hook_scores" not in {tensor.name for tensor in found.tensors}
    assert found.notes == [
        "not compared: blocks.0.attn.hook_scores: TransformerLens hooks attention scores behind the soft cap only"
    ]


LACKS = {
    "llama/sae-topk": "has no SAEs",
    "llama/recurrent": "has no recurrent passes",
    "llama/awq-32": "a quantised checkpoint",
    "llama/edit-clt": "for the edit clt_inject",
    "gemma2/edit-scale-attention": "behind the soft cap",
}


@needs_lens
@pytest.mark.parametrize("case", LACKS)
def test_what_it_lacks_is_absent_and_no_pass(lens: Source, case: str) -> None:
    found = judged(CASES[case], lens)
    assert (found.outcome, found.status) == (Outcome.ABSENT, Status.UNMEASURED)
    assert LACKS[case] in found.error


MISTAKES = {
    "its own mlp.hook_pre": (
        ('    "mlp.hook_pre": "mlp.hook_in",\n', ""),
        "llama/hub",
        "blocks.0.mlp.hook_pre",
    ),
    "queries before the norm": (
        ('"attn.hook_q": "attn.hook_q_normed", ', ""),
        "qwen3/hub",
        "blocks.0.attn.hook_q",
    ),
    "heads not transposed": (
        ('("attn.hook_q", "attn.hook_k", "attn.hook_v")', '("attn.hook_q", "attn.hook_k")'),
        "llama/hub",
        "blocks.0.attn.hook_v",
    ),
    "the norm before its weight": (
        ("ln_final.hook_out", "ln_final.hook_normalized"),
        "llama/hub",
        "hook_final_norm",
    ),
    "captured behind the edit": (
        ("        changed = there\n", "        changed = self.found[name] = self._changes[name][0](there)\n"),
        "llama/edit-scale-stream",
        "hook_embed",
    ),
    "masked scores edited": (
        ("torch.where(seen, changed, there)", "changed"),
        "llama/edit-zero-attention",
        "blocks.1.attn.hook_pattern",
    ),
}
"""What is replaced in the program's source, a case, and where it then fails first."""


@needs_lens
@pytest.mark.every(3)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_map_fails(tmp_path: Path, mistake: str) -> None:
    replaced, case, where = MISTAKES[mistake]
    text = LENS.read_text(encoding="utf-8")
    assert text.count(replaced[0]) == 1
    with program(text.replace(*replaced), tmp_path) as source:
        found = judged(CASES[case], source)
    assert found.status is Status.FAIL, found.error
    assert found.first_divergence is not None and found.first_divergence.name == where


def test_without_transformer_lens_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    candidate = parse_candidate("transformer-lens")
    assert not candidate.is_candle_mi and not candidate.has_source
    monkeypatch.setattr(metadata, "version", none)
    with pytest.raises(CandidateError, match=r"is not installed; pip install 'candle-mi-parity\[lens\]'"):
        open_source(candidate, cache_root(), tmp_path, print)


@pytest.mark.parametrize(("version", "works"), [("2.16.1", False), ("4.2.9", False), ("4.3.0", True), ("10.0", True)])
def test_an_older_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, works: bool) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if works:
        open_source(parse_candidate("transformer-lens"), cache_root(), tmp_path, print).__exit__()
        return
    with pytest.raises(CandidateError, match=f"TransformerLens is {version}, expected 4.3 or later"):
        open_source(parse_candidate("transformer-lens"), cache_root(), tmp_path, print)


def declaring(absent: dict[str, str], left_out: tuple[str, ...], out: Path) -> Source:
    """The numpy port, which leaves out the tensors whose names end so, and declares some as absent."""
    text = PORT.read_text(encoding="utf-8")
    for old, new in (
        ('"scalars": {},', f'"scalars": {{}}, "absent": {json.dumps(absent)},'),
        (
            "write(asked, run(asked))",
            f"write(asked, {{k: v for k, v in run(asked).items() if not k.endswith({left_out})}})",
        ),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return program(text, out)


def test_a_program_may_say_what_it_does_not_have(tmp_path: Path) -> None:
    why = {f"blocks.{layer}.attn.hook_scores": "no hook" for layer in range(3)}
    with declaring(why, ("hook_scores",), tmp_path) as source:
        found = judged(CASES["llama/hub"], source)
    assert (found.status, found.compared) == (Status.PASS, 41)
    assert found.notes == [f"not compared: {', '.join(why)}: no hook"]


UNTRUE = {
    "logits": ({"logits": "none"}, ("logits",), "logits is no hook point, and cannot be absent"),
    "a tensor that is given": ({"hook_embed": "none"}, (), "tensors given and absent: hook_embed"),
    "fewer than are missing": ({"hook_embed": "none"}, ("hook_embed", "hook_q"), "blocks.0.attn.hook_q"),
}


@pytest.mark.parametrize("what", UNTRUE)
def test_a_false_declaration_does_not_pass(tmp_path: Path, what: str) -> None:
    absent, left_out, said = UNTRUE[what]
    with declaring(absent, left_out, tmp_path) as source:
        found = judged(CASES["llama/hub"], source)
    first = found.first_divergence
    assert found.status in (Status.FAIL, Status.ERROR)
    assert said in (first.name if first else found.error)


def test_reports_stand_side_by_side(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("columns", ROOT / "docs" / "examples" / "columns.py")
    assert spec is not None and spec.loader is not None
    columns = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(columns)
    worst = {"absolute": 0.25, "ratio": "inf"}
    differs = {
        "id": "llama/b",
        "outcome": "diverges",
        "first_divergence": "logits",
        "tensors": [{"name": "logits", "reason": "values", "worst": worst}],
    }
    reports = [
        {"candidate": "torch", "cases": [{"id": "llama/a", "outcome": "agrees"}], "skipped": {}},
        {"candidate": "other", "cases": [differs], "skipped": {"gemma/a": "no SAEs"}},
    ]
    assert columns.table(reports).splitlines()[2:] == [
        "| gemma |  | 1 absent |",
        "| llama | 1 agree | 1 other numbers |",
        "| all | 1 agree | 1 other numbers, 1 absent |",
    ]
    assert columns.divergences(reports[1]).splitlines()[2:] == ["| llama/b | `logits` | 0.25 | inf |"]
