"""``check`` and bad inputs: one line on stderr, exit code 2, and no file is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from candle_mi_parity import check
from candle_mi_parity.cli.cli import app
from candle_mi_parity.errors import ParityError
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.run import check_plan
from candle_mi_parity.run.check_inputs import built_in, prompts_of
from candle_mi_parity.spec.paths import FIXTURES, cache_root
from tests.support.planting import CASES, real

SAE = "llama/sae-jumprelu"
ZERO = '[[edits]]\nkind = "zero"\nhook = "blocks.7.hook_resid_post"\n'
FILE = '[[edits]]\nkind = "add"\nhook = "blocks.1.hook_resid_post"\nfile = "v.safetensors"\n'


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A copy of a tiny model."""
    return Path(shutil.copytree(real("llama/hub").subject.model_dir, tmp_path / "mine"))


def refused(tmp_path: Path, *arguments: str) -> str:
    """The error line, which is the last; lines about the config may precede it."""
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["check", *arguments, "--out", str(out)])
    assert done.exit_code == 2 and not done.stdout, done.output
    last = done.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("candle-mi-parity: ") and done.stderr.count("candle-mi-parity: ") == 1, done.stderr
    assert not any(path.is_file() for path in out.rglob("*"))
    return last


def without(mine: Path, name: str) -> None:
    tensors = load_file(mine / "model.safetensors")
    del tensors[name]
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})


def sharded(mine: Path) -> None:
    names = load_file(mine / "model.safetensors")
    (mine / "model.safetensors").rename(mine / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + (name == 'lm_head.weight')}-of-00002.safetensors" for name in names}
    (mine / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def configured(**change: Any) -> Callable[[Path], None]:
    def spoil(mine: Path) -> None:
        config = json.loads((mine / "config.json").read_text())
        (mine / "config.json").write_text(json.dumps(config | change))

    return spoil


def unindexed(mine: Path) -> None:
    sharded(mine)
    (mine / "model.safetensors.index.json").unlink()


def hub_cache(mine: Path) -> None:
    for path in mine.iterdir():
        path.unlink()
    for name in ("blobs", "refs", "snapshots"):
        (mine / name).mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda mine: (mine / "config.json").unlink(), "has no config.json; it holds"),
        (lambda mine: [path.unlink() for path in mine.iterdir()], "has no config.json; it holds nothing"),
        (lambda mine: (mine / "config.json").write_text("text"), "config.json: "),
        (lambda mine: (mine / "model.safetensors").rename(mine / "model.gguf"), "model.gguf; GGUF is not read: give"),
        (lambda mine: (mine / "model.safetensors").rename(mine / "pytorch_model.bin"), "and save it with save_pre"),
        (
            lambda mine: [(mine / "config.json").unlink(), (mine / "adapter_config.json").touch()],
            "merge it into that",
        ),
        (unindexed, "there are shards (model-00001-of-00002.safetensors) and no model.safetensors.index.json, their"),
        (hub_cache, "it holds blobs, refs, snapshots; give a directory below its snapshots"),
        (configured(quantization_config={"bits": 4}), "quant_method is null, expected an object"),
        (configured(transformers_weights="../x.safetensors"), "transformers_weights is set"),
        (sharded, "model-00002-of-00002.safetensors"),
        (lambda mine: without(mine, "model.norm.weight"), "model.norm.weight"),
        (lambda mine: (mine / "adapter_config.json").write_text("{}"), "an adapter to another model"),
        (configured(auto_map={"AutoConfig": "a.B"}, model_type="mine"), "code that its auto_map names is not run"),
        (configured(model_type="vit"), "has no language model (AutoModelForCausalLM) of model type 'vit', so that"),
        (configured(model_type="no_such_family"), "has no model type 'no_such_family'"),
        (configured(model_type="cohere"), "cohere has no hook map: only a candle-mi can be asked, not torch"),
        (configured(hidden_size=1 << 20), "are more than"),
        (configured(num_hidden_layers=4), "model.layers.3."),
    ],
)
def test_a_bad_model(spoil: Callable[[Path], object], message: str, mine: Path, tmp_path: Path) -> None:
    assert "is a file; give the directory" in refused(tmp_path, str(mine / "config.json"))
    spoil(mine)
    assert message in refused(tmp_path, str(mine), "--candidate", "torch", "--tokens", "1,5,9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "text"], "has no tokenizer, which --prompt needs: give token ids with --tokens"),
        (["--tokens", "1,9999"], "outside the vocabulary"),
        (["--tokens", "1;2"], "expected token ids such as 1,450,7483"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--dtype", "int8"], "--dtype int8: expected float32, bfloat16 or float16"),
        (["--loader", "auto"], "--loader auto: expected hf, or pretrained, which loads float32"),
        (["--loader", "pretrained", "--dtype", "float16"], "expected hf, or pretrained, which loads float32"),
        (["--layers", "one"], "--layers one: expected layers such as 0-3,11"),
        (["--hooks", "blocks.*.nothing"], "no hook of this model matches blocks.*.nothing"),
        (["--layers", "7"], "no hook of this model matches * in layers 7; an example of a hook is blocks.0."),
        (["--layers", "1", "--hooks", "blocks.0.*"], "no hook of this model matches blocks.0.* in layers 1; an"),
        (["--hook", "blocks.1.hook_resid_post"], "says where an SAE reads; give the SAE with --sae"),
        (["--candidate", "newest"], "unknown candidate 'newest'"),
        (["--candidate", "stored:9.9.9"], "9.9.9"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--sae", "./nowhere.npz"], "SAE ./nowhere.npz does not exist"),
        (["--sae", "nowhere.npz"], "SAE nowhere.npz does not exist"),
        (["--sae", str(FIXTURES / "models")], "models has no cfg.json; expected a directory as SAELens saves one"),
        (["--sae", str(FIXTURES / "quantized/nf4/model.safetensors")], "expected an NPZ, or the directory in which"),
        (["--prompt", "caf\udce9"], r"--prompt: 'caf\udce9' is not valid Unicode; expected UTF-8 text"),
        (["--trace", "nowhere"], "trace nowhere: it does not exist"),
        (["--edits", "nowhere.toml"], "nowhere.toml: "),
    ],
)
def test_a_bad_option(arguments: list[str], message: str, mine: Path, tmp_path: Path) -> None:
    given = [] if {"--prompt", "--tokens", "--trace"} & set(arguments) else ["--tokens", "1,5,9"]
    candidate = [] if "--candidate" in arguments else ["--candidate", "torch"]
    assert message in refused(tmp_path, str(mine), *given, *candidate, *arguments)


@pytest.mark.parametrize("value", [None, "many", 0, -1, [32]])
def test_a_config_without_a_vocabulary_size(value: object, mine: Path, tmp_path: Path) -> None:
    configured(vocab_size=value, rope_scaling="odd", max_position_embeddings="long", sliding_window=[8])(mine)
    assert "has no vocab_size, so that no prompt can be made" in refused(tmp_path, str(mine), "--candidate", "torch")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (ZERO, "edits[0] (zero at blocks.7.hook_resid_post): the model has no such hook point"),
        (ZERO.replace("zero", "melt"), "melt"),
        (ZERO + "strength = 2\n", "strength"),
        ("edits = 1", "expected [[edits]] rows alone"),
        (FILE, "no tensor 'vector'; it holds v"),
        (FILE + 'key = "v"\n', "8 values, the hook is 64 wide"),
        (FILE.replace("v.safe", "w.safe"), "w.safetensors: "),
    ],
)
def test_a_bad_intervention(toml: str, message: str, mine: Path, tmp_path: Path) -> None:
    save_file({"v": np.ones(8, np.float32)}, tmp_path / "v.safetensors")
    edits = tmp_path / "e.toml"
    edits.write_text(toml)
    done = refused(tmp_path, str(mine), "--tokens", "1,5", "--candidate", "torch", "--edits", str(edits))
    assert message in done


def test_a_bad_sae(mine: Path, tmp_path: Path) -> None:
    sae = prepare(CASES[SAE], cache_root()).sae_file
    assert sae is not None
    there = Path(shutil.copytree(sae, tmp_path / "sae"))
    config = json.loads((there / "cfg.json").read_text())

    def refusal_of(*arguments: str) -> str:
        asked = ["--tokens", "1,5", "--candidate", "torch", "--sae", str(there), *arguments]
        return refused(tmp_path, str(mine), *asked)

    assert "and --hook says blocks.0.hook_resid_post" in refusal_of("--hook", "blocks.0.hook_resid_post")
    config.pop("hook_name", None)
    config.pop("metadata", None)
    (there / "cfg.json").write_text(json.dumps(config))
    assert "give --hook" in refusal_of()
    assert "is not a place for an SAE" in refusal_of("--hook", "blocks.1.attn.hook_pattern")
    assert "SAE layer 9, but the model has 3 layers" in refusal_of("--hook", "blocks.9.hook_resid_post")
    weights = load_file(there / "sae_weights.safetensors")
    save_file(weights | {"W_enc": weights["W_enc"][:32]}, there / "sae_weights.safetensors")
    assert "sae: W_dec has shape (96, 64), expected (96, 32)" in refusal_of("--hook", "blocks.1.hook_resid_post")


def test_bad_arguments_from_python(mine: Path) -> None:
    for asked, message in (
        ({"edits": [{"kind": "melt"}]}, "edits: edits.0: "),
        ({"edits": "nowhere.toml"}, "nowhere.toml: No such file"),
        ({"tokens": [[1.5]]}, "expected token ids"),
        ({"trace": "nowhere"}, "trace nowhere: it does not exist"),
    ):
        with pytest.raises(ParityError, match=message):
            check(mine, candidate="torch", **asked)


def test_too_little_memory_or_no_rust(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_plan, "memory_bytes", lambda: 1000)
    message = refused(tmp_path, str(mine), "--tokens", "1,5,9", "--candidate", "torch")
    assert "of memory, and this machine has 0 MB: use shorter prompts or a larger machine" in message
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    message = refused(tmp_path, str(mine), "--tokens", "1,5,9")
    assert "without Rust, `--trace DIR` judges tensors that your own program dumped" in message


def test_prompts_of_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"id": "a", "text": "x"}\n{"tokens": [1, 2]}\n')
    assert [p.text for p in prompts_of(["zero"], tmp_path / "p.txt", [])] == ["zero", "one", "two"]
    found = prompts_of([], tmp_path / "p.jsonl", ["7, 8"])
    assert [(p.id, p.text, p.tokens) for p in found] == [("a", "x", None), ("p2", None, [1, 2]), ("p3", None, [7, 8])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "p1", "text": "y"}', "given twice: p1"),
        ("text", "bad.jsonl:1: not JSON"),
        ('["text"]', "bad.jsonl:1: expected an object"),
        ('{"id": "../up", "text": "y"}', "is not a plain name"),
        ('{"text": "y", "tokens": [1]}', "exactly one of"),
        ('{"txt": "y"}', "bad.jsonl:1: there is no key 'txt'; a prompt has id, text, tokens"),
        ('{"tokens": "1,2"}', "bad.jsonl:1: `tokens` must be a list of token ids"),
        ("", "holds no prompt"),
    ],
)
def test_a_bad_file_of_prompts(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(ParityError, match=message):
        prompts_of(["x"], tmp_path / "bad.jsonl", [])


def test_built_in_prompts_exceed_the_lengths_of_the_config() -> None:
    config = {"vocab_size": 100, "sliding_window": 8, "max_position_embeddings": 64}
    found = [(p.id, len(p.tokens or [])) for p in built_in(config, False, False)]
    assert found == [("random", 24), ("beyond-8", 16), ("one-token", 1)]
    with_text = built_in(config | {"sliding_window": 4096}, True, False)
    assert [p.id for p in with_text] == ["text", "non-ascii", "random", "one-token"]
