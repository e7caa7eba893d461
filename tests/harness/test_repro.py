"""A divergence made small: kept at every step, and shown by a Rust test that passes once candle-mi is fixed."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from candle_mi_parity.candidate.spelling import Candidate, parse_candidate
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.files.cache import publish
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.repro.command import repro
from candle_mi_parity.repro.crate import Dependencies
from candle_mi_parity.repro.prove import TestOutcome, prove, read_outcomes
from candle_mi_parity.repro.reductions import STEPS
from candle_mi_parity.repro.repro import Reproduction, ReproError, reproduce
from candle_mi_parity.repro.shrink import Divergence, FirstDivergence, Input, Pair, Shrinker
from candle_mi_parity.repro.write import Origin, write_folder
from candle_mi_parity.spec.cases import Case, Layout, SaelensDirectory, SaeStatistic, Statistic
from candle_mi_parity.spec.edits import Attention, Inject, Knockout
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import InMemory
from candle_mi_parity.trace.truth import Truth
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


def test_what_is_unusual_about_the_weights_is_left_out_unless_it_is_needed() -> None:
    mean, equal = Statistic.EMBEDDING_MEAN, Statistic.EMBEDDING_EQUAL
    sae = SaelensDirectory(layer=0, d_sae=8, cfg={}, statistics=[SaeStatistic.DEAD, SaeStatistic.TWINS])
    case = Input(CONFIG, TOKENS, weights=(equal, mean), layout=(Layout.FLOAT16,), shards=3, seed=7, sae=sae)
    control = replace(case, weights=(equal,))

    def judge(tried: Input) -> Divergence | None:
        dead = tried.sae is not None and SaeStatistic.DEAD in tried.sae.statistics
        return WANTED if mean in tried.weights and dead else None

    found = shrunk(judge, Pair(case, control))
    kept = found.case.sae
    assert (found.case.weights, found.case.layout, found.case.shards, found.case.seed) == ((mean,), (), 1, 7)
    assert kept is not None and kept.statistics == [SaeStatistic.DEAD]
    assert found.control is not None and (found.control.weights, found.control.shards) == ((), 1)


# --- With a fault planted in the control


class Faulty(TorchSource):
    """The control, whose logits are wrong for some models.

    :param meets: of ``config.json`` and the mean of the embedding, whether they are.
    """

    def __init__(self, meets: Callable[[dict[str, Any], float], bool]) -> None:
        super().__init__()
        self._meets = meets

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        made = super().trace(subject, mode, truth, inputs)
        config = json.loads((subject.model_dir / "config.json").read_text())
        mean = float(self.model(subject.model_dir).get_parameter("model.embed_tokens.weight").detach().mean())
        if self._meets(config, mean):
            made.arrays["logits"] = (made.arrays["logits"][0] * 1.01, None)
        return made


def planted(model: dict[str, Any], meets: Callable[[dict[str, Any], float], bool], out: Path) -> Reproduction:
    """The reproduction of a planted fault, and its folder."""
    row = {"source": "tiny", "config": "models/starcoder2.json", "dialect": "hub"} | model
    case = Case.model_validate({"id": "starcoder2/planted", "model": row, "tokens": {"random": 3}})
    found = reproduce(case, Faulty(meets), out / "cache", lambda line: None, new=True)
    crate = Dependencies("", "", None, b"", out)
    write_folder(found, Origin("0.0.0", "candle-mi-parity hunt", "It is wrong."), crate, out / "folder")
    return found


def written(out: Path) -> tuple[dict[str, Any], float]:
    """``config.json`` and the mean of the embedding in a folder."""
    [model] = (out / "folder" / "tests").glob("*/model")
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    return json.loads((model / "config.json").read_text()), float(embedding.mean())


def test_a_divergence_through_a_statistic_is_reproduced_with_it(tmp_path: Path) -> None:
    model = {"weights": ["bias-large", "embedding-mean"], "layout": ["float16"], "shards": 2}
    found = planted(model, lambda config, mean: mean > 2, tmp_path)
    assert (found.pair.case.unusual, found.first.name) == (["embedding-mean"], "logits")
    assert found.pair.control is not None and not found.pair.control.unusual and not found.pair.differing
    config, mean = written(tmp_path)
    assert mean > 2 and (config["num_hidden_layers"], config["hidden_size"]) == (1, 2)
    issue = (tmp_path / "folder" / "ISSUE.md").read_text()
    assert "| `(weights and their files)` | `embedding-mean` | `usual` |" in issue
    assert "float32, weights: embedding-mean." in issue and "by `candle-mi-parity hunt`." in issue


@pytest.mark.thorough
def test_a_divergence_through_two_config_keys_is_reproduced_with_both(tmp_path: Path) -> None:
    change = {"rope_theta": 100.0, "norm_epsilon": 0.01, "use_bias": False}

    def meets(config: dict[str, Any], mean: float) -> bool:
        return (config.get("rope_theta"), config.get("norm_epsilon")) == (100.0, 0.01)

    found = planted({"change": change, "weights": ["embedding-tiny"]}, meets, tmp_path)
    assert sorted(found.pair.differing) == ["norm_epsilon", "rope_theta"] and not found.pair.case.unusual
    config, _ = written(tmp_path)
    assert (config["rope_theta"], config["norm_epsilon"]) == (100.0, 0.01)


@pytest.mark.thorough
def test_the_script_of_a_bidirectional_decoder_needs_no_class_that_transformers_lacks(tmp_path: Path) -> None:
    model = {"config": "models/qwen2.json", "change": {"model_type": "Dream"}}
    found = planted(model, lambda config, mean: config["model_type"] == "Dream", tmp_path)
    assert found.pair.differing == ["model_type"] and found.first.worst is not None
    script = tmp_path / "folder" / "check.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(found.first.worst.expected, rel=1e-5)


@pytest.mark.thorough
def test_a_divergence_of_from_pretrained_is_reproduced_through_it(tmp_path: Path) -> None:
    """The Rust test loads as the case does where that matters, and otherwise says that it does not."""

    class Loaded(Faulty):
        def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
            if only_there:
                self._meets = lambda config, mean: subject.case.loader == "pretrained"
            return super().trace(subject, mode, truth, inputs)

    row: dict[str, Any] = {"source": "tiny", "config": "models/llama.json", "dialect": "hub", "layout": ["pickle"]}
    row |= {"change": {"rope_theta": 100.0}}
    case = Case.model_validate({"id": "llama/planted", "model": row, "tokens": {"random": 2}, "loader": "pretrained"})
    for only_there in (True, False):
        out = tmp_path / str(only_there)
        source = Loaded(lambda config, mean: config.get("rope_theta") == 100.0)
        found = reproduce(case, source, out / "cache", lambda line: None)
        write_folder(found, Origin("0.0.0", "again", ""), Dependencies("", "", None, b"", out), out / "folder")
        [test] = (out / "folder" / "tests").glob("*.rs")
        text = test.read_text()
        assert ("MIModel::from_pretrained(&" in text) is only_there
        assert ("VarBuilder" in text) is ("which this test leaves out" in text) is not only_there
        assert found.pair.control is not None and found.pair.control.loader == "hf"


@pytest.mark.thorough
def test_what_needs_several_files_of_weights_has_no_rust_test(tmp_path: Path) -> None:
    class Sharded(Faulty):
        def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
            several = len([*subject.model_dir.glob("*.safetensors")]) > 1
            self._meets = lambda config, mean: several
            return super().trace(subject, mode, truth, inputs)

    row = {"source": "tiny", "config": "models/llama.json", "dialect": "hub", "shards": 2}
    case = Case.model_validate({"id": "llama/planted", "model": row, "tokens": {"random": 2}})
    with pytest.raises(ReproError, match="several files of weights"):
        reproduce(case, Sharded(lambda config, mean: False), tmp_path, lambda line: None)


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

    def make(copy: Path) -> None:
        ignored = shutil.ignore_patterns("target", ".cargo-ok")
        shutil.copytree(released_crate(), copy, ignore=ignored, dirs_exist_ok=True)
        (copy / FIX.file).write_text(edited((copy / FIX.file).read_text(), FIX))

    return parse_candidate(f"path:{publish(out, make)}")


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
