"""``transformer-lens``: it agrees where it does, what is known of it is explained, a wrong map of its hooks fails,
and what it lacks is said.

The first half runs TransformerLens and is skipped without it; the second needs none.
"""

import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from candle_mi_parity.candidate.program import ProgramSource
from candle_mi_parity.candidate.sources import Source, open_source
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Explained, Outcome, Status, TensorResult
from candle_mi_parity.judge.case import Judgement, Progress, judge_case
from candle_mi_parity.judge.explain import hold_table
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.run import run
from candle_mi_parity.spec.explanations import LENS_TABLE, Explanations, load_explanations
from candle_mi_parity.spec.paths import ROOT, cache_root
from candle_mi_parity.trace.trace import CandleMi
from tests.support.planting import CASES, Real, judged, real, real_of

PROGRAM = ROOT / "candle_mi_parity" / "candidate" / "lens.py"
PORT = ROOT / "docs" / "examples" / "port.py"
TABLE = load_explanations(LENS_TABLE)

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
    "rwkv7/hub": "has no model type rwkv7",
}


@needs_lens
@pytest.mark.parametrize("case", LACKS)
def test_what_it_lacks_is_absent_and_no_pass(lens: Source, case: str) -> None:
    found = judged(CASES[case], lens)
    assert (found.outcome, found.status) == (Outcome.ABSENT, Status.UNMEASURED)
    assert LACKS[case] in found.error


KNOWN = {
    "llama/edit-add-stream": "TL001",
    "gemma2/edit-patch-at": "TL001",
    "llama/bidirectional": "TL002",
    "mistral/bidirectional": "TL002",
    "qwen2/bidirectional-window": "TL002",
    "starcoder2/norm-eps": "TL003",
}


@needs_lens
@pytest.mark.every(2)
@pytest.mark.parametrize("case", KNOWN)
def test_what_is_known_of_it_is_pytorchs_numbers_under_a_counterfactual(lens: Source, case: str) -> None:
    found = judge_case(CASES[case], lens, "transformer-lens", cache_root(), TABLE, Progress()).result
    assert found.status is Status.KNOWN and found.explained is not None, found.unexplained
    assert found.explained.ids == [KNOWN[case]] and max(found.explained.ratios.values()) < 4
    others = [row for row in TABLE.explanation if row.id != KNOWN[case]]
    without = Explanations(format=1, explanation=others)
    assert judge_case(CASES[case], lens, "x", cache_root(), without, Progress()).result.status is Status.FAIL


@needs_lens
@pytest.mark.thorough
def test_every_divergence_is_explained_by_a_needed_row(tmp_path: Path) -> None:
    options = RunOptions("transformer-lens", out=tmp_path, only=("traces",), search=0.0)
    result = run(options, lambda count: Progress())
    assert result.verdict is Verdict.KNOWN and result.stale == [] and result.gone == {}
    assert {id for case in result.cases if case.explained for id in case.explained.ids} == set(KNOWN.values())


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
    text = PROGRAM.read_text(encoding="utf-8")
    assert text.count(replaced[0]) == 1
    with program(text.replace(*replaced), tmp_path) as source:
        found = judged(CASES[case], source)
    assert found.status is Status.FAIL, found.error
    assert found.first_divergence is not None and found.first_divergence.name == where


LENS = CandleMi(version="TransformerLens 4.3.0", source="program")


def test_rows_apply_to_the_program_that_they_are_of() -> None:
    assert TABLE.baseline(LENS.version) == TABLE.baseline("TransformerLens 4.4.1") == LENS.version
    assert TABLE.baseline("TransformerLens 4.2.0") == TABLE.baseline("0.2.2") == ""
    candle_mi = load_explanations()
    assert candle_mi.baseline(LENS.version) == "" and candle_mi.baseline("0.2.3-dev") == "0.2.2"
    assert TABLE.lists(LENS.source, LENS.version) and not TABLE.lists(LENS.source, "TransformerLens 4.4.1")
    assert parse_candidate("transformer-lens").table == LENS_TABLE != parse_candidate("command:x").table


def test_a_row_that_no_case_needs_fails() -> None:
    """TL002 and TL003 apply to cases that agree, or to none."""
    tensor = TensorResult("logits", Status.FAIL, position_ratio=1e6, compared=1)
    case = CaseResult("llama/edit-add-stream", "llama", "", Status.KNOWN, "", [tensor])
    case.explained = Explained(["TL001"], "says", "change", {"logits": 1.0})
    result = RunResult("transformer-lens", {}, {}, [case], {}, baseline=LENS.version)
    hold_table([Judgement(case, applicable=("TL001",))], TABLE, LENS, result, whole=True)
    assert [line.partition(",")[0] for line in result.stale] == [
        f"{id} is listed for TransformerLens 4.3.0" for id in ("TL002", "TL003")
    ]
    assert result.verdict is Verdict.FAIL


def under(there: Real, id: str) -> dict[str, np.ndarray]:
    [change] = [row.change for row in TABLE.explanation if row.id == id and row.change is not None]
    return {name: tensor.value for name, tensor in there.oracle.under(change).values().tensors.items()}


@pytest.mark.thorough
def test_an_edit_of_resid_mid_that_reaches_the_mlp_alone() -> None:
    """The stream behind the block is what came before the edit, and what the MLP made of the edited."""
    whole = CASES["llama/edit-zero-and-add"]
    [edit] = [edit for edit in whole.edits if edit.hook == "blocks.0.hook_resid_mid" and edit.kind == "zero"]
    there = real_of(whole.model_copy(update={"edits": [edit]}))
    right, found = there.oracle.values().tensors, under(there, "TL001")
    before, output, behind = (f"blocks.0.hook_{name}" for name in ("resid_mid", "mlp_out", "resid_post"))
    np.testing.assert_allclose(found[behind], found[before] + found[output], rtol=0, atol=1e-14)
    np.testing.assert_array_equal(found[output], right[output].value)
    np.testing.assert_allclose(right[behind].value, right[output].value, rtol=0, atol=1e-14)


@pytest.mark.thorough
def test_a_layer_without_a_mask_alone_becomes_causal() -> None:
    there = real("qwen2/bidirectional-window")
    found = under(there, "TL002")
    full, window = (found[f"blocks.{layer}.attn.hook_pattern"][0] for layer in (0, 1))
    assert not np.triu(full, 1).any() and np.triu(window, 1).any()
    assert np.triu(there.truth.tensors["blocks.0.attn.hook_pattern"].value, 1).any()


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
