"""``check``: tensors that a user dumped, a user's own vector and SAE, and what is message beside the verdict."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from candle_mi_parity import check
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.cli.check import check_and_write
from candle_mi_parity.cli.cli import app
from candle_mi_parity.compare.check_result import CheckResult
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.coverage.census_models import tiny_model
from candle_mi_parity.coverage.census_truth import truth_of
from candle_mi_parity.coverage.unmapped import unmapped_subject
from candle_mi_parity.errors import ParityError
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.report.check_page import lines, page
from candle_mi_parity.report.views import Interrupted
from candle_mi_parity.run import check as service
from candle_mi_parity.run import check_judge
from candle_mi_parity.run.check import CheckOptions
from candle_mi_parity.run.check_inputs import Prompt
from candle_mi_parity.spec import paths
from candle_mi_parity.spec.cases import Case, LocalModel
from candle_mi_parity.spec.counterfactual import Counterfactual, Variant
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import ROOT, cache_root
from candle_mi_parity.trace.trace import InMemory
from candle_mi_parity.trace.truth import Truth
from tests.support.planting import CASES, Arrays, changed_model, real, rerun
from tests.support.results import checked


@pytest.mark.thorough
def test_the_config_alone_and_cached_truths_need_no_torch(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/v5")
    trace = dumped(tmp_path / "trace", arrays, tokens)
    code = f"""import sys
from candle_mi_parity.run.check import CheckOptions, check, foretold
from candle_mi_parity.report.check_page import foretold_lines
options = CheckOptions(model={str(model)!r}, trace=__import__("pathlib").Path({str(trace)!r}))
print(*foretold_lines(foretold(options)), sep="\\n")
print(check(options).verdict.value, *({{"torch", "transformers"}} & set(sys.modules)))"""
    assert check(model, trace=trace).agrees  # now the truth is cached
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, theta, *_, last = done.stdout.splitlines()
    assert first == "Known of 0.2.2 on a model like this, by 1 of its 24 keys:"
    assert theta.startswith("  rope_parameters.rope_theta 500000.0: ") and "top level" in theta
    assert last == "PASS", f"{last}: a check that computes nothing imports neither"


def dumped(directory: Path, arrays: Arrays, tokens: list[int]) -> Path:
    """A user's dump: no batch axis, one file for each layer."""
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


def test_a_user_s_tensors_are_judged_and_counted(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    result = check(model, trace=dumped(tmp_path / "whole", arrays, tokens))
    assert result.agrees and result.prompts[0].case.expected == len(arrays) + 2, "the next tokens are judged too"
    assert "The trace in" in result.sentence
    part = {name: arrays[name] for name in ("blocks.1.hook_resid_post", "blocks.2.attn.hook_q")}
    result = check(model, trace=dumped(tmp_path / "part", part, tokens))
    assert result.agrees and [t.name for t in result.prompts[0].case.tensors] == list(part)
    assert "on this model: 2 tensors of your dump, 1 prompt" in result.sentence
    with_hooks = check(model, trace=tmp_path / "whole", hooks=("blocks.1.*",))
    assert {t.name.split(".")[0] for t in with_hooks.prompts[0].case.tensors} == {"blocks", "logits"}
    assert with_hooks.prompts[0].case.expected == 12 + 3


def test_a_bidirectional_decoder_is_judged_and_the_code_beside_it_is_not_run(tmp_path: Path) -> None:
    """Dream as its repository has it: transformers lacks the type, and the config names code of its own."""
    model, arrays, tokens = plain("Dream/hub")
    code = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model", "AutoModelForCausalLM": "mine.Model"}
    mine = shutil.copytree(model, tmp_path / "mine")
    config = read_config(model) | {"auto_map": code, "architectures": ["DreamModel"]}
    (mine / "config.json").write_text(json.dumps(config))
    (mine / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    result = check(mine, trace=dumped(tmp_path / "trace", arrays, tokens))
    assert result.agrees and not (tmp_path / "ran").exists() and not result.unknown
    causal = real("Dream/hub").oracle.under(Counterfactual(variants=[Variant.CAUSAL_MASK])).truth().tensors
    wrong = {name: causal[name].value.astype(np.float32) for name in arrays}
    result = check(mine, trace=dumped(tmp_path / "causal", wrong, tokens))
    assert "first at" not in result.sentence and "Equal to PyTorch with causal-mask" in result.sentence


def test_a_fault_in_a_user_s_tensors_is_found_and_not_explained(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    arrays["blocks.1.attn.hook_v"] = arrays["blocks.1.attn.hook_v"] * np.float32(1.001)
    result = check(model, trace=dumped(tmp_path / "trace", arrays, tokens), search=1.0)
    assert result.verdict is Verdict.FAIL
    assert "first at blocks.1.attn.hook_v" in result.sentence and "none of" in result.sentence
    assert "run" not in result.sentence, "that a dump has no teacher-forced run is a note"
    assert any("a dump holds one run" in note for note in result.prompts[0].case.notes)
    arrays["blocks.0.hook_mlp_out"][0, 3, 5] = np.nan
    result = check(model, trace=dumped(tmp_path / "nan", arrays, tokens), search=0.0)
    assert result.verdict is Verdict.FAIL and "blocks.0.hook_mlp_out (∞ of 8, nonfinite)" in result.sentence


def test_a_setting_that_a_user_s_program_does_not_read_is_named(tmp_path: Path) -> None:
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
    ("spoil", "tokens", "message"),
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
    spoil: Callable[[Arrays], None] | None, tokens: Any, message: str, tmp_path: Path
) -> None:
    model, arrays, own = plain("llama/hub")
    if spoil:
        spoil(arrays)
    dumped(tmp_path / "trace", arrays, own if tokens is None else tokens)
    with pytest.raises(ParityError) as caught:
        check(model, tokens=[own], trace=tmp_path / "trace")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("candidate", ["torch", pytest.param("0.2.2", marks=pytest.mark.rust)])
def test_a_user_s_steering_vector(candidate: str, tmp_path: Path) -> None:
    there = real("llama/hub").subject
    file = tmp_path / "steer.safetensors"
    save_file({"v": np.linspace(-1, 1, 64, dtype=np.float32)}, file)
    edit = {"kind": "add", "hook": "blocks.1.hook_resid_post", "key": "v", "file": str(file)}
    asked: dict[str, Any] = {"tokens": there.tokens, "candidate": candidate, "out": tmp_path / "out"}
    steered, unsteered = check(there.model_dir, edits=[edit], **asked), check(there.model_dir, **asked)
    assert steered.agrees and unsteered.agrees, steered.sentence
    found = steered.prompts[0].matters
    assert found is not None and list(found.relative) == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    assert steered.prompts[0].case.digest != unsteered.prompts[0].case.digest, "its values are in the digest"


def test_a_user_s_sae_with_the_hook_in_its_config(tmp_path: Path) -> None:
    case = CASES["llama/sae-jumprelu"]
    subject = prepare(case, cache_root())
    assert subject.sae_file is not None and case.sae is not None
    shutil.copytree(subject.sae_file, tmp_path / "sae")
    message = json.loads((tmp_path / "sae" / "cfg.json").read_text()) | {"hook_name": case.sae.hook}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(message))
    result = check(subject.model_dir, tokens=subject.tokens, sae=tmp_path / "sae", candidate="torch")
    assert result.agrees and result.prompts[0].case.sae, result.sentence
    assert any("SAE features: " in line and "all the same" in line for line in lines(result))


class OtherToken(TorchSource):
    """torch, but for another likeliest token three steps after the prompt."""

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        emitted = super().trace(subject, mode, truth, inputs)
        logits = emitted.arrays["logits"][0]
        if logits.shape[1] > 24:
            logits[0, 25, 7] = logits[0, 25].max() + 1
        return emitted


def test_greedy_continuations_are_compared_token_by_token() -> None:
    there = real("llama/hub").subject
    options = CheckOptions(str(there.model_dir), (Prompt(id="p1", tokens=there.tokens[0]),), generate=4, search=0)
    result = service.check(options, opened=TorchSource)
    assert result.agrees and [told.parted for told in result.continuations] == [None]
    assert "44 tensors, 1 prompt with continuations" in result.sentence
    result = service.check(options, opened=OtherToken)
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


def unmapped(model_type: str, out: Path) -> tuple[Path, Arrays]:
    """A tiny model of a family outside the eight, and its truth in float32."""
    mine = shutil.copytree(tiny_model(model_type, cache_root()).directory, out / "mine")
    case = Case(id="check/x", model=LocalModel(source="local", path=str(mine)), tokens=[1, 5, 9, 4])
    truth = truth_of(unmapped_subject(case, cache_root()), cache_root(), generated=False)
    return mine, {name: tensor.value.astype(np.float32) for name, tensor in truth.tensors.items()}


def test_a_family_without_a_hook_map_is_judged_by_its_module_names(tmp_path: Path) -> None:
    mine, arrays = unmapped("cohere", tmp_path)
    result = check(mine, trace=dumped(tmp_path / "trace", arrays, [1, 5, 9, 4]))
    assert result.agrees, result.sentence
    assert any("not among the families" in note for note in result.notes)
    arrays["logits"] = arrays["logits"] * np.float32(1.001)
    result = check(mine, trace=dumped(tmp_path / "wrong", arrays, [1, 5, 9, 4]))
    assert result.verdict is Verdict.FAIL and "first at logits" in result.sentence


@pytest.mark.rust
@pytest.mark.parametrize(
    ("model_type", "message", "before"),
    [
        ("stablelm", "does not compute PyTorch's numbers on this model: first at blocks.0.", "did not compute"),
        ("olmo", "refuses this model: model: candle-mi calls the model incompatible", "refused a small olmo model"),
    ],
)
def test_candle_mi_on_a_family_without_a_hook_map(model_type: str, message: str, before: str, tmp_path: Path) -> None:
    mine, _ = unmapped(model_type, tmp_path)
    result = check(mine, tokens=[[1, 5, 9, 4]], out=tmp_path / "out")
    assert result.verdict is Verdict.FAIL and message in result.sentence
    assert before in result.census


def test_the_command_answers_in_its_first_line_and_its_exit_code(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    out = tmp_path / "out"

    def command(trace: Path, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["check", str(model), "--trace", str(trace), "--out", str(out), *arguments])

    trace = dumped(tmp_path / "trace", arrays, tokens)
    done = command(trace, "--layers", "0-1")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(
        f"The trace in {trace} computes PyTorch's numbers on the 25 tensors of your dump that were "
    )
    assert command(trace, "--layers", "0-1", "--hooks", "*.hook_resid_post").stdout.startswith(
        f"The trace in {trace} computes PyTorch's numbers on the 3 tensors of your dump that were looked at: 1 prompt"
    )
    assert done.stderr.startswith("Known of 0.2.2 on a model like this, with some inputs:")
    document = json.loads((out / "check.json").read_text())
    assert document["verdict"] == "PASS" and document["cite"]["command"].startswith(paths.command("check") + " ")
    assert document["cite"]["command"].endswith("--layers 0,1 --hooks '*.hook_resid_post'"), "it repeats the check"
    assert "How to cite" in (out / "check.html").read_text()
    arrays["logits"] += 1
    done = command(dumped(tmp_path / "wrong", arrays, tokens), "--json", "--search", "0")
    assert done.exit_code == 1 and json.loads(done.stdout)["verdict"] == "FAIL"
    assert command(tmp_path / "absent").exit_code == 2
    assert not (out / "check.json").exists(), "the files of an earlier check are removed"


class Stopping(TorchSource):
    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        if subject.case.id == "check/p2":
            raise KeyboardInterrupt
        return super().trace(subject, mode, truth, inputs)


def test_an_interrupted_check_keeps_what_was_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_judge, "open_source", lambda *_: Stopping())
    there = real("llama/hub").subject
    prompts = (Prompt(id="p1", tokens=there.tokens[0]), Prompt(id="p2", tokens=there.tokens[0]))
    with pytest.raises(Interrupted, match="interrupted after 1 prompts"):
        check_and_write(CheckOptions(model=str(there.model_dir), prompts=prompts, out=tmp_path), False)
    document = json.loads((tmp_path / "check.json").read_text())
    assert [p["id"] for p in document["prompts"]] == ["p1"] and document["verdict"] == "ERROR"
    assert "interrupted" in document["sentence"]


def test_a_page_and_a_terminal_show_the_divergence_and_the_features() -> None:
    assert "First divergence of p0: blocks.0.attn" in page(checked())
    assert any(line.startswith("  p0: SAE features: 12 active, PyTorch 13, 1 differ") for line in lines(checked()))


def test_the_fixture_fails_a_test_with_the_sentence_of_the_answer(
    assert_parity: Callable[..., CheckResult], tmp_path: Path
) -> None:
    model, arrays, tokens = plain("llama/hub")
    assert assert_parity(model=model, trace=dumped(tmp_path / "trace", arrays, tokens)).agrees
    arrays["logits"] += 1
    with pytest.raises(pytest.fail.Exception, match="does not compute PyTorch's numbers on this model: first at log"):
        assert_parity(model=model, trace=dumped(tmp_path / "wrong", arrays, tokens), search=0.0)
    assert read_config(model)["model_type"] == "llama"


def test_the_lens_uses_each_side_s_own_stream(tmp_path: Path) -> None:
    model, arrays, tokens = plain("llama/hub")
    arrays["blocks.1.hook_resid_post"] *= -1
    result = check(model, trace=dumped(tmp_path / "trace", arrays, tokens), search=0.0)
    first, second, third = result.prompts[0].lens
    assert first.expected == first.got and third.expected == third.got
    assert second.hook == "blocks.1.hook_resid_post" and second.expected != second.got
