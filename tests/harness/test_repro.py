"""A divergence made small: kept at every step, and shown by a Rust test that passes once candle-mi is fixed."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from candle_mi_parity.candidate.spelling import Candidate, parse_candidate
from candle_mi_parity.repro.command import repro
from candle_mi_parity.repro.prove import TestOutcome, prove, read_outcomes
from candle_mi_parity.repro.reductions import STEPS
from candle_mi_parity.repro.shrink import Divergence, FirstDivergence, Input, Pair, Shrinker
from candle_mi_parity.spec.cases import SaelensDirectory
from candle_mi_parity.spec.edits import Attention, Inject, Knockout
from candle_mi_parity.spec.paths import cache_root
from tests.support.command import command, one_line
from validation.catalogue import SourceEdit
from validation.source_faults import edited, released_crate

WANTED = Divergence("blocks.*.attn.hook_q", "values")
CONFIG = {
    "model_type": "llama", "vocab_size": 211, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 5e5, "rms_norm_eps": 1e-5,
}  # fmt: skip
TOKENS = (1, *range(3, 20))


def pair_of(**change: object) -> Pair:
    """An input with some config keys that its control lacks."""
    return Pair(Input(CONFIG | change, TOKENS), Input(CONFIG, TOKENS))


def shrunk(judge: FirstDivergence, pair: Pair) -> Pair:
    return Shrinker(judge, WANTED, STEPS, lambda line: None).shrink(pair)


def is_biased(tried: Input) -> Divergence | None:
    return WANTED if tried.config.get("attention_bias") else None


def test_the_smallest_input_that_still_diverges() -> None:
    def judge(tried: Input) -> Divergence | None:
        return is_biased(tried) if len(tried.tokens) >= 6 and tried.config["num_hidden_layers"] >= 2 else None

    found = shrunk(judge, pair_of(attention_bias=True))
    config = found.case.config
    assert (config["num_hidden_layers"], config["hidden_size"], len(found.case.tokens)) == (2, 2, 6)
    assert "rope_theta" not in config and config["attention_bias"] is True
    # What the divergence does not need goes back to the control.
    other = shrunk(is_biased, pair_of(attention_bias=True, mlp_bias=True, rope_theta=1e4))
    assert found.differing == other.differing == ["attention_bias"]


def other_divergence(tried: Input) -> Divergence | None:
    return Divergence("hook_embed", "values") if tried.config["hidden_size"] < 16 else is_biased(tried)


def control_diverges(tried: Input) -> Divergence | None:
    return WANTED if tried.config["hidden_size"] < 16 else is_biased(tried)


def refused(tried: Input) -> Divergence | None:
    if tried.config["hidden_size"] < 16:
        raise KeyError("hidden_size")
    return is_biased(tried)


@pytest.mark.parametrize("judge", [other_divergence, control_diverges, refused])
def test_a_step_into_something_else_is_not_taken(judge: FirstDivergence) -> None:
    config = shrunk(judge, pair_of(attention_bias=True)).case.config
    assert config["hidden_size"] == 16 and "rope_theta" not in config


def test_nothing_is_shrunk_without_end() -> None:
    attempts = 0

    def judge(tried: Input) -> Divergence | None:
        nonlocal attempts
        attempts += 1
        return None if attempts % 2 else WANTED

    shrunk(judge, pair_of(attention_bias=True))
    assert attempts <= 300


def test_edits_and_sae_follow_what_is_cut() -> None:
    cut = Knockout(kind="knockout", hook="blocks.2.attn.hook_scores", spec=Attention(heads=[3], edges=[[9, 4]]))
    inject = Inject(kind="inject", hook="blocks.1.hook_resid_post", features=[[40, 1.0], [3, 2.0]], position=9)
    sae = SaelensDirectory(layer=1, d_sae=96, cfg={"hook_name": "blocks.1.hook_resid_post", "k": 90})
    case = Input(CONFIG, TOKENS, sae=sae, edits=(cut, inject))
    found = shrunk(lambda tried: WANTED if tried.edits else None, Pair(case, replace(case, edits=())))
    assert len(found.case.edits) == 1 and found.case.edits[0].kind == "inject"
    kept = found.case.edits[0]
    assert isinstance(kept, Inject)
    assert (kept.hook, kept.position, len(kept.features)) == ("blocks.0.hook_resid_post", 0, 1)
    assert found.case.sae is not None and found.case.sae.hook == kept.hook
    assert kept.features[0][0] < found.case.sae.d_sae == 2
    assert found.case.sae.cfg.get("k", 2) == 2


LIBTEST = """
running 3 tests
test parity_a::agrees_with_pytorch ... ok
test parity_b::agrees_with_pytorch ... FAILED
test parity_c::agrees_with_pytorch ... FAILED

failures:

---- parity_b::agrees_with_pytorch stdout ----
thread panicked: logits differs from PyTorch: at [0, 0] got 1
---- parity_c::agrees_with_pytorch stdout ----
Error: Config("no such file")
"""


def test_a_test_that_could_not_compare_proves_nothing() -> None:
    assert read_outcomes(LIBTEST) == {
        "parity_a": TestOutcome.PASSES, "parity_b": TestOutcome.DIFFERS, "parity_c": TestOutcome.BROKEN,
    }  # fmt: skip


# --- with Rust ------------------------------------------------------------------------------------

PROVEN = "llama/sae-negative-threshold"
FIX = SourceEdit(
    file="src/sae/mod.rs",
    find="                Ok((&pre_acts * &mask_f32)?)\n",
    replace="                Ok((&pre_acts * &mask_f32)?.relu()?)\n",
)
"""What makes candle-mi 0.2.2 right in that case."""


@pytest.fixture(scope="module")
def fixed() -> Candidate:
    """A copy of candle-mi 0.2.2 with the fix, beside the emitters: cargo builds it once."""
    out = cache_root() / "fixed" / hashlib.sha256(repr(FIX).encode()).hexdigest()[:16]
    if not (out / "Cargo.toml").is_file():
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(released_crate(), partial, ignore=shutil.ignore_patterns("target", ".cargo-ok"))
        (partial / FIX.file).write_text(edited((partial / FIX.file).read_text(), FIX))
        partial.rename(out)
    return parse_candidate(f"path:{out}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repro")
    return repro(PROVEN, "0.2.2", out, cache_root(), lambda line: None)[0].folder


@pytest.mark.thorough
@pytest.mark.rust
@pytest.mark.xdist_group("repro")
def test_the_rust_test_fails_on_the_release_and_passes_on_a_fixed_copy(
    folder: Path, fixed: Candidate, tmp_path: Path
) -> None:
    [test] = (folder / "tests").glob("*.rs")
    shutil.copytree(folder, tmp_path / "broken")
    broken = tmp_path / "broken" / "tests" / "parity_broken.rs"
    broken.write_text(test.read_text().replace(test.stem, "parity_broken"))
    (broken.parent / test.stem).rename(broken.with_suffix(""))
    (broken.with_suffix("") / "model" / "config.json").unlink()
    on_release = prove([test, broken], parse_candidate("0.2.2"), cache_root())
    assert on_release == {test.stem: TestOutcome.DIFFERS, "parity_broken": TestOutcome.BROKEN}
    assert prove([test], fixed, cache_root()) == {test.stem: TestOutcome.PASSES}


@pytest.mark.thorough
@pytest.mark.rust
@pytest.mark.xdist_group("repro")
def test_the_script_prints_what_pytorch_computes(folder: Path) -> None:
    expected = json.loads(next((folder / "tests").glob("*/expected.json")).read_text())
    issue = (folder / "ISSUE.md").read_text()
    value = float(next(line for line in issue.splitlines() if line.startswith("| PyTorch, float64")).split("|")[2])
    assert value in expected["values"]
    done = subprocess.run([sys.executable, folder / "check.py"], capture_output=True, text=True, check=True)
    # transformers normalises and rotates in float32 whatever it is asked for.
    assert float(done.stdout) == pytest.approx(value, rel=1e-5, abs=1e-12)
    assert len(expected["values"]) == len(expected["sigma"])
    config = json.loads(next((folder / "tests").glob("*/model/config.json")).read_text())
    assert config["num_hidden_layers"] == 1 and config["hidden_size"] <= 4 and config["vocab_size"] == 8


@pytest.mark.rust
@pytest.mark.parametrize(
    "case, message", [("llama/hub", "nothing diverges"), ("llama/edit-add-attention", "no Rust test is written")]
)
def test_what_cannot_be_reproduced_is_one_line(tmp_path: Path, case: str, message: str) -> None:
    assert message in one_line(command("repro", case, "--out", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_stored_candidate_cannot_be_asked(tmp_path: Path) -> None:
    message = one_line(command("repro", "llama/v5", "--candidate", "stored:0.2.2", "--out", str(tmp_path)))
    assert "`repro` must build candle-mi" in message
