"""``check``: the answer about a user's own model, on copies of which only the config can be recognised.

The candidates here need no Rust: what release 0.2.2 stored, given under the user's names; torch's own float32; and
tensors that a user dumped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from candle_mi_parity import check
from candle_mi_parity.candidate.sources import NothingOpen, StoredSource
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.cli.check import check_and_write
from candle_mi_parity.compare.check_result import CheckResult
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.errors import ParityError
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.judge.known import facts_of
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.prepared_case import Subject, prepare
from candle_mi_parity.report.check_page import foretold_lines, lines, page
from candle_mi_parity.report.views import Interrupted
from candle_mi_parity.run import check as service
from candle_mi_parity.run.check import CheckOptions
from candle_mi_parity.run.check_inputs import Prompt, built_in, prompts_of
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import ROOT, cache_root
from candle_mi_parity.trace.trace import Emitted, InMemory
from candle_mi_parity.trace.truth import Truth
from tests.support.command import command, one_line
from tests.support.planting import CASES, Arrays, changed_model, real, rerun
from tests.support.results import HOSTILE
from tests.support.stored import INDEX

FAMILIES = {
    "llama": 16,
    "gemma2": 14,
    "mistral": 6,
    "phi3": 6,
    "starcoder2": 5,
    "qwen3": 5,
    "qwen2": 4,
    "gemma": 3,
    "smollm2": 1,
}
"""Family → at least how many of its cases 0.2.2 computes otherwise in a known way."""


class Hers(NothingOpen):
    """What is stored of a case of the table, under the user's own name for it."""

    def __init__(self, case: Case) -> None:
        self._case, self._stored = case, StoredSource(INDEX)
        self.identity = self._stored.identity

    def trace(self, subject: Subject, mode: Mode, truth: Truth, inputs: Path) -> Emitted:
        return self._stored.trace(replace(subject, case=self._case), mode, truth, inputs)


def hers(case: Case, out: Path) -> CheckResult:
    """A case of the table as a user has it: a copy of its model and SAE, her own prompt and interventions."""
    subject = prepare(case, cache_root())
    shutil.copytree(subject.model_dir, out / "mine")
    sae = None
    if case.sae and subject.sae_file:
        sae = out / subject.sae_file.name  # which is in its digest
        (shutil.copytree if subject.sae_file.is_dir() else shutil.copy)(subject.sae_file, sae)
    options = CheckOptions(
        model=str(out / "mine"),
        prompts=(Prompt(id="p1", tokens=subject.tokens[0]),),
        sae=str(sae) if sae else None,
        hook=case.sae.hook if case.sae else None,
        edits=tuple(case.edits),
        dtype=case.dtype,
        out=out,
        search=0,
    )
    return service.check(options, opened=lambda: Hers(case))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sentence_names_the_explanation_of_every_known_divergence(family: str, tmp_path: Path) -> None:
    table, stored = load_explanations(), StoredSource(INDEX)
    rows = {row.id: row for row in table.explanation}
    seen = 0
    for case in CASES.values():
        if case.family != family or case.lane != "default":
            continue
        subject = prepare(case, cache_root())
        if not any(row.change for row in table.applicable(facts_of(subject), "0.2.2")) or len(subject.tokens) > 1:
            continue
        expected = judge_case(case, stored, "stored:0.2.2", cache_root(), table, Progress()).result.explained
        if expected is None or not expected.change:
            continue
        result = hers(case, tmp_path / case.id.replace("/", "-"))
        assert result.verdict is Verdict.FAIL, f"{case.id}: a known divergence of her model is a divergence"
        assert f"({', '.join(expected.ids)})" in result.sentence, f"{case.id}: {result.sentence}"
        assert expected.says in result.sentence and expected.change in result.sentence
        told = {found.id for found in result.forecast}
        unseen = [id for id in expected.ids if id not in told and not all(c.of_edit for c in rows[id].conditions)]
        assert not unseen, f"{case.id}: {unseen} could have been told from the config alone"
        seen += 1
    assert seen >= FAMILIES[family], f"{family}: only {seen}"


def test_a_model_that_agrees(tmp_path: Path) -> None:
    result = hers(CASES["llama/hub"], tmp_path)
    assert result.agrees
    assert result.sentence.startswith(
        "candle-mi 0.2.2 computes PyTorch's numbers on this model: 44 tensors, 1 prompt"
    )
    assert result.not_exercised == [
        "max_position_embeddings 512: prompts are at most 24 tokens. It takes a prompt longer than 512 tokens to "
        "see: A prompt longer than max_position_embeddings is refused: the rotary table ends there. (CMI029)"
    ]
    found = result.prompts[0].matters
    assert found is not None and found.top1 == found.positions == 24 and found.kl_max < 1e-9 and found.kl_mean


def test_a_refusal_is_told_in_candle_mis_words(tmp_path: Path) -> None:
    result = hers(CASES["llama/rope-yarn"], tmp_path)
    assert result.verdict is Verdict.FAIL
    assert "refuses this model: This kind of rope_scaling is not implemented" in result.sentence
    assert 'unsupported rope_scaling type "yarn"' in result.sentence


def test_the_config_alone_is_told_first_and_without_torch(tmp_path: Path) -> None:
    mine = changed_model(tmp_path / "mine", real("llama/v5").subject.model_dir)
    code = f"""import sys
from candle_mi_parity.run.check import CheckOptions, Told, check
from candle_mi_parity.report.check_page import foretold_lines
class First(Told):
    def foretold(self, result):
        print(*foretold_lines(result), sep="\\n")
        print("heavy:", *({{"torch", "transformers"}} & set(sys.modules)))
        sys.exit()
check(CheckOptions(model={str(mine)!r}), First())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, theta, *_, last = done.stdout.splitlines()
    assert first == "0.2.2 does not read 1 of the 24 keys of this model as PyTorch does:"
    assert theta.startswith("  rope_parameters.rope_theta 500000.0: ") and "top level" in theta
    assert last == "heavy:"


def dumped(directory: Path, arrays: Arrays, tokens: list[int]) -> Path:
    """A user's own dump: no batch axis, one file a layer."""
    directory.mkdir()
    (directory / "tokens.json").write_text(json.dumps(tokens))
    files: dict[str, Arrays] = {}
    for name, array in arrays.items():
        files.setdefault(name.split(".")[1] if "." in name else "rest", {})[name] = np.ascontiguousarray(array[0])
    for name, kept in files.items():
        save_file(kept, directory / f"{name}.safetensors")
    return directory


def plain(case_id: str) -> tuple[Path, Arrays, list[int]]:
    there = real(case_id)
    kept = {name: array for name, array in there.arrays.items() if not name.startswith(("lens", "sae"))}
    return there.subject.model_dir, kept, there.subject.tokens[0]


def test_tensors_of_her_own_program_are_judged_and_counted(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    result = check(model, trace=dumped(tmp_path / "whole", arrays, tokens))
    assert result.agrees and result.prompts[0].case.expected == len(arrays) + 2, "its next tokens are judged too"
    assert "The trace in" in result.sentence
    part = {name: arrays[name] for name in ("blocks.1.hook_resid_post", "blocks.2.attn.hook_q")}
    result = check(model, trace=dumped(tmp_path / "part", part, tokens))
    assert result.agrees and [t.name for t in result.prompts[0].case.tensors] == list(part)
    with_hooks = check(model, trace=tmp_path / "whole", hooks=("blocks.1.*",))
    assert {t.name.split(".")[0] for t in with_hooks.prompts[0].case.tensors} == {"blocks", "logits"}
    assert with_hooks.prompts[0].case.expected == 12 + 3


def test_a_fault_in_her_own_program_is_found_and_not_explained(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    arrays["blocks.1.attn.hook_v"] = arrays["blocks.1.attn.hook_v"] * np.float32(1.001)
    result = check(model, trace=dumped(tmp_path / "trace", arrays, tokens), search=5.0)
    assert result.verdict is Verdict.FAIL
    assert "first at blocks.1.attn.hook_v" in result.sentence and "none of" in result.sentence


def test_a_setting_that_her_own_program_does_not_read_is_named(tmp_path: Path) -> None:
    there = real("llama/v5")
    wrong = changed_model(tmp_path / "wrong", there.subject.model_dir, rope_theta=10000.0, rope_parameters=None)
    arrays = {name: array for name, array in rerun(there, wrong).items() if not name.startswith("lens")}
    result = check(there.subject.model_dir, trace=dumped(tmp_path / "trace", arrays, there.subject.tokens[0]))
    assert "rope_theta = 10000.0" in result.sentence and "(CMI001)" in result.sentence


def unknown_name(arrays: Arrays) -> None:
    arrays["blocks.9.hook_resid_post"] = arrays["blocks.0.hook_resid_post"]


def swapped(arrays: Arrays) -> None:
    arrays["blocks.0.attn.hook_q"] = arrays["blocks.0.attn.hook_q"].swapaxes(1, 2)


@pytest.mark.parametrize(
    ("spoil", "tokens", "said"),
    [
        (unknown_name, None, "blocks.9.hook_resid_post is not a hook of this model of 3 layers; did you mean"),
        (swapped, None, "blocks.0.attn.hook_q has shape [24, 4, 20], expected [1, 4, 24, 20] or [4, 24, 20]"),
        (None, [1, 2, 3], "its tokens are [1, 2, 3]"),
        (None, [[1], [2]], "holds 2 prompts"),
        (None, "text", "expected a list of token ids"),
        (dict.clear, None, "holds no *.safetensors"),
    ],
)
def test_a_bad_trace_is_one_line(
    spoil: Callable[[Arrays], None] | None, tokens: Any, said: str, tmp_path: Path
) -> None:
    model, arrays, own = plain("llama/hub")
    if spoil:
        spoil(arrays)
    dumped(tmp_path / "trace", arrays, own if tokens is None else tokens)
    with pytest.raises(ParityError) as caught:
        check(model, tokens=[own], trace=tmp_path / "trace")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_nan_in_a_trace_is_a_divergence(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    arrays["blocks.0.hook_mlp_out"][0, 3, 5] = np.nan
    result = check(model, trace=dumped(tmp_path / "trace", arrays, tokens), search=0.0)
    assert result.verdict is Verdict.FAIL and "blocks.0.hook_mlp_out (∞ of 8, nonfinite)" in result.sentence


def given(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        (tmp_path / name.replace("_", ".")).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "files", "asked", "said"),
    [
        ({}, {}, {"model": "./nowhere"}, "does not exist"),
        ({}, {}, {"prompt": "text"}, "has no tokenizer, which --prompt needs: give token ids with --tokens"),
        ({"quantization_config": {"bits": 4}}, {}, {}, "quantization_config is set"),
        ({}, {"adapter_config.json": "{}"}, {}, "an adapter to another model"),
        ({"hidden_size": 1 << 20}, {}, {}, "are more than"),
        ({}, {}, {"edits": [{"kind": "zero", "hook": "blocks.7.hook_resid_post"}]}, "no such hook point"),
        ({}, {}, {"sae": "./nowhere.npz"}, "SAE ./nowhere.npz does not exist"),
        ({}, {}, {"tokens": [[1, 9999]]}, "outside the vocabulary"),
        ({}, {}, {"candidate": "newest"}, "unknown candidate 'newest'"),
        ({}, {}, {"hooks": ("blocks.*.nothing",)}, "no hook of this model matches"),
        ({"model_type": "no_such_family"}, {}, {}, "no_such_family"),
    ],
)
def test_a_bad_input_is_one_line_and_nothing_is_judged(
    config: dict[str, Any], files: dict[str, str], asked: dict[str, Any], said: str, tmp_path: Path
) -> None:
    mine = changed_model(tmp_path / "mine", real("llama/hub").subject.model_dir, **config)
    for link in mine.glob("*.safetensors"):
        shutil.copy(link.resolve(), tmp_path / "copy")
        link.unlink()
        (tmp_path / "copy").rename(link)
    for name, text in files.items():
        (mine / name).write_text(text)
    options: dict[str, Any] = {"model": mine, "candidate": "torch", "out": tmp_path / "out"}
    with pytest.raises(ParityError) as caught:
        check(**(options | asked))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "check.json").exists()


def test_prompts_of_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"id": "a", "text": "x"}\n{"tokens": [1, 2]}\n')
    assert [p.text for p in prompts_of(["zero"], tmp_path / "p.txt", [])] == ["zero", "one", "two"]
    assert [(p.id, p.tokens) for p in prompts_of([], tmp_path / "p.jsonl", ["7, 8"])][1:] == [
        ("p2", [1, 2]),
        ("p3", [7, 8]),
    ]
    for texts, name, tokens, said in (
        ([], "p.txt", ["1;2"], "expected token ids such as"),
        ([], "none.txt", [], "No such file"),
        (["x"], "doubled.jsonl", [], "given twice: p1"),
        ([], "bad.jsonl", [], "bad.jsonl:1: not JSON"),
        ([], "up.jsonl", [], "is not a plain name"),
    ):
        (tmp_path / "doubled.jsonl").write_text('{"id": "p1", "text": "y"}')
        (tmp_path / "bad.jsonl").write_text("text")
        (tmp_path / "up.jsonl").write_text('{"id": "../up", "text": "y"}')
        with pytest.raises(ParityError, match=said):
            prompts_of(texts, tmp_path / name, tokens)


def test_built_in_prompts_excite_what_the_config_announces() -> None:
    config = {"vocab_size": 100, "sliding_window": 8, "max_position_embeddings": 64}
    assert [(p.id, len(p.tokens or [])) for p in built_in(config, False, False)] == [
        *(("random", 24), ("beyond-8", 16), ("one-token", 1))
    ]
    assert [p.id for p in built_in(config | {"sliding_window": 4096}, True, False)] == [
        *("text", "non-ascii", "random", "one-token")
    ]


def by_torch(**asked: Any) -> CheckResult:
    there = real("llama/hub").subject
    options = {"model": str(there.model_dir), "prompts": (Prompt(id="p1", tokens=there.tokens[0]),)} | asked
    return service.check(CheckOptions(**options), opened=lambda: TorchSource())


def test_her_own_steering_vector_and_its_place(tmp_path: Path) -> None:
    save_file({"v": np.linspace(-1, 1, 64, dtype=np.float32)}, tmp_path / "steer.safetensors")
    (tmp_path / "e.toml").write_text(
        '[[edits]]\nkind = "add"\nhook = "blocks.1.hook_resid_post"\nfile = "steer.safetensors"\nkey = "v"\n'
    )
    from candle_mi_parity.run.check_inputs import read_edits

    (edit,) = read_edits(tmp_path / "e.toml")
    result = by_torch(edits=(edit,))
    assert result.agrees, result.sentence
    assert list(result.prompts[0].matters.relative) == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]  # type: ignore[union-attr]
    plain_truth = by_torch()
    assert plain_truth.prompts[0].case.digest != result.prompts[0].case.digest, "its values are in the digest"
    (tmp_path / "e.toml").write_text('[[edits]]\nkind = "add"\nhook = "x"\nfile = "steer.safetensors"\n')
    with pytest.raises(ParityError, match="no tensor 'vector'; it holds v"):
        read_edits(tmp_path / "e.toml")
    with pytest.raises(ParityError, match="64 wide"):
        by_torch(edits=(edit.model_copy(update={"values": [1.0, 2.0]}),))


def test_her_own_sae_says_where_it_stands(tmp_path: Path) -> None:
    case = CASES["llama/sae-jumprelu"]
    subject = prepare(case, cache_root())
    assert subject.sae_file is not None and case.sae is not None
    shutil.copytree(subject.sae_file, tmp_path / "sae")
    said = json.loads((tmp_path / "sae" / "cfg.json").read_text()) | {"hook_name": case.sae.hook}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(said))
    result = by_torch(sae=str(tmp_path / "sae"))
    assert result.agrees and result.prompts[0].case.sae, result.sentence
    assert any("SAE features: " in line for line in lines(result))
    with pytest.raises(ParityError, match=rf"its own config places it at {case.sae.hook}, and --hook says"):
        by_torch(sae=str(tmp_path / "sae"), hook="blocks.0.hook_mlp_out")
    del said["hook_name"]
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(said))
    with pytest.raises(ParityError, match="give --hook"):
        by_torch(sae=str(tmp_path / "sae"))


class Parting(TorchSource):
    """Another token wins by a clear margin, three steps after the prompt."""

    def trace(self, subject: Subject, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        emitted = super().trace(subject, mode, truth, inputs)
        logits = emitted.arrays["logits"][0]
        if logits.shape[1] > 24:
            logits[0, 25, 7] = logits[0, 25].max() + 1
        return emitted


def test_greedy_continuations_are_compared_token_by_token() -> None:
    result = by_torch(generate=4)
    assert result.agrees and [told.parted for told in result.continuations] == [None]
    options = CheckOptions(
        model=str(real("llama/hub").subject.model_dir),
        prompts=(Prompt(id="p1", tokens=real("llama/hub").subject.tokens[0]),),
        generate=4,
        search=0,
    )
    result = service.check(options, opened=Parting)
    (told,) = result.continuations
    assert (told.parted, told.got, told.tie) == (3, "#7", False) and told.margin > 0
    assert "part at step 3" in told.line() and result.verdict is Verdict.FAIL


def test_how_much_it_matters(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    arrays["logits"] = np.zeros_like(arrays["logits"])
    result = check(model, trace=dumped(tmp_path / "trace", {"logits": arrays["logits"]}, tokens), search=0.0)
    found = result.prompts[0].matters
    logits = real("llama/hub").truth.tensors["logits"].value[0]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = (p * np.log(p * p.shape[-1])).sum(-1)
    assert found is not None and found.kl_mean == pytest.approx(expected.mean())
    assert found.kl_max == pytest.approx(expected.max()) and found.kl_position == expected.argmax()
    assert found.top1 == int((logits.argmax(-1) == 0).sum()) and found.positions == 24


def olmo(tmp_path: Path) -> tuple[Path, Arrays]:
    """A tiny model of a family outside the eight, and its truth in float32."""
    from candle_mi_parity.coverage.census_models import tiny_model
    from candle_mi_parity.coverage.census_truth import truth_of
    from candle_mi_parity.coverage.unmapped import unmapped_subject
    from candle_mi_parity.spec.cases import LocalModel

    mine = shutil.copytree(tiny_model("cohere", {}, cache_root()).directory, tmp_path / "mine")
    case = Case(id="check/x", model=LocalModel(source="local", path=str(mine)), tokens=[1, 5, 9, 4])
    truth = truth_of(unmapped_subject(case, cache_root()), cache_root(), generated=False)
    return mine, {name: tensor.value.astype(np.float32) for name, tensor in truth.tensors.items()}


def test_a_family_without_a_hook_map_is_judged_by_what_its_modules_are_called(tmp_path: Path) -> None:
    mine, arrays = olmo(tmp_path)
    result = check(mine, trace=dumped(tmp_path / "trace", arrays, [1, 5, 9, 4]))
    assert result.agrees, result.sentence
    assert any("not among the families" in note for note in result.notes)
    arrays["logits"] = arrays["logits"] * np.float32(1.001)
    result = check(mine, trace=dumped(tmp_path / "wrong", arrays, [1, 5, 9, 4]))
    assert result.verdict is Verdict.FAIL and "first at logits" in result.sentence
    with pytest.raises(ParityError, match="cohere has no hook map: it takes a candle-mi to ask, not torch"):
        check(mine, tokens=[[1, 5]], candidate="torch")


@pytest.mark.rust
def test_such_a_family_is_asked_through_auto_config(tmp_path: Path) -> None:
    mine, _ = olmo(tmp_path)
    result = check(mine, tokens=[[1, 5, 9, 4]], out=tmp_path / "out")
    assert result.prompts[0].case.compared or "refuses this model" in result.sentence


def test_the_command_answers_in_its_first_line_and_its_exit_code(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    trace, out = dumped(tmp_path / "trace", arrays, tokens), tmp_path / "out"
    done = command("check", str(model), "--trace", str(trace), "--out", str(out), "--layers", "0-1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("The trace in") and "computes PyTorch's numbers" in done.stdout.splitlines()[0]
    assert done.stderr.startswith("0.2.2: of the 24 keys")
    document = json.loads((out / "check.json").read_text())
    assert document["verdict"] == "PASS" and document["cite"]["command"].startswith("candle-mi-parity check ")
    assert "How to cite" in (out / "check.html").read_text()
    arrays["logits"] += 1
    wrong = dumped(tmp_path / "wrong", arrays, tokens)
    done = command("check", str(model), "--trace", str(wrong), "--out", str(out), "--json", "--search", "0")
    assert done.returncode == 1 and json.loads(done.stdout)["verdict"] == "FAIL"
    assert "does not exist" in one_line(command("check", str(tmp_path / "absent"), "--out", str(out)))
    assert not (out / "check.json").exists(), "what an earlier check wrote is gone"


class Stopping(TorchSource):
    def trace(self, subject: Subject, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        if subject.case.id == "check/p2":
            raise KeyboardInterrupt
        return super().trace(subject, mode, truth, inputs)


def test_what_was_judged_before_ctrl_c_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import candle_mi_parity.candidate.sources as sources

    monkeypatch.setattr(sources, "open_source", lambda *_: Stopping())
    there = real("llama/hub").subject
    prompts = (Prompt(id="p1", tokens=there.tokens[0]), Prompt(id="p2", tokens=there.tokens[0]))
    with pytest.raises(Interrupted, match="interrupted after 1 prompts"):
        check_and_write(CheckOptions(model=str(there.model_dir), prompts=prompts, out=tmp_path), False)
    document = json.loads((tmp_path / "check.json").read_text())
    assert [p["id"] for p in document["prompts"]] == ["p1"] and document["verdict"] == "ERROR"
    assert "interrupted" in document["sentence"]


def test_a_page_shows_hostile_text_as_text(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    arrays["logits"] += 1
    result = check(model, trace=dumped(tmp_path / "trace", arrays, tokens), search=0.0)
    result.model = result.prompts[0].text = HOSTILE
    result.notes.append(HOSTILE)
    html = page(result)
    assert "<script>" not in html and "\x1b" not in html and "First divergence of trace: logits" in html
    assert any(line.startswith("0.2.2") for line in foretold_lines(result))


def test_the_fixture_fails_a_test_in_the_words_of_the_answer(
    assert_parity: Callable[..., CheckResult], tmp_path: Path
) -> None:
    model, arrays, tokens = plain("llama/hub")
    assert assert_parity(model=model, trace=dumped(tmp_path / "trace", arrays, tokens)).agrees
    arrays["logits"] += 1
    with pytest.raises(
        pytest.fail.Exception, match="does not compute PyTorch's numbers on this model: first at logits"
    ):
        assert_parity(model=model, trace=dumped(tmp_path / "wrong", arrays, tokens), search=0.0)
    assert read_config(model)["model_type"] == "llama"
