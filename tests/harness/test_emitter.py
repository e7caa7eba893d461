"""The real emitter: refused requests, models, and each option of a request."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.spec.paths import EMITTER, cache_root

WIDTH = 16
ABSENT = str(Path(__file__).with_name("absent"))
RESIDUAL = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def built() -> Path:
    if shutil.which("cargo") is None:
        pytest.skip("no cargo on PATH")
    return build(parse_candidate("0.2.2"), cache_root(), print).path


@pytest.fixture(scope="module")
def emitter(built: Path) -> Iterator[EmitterProcess]:
    """One process for all tests: each refusal is followed by a correct answer."""
    with EmitterProcess(built) as process:
        yield process


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama: d = WIDTH, two layers, 40 tokens in the vocabulary."""
    directory = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def real_request(model: Path, out: Path, **changes: object) -> dict[str, object]:
    return {
        "format": "candle-mi-parity/request/1",
        "case": {"id": "tiny", "digest": "00"},
        "model_dir": str(model),
        "tokens": [[1, 5, 7, 2]],
        "captures": ["hook_embed", "blocks.0.attn.hook_pattern", RESIDUAL],
        "logits": True,
        "dtype": "float32",
        "device": "cpu",
        "out": str(out),
        **changes,
    }


def fails(emitter: EmitterProcess, request: dict[str, object]) -> EmitterError:
    with pytest.raises(EmitterError) as caught:
        emitter.emit(request, timeout=120)
    assert "\n" not in str(caught.value)
    return caught.value


def traced(emitter: EmitterProcess, model: Path, out: Path, **changes: object) -> dict[str, np.ndarray]:
    """The float32 tensors of a trace, in its order."""
    emitter.emit(real_request(model, out, **changes), timeout=120)
    stored = load_file(out.with_suffix(".safetensors"))
    found = {}
    for entry in json.loads(out.read_text())["tensors"]:
        values = entry.get("values")
        array = stored[entry["key"]] if values is None else np.array(values, np.float32).reshape(entry["shape"])
        found[entry["name"]] = array
    return found


def copy_model(model: Path, to: Path, **config: object) -> Path:
    """A copy of a model with a changed config."""
    shutil.copytree(model, to)
    known = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**known, **config}))
    return to


@pytest.mark.rust
@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"colour": "red"}, "request", "colour"),
        ({"format": "candle-mi-parity/request/9"}, "request", "request/9"),
        ({"captures": ["hook_embed", "blocks.0.hook_nope"]}, "request", "blocks.0.hook_nope"),
        ({"captures": ["blocks.2.hook_resid_pre"]}, "request", "blocks.2.hook_resid_pre"),
        ({"edits": [{"kind": "zero", "hook": "blocks.9.hook_resid_pre"}]}, "request", "blocks.9"),
        ({"tokens": [[1, 40]]}, "request", "token 40"),
        ({"tokens": []}, "request", "empty"),
        ({"tokens": [[1, 2], [3]]}, "request", "ragged"),
        ({"project": ["absent"]}, "request", "inputs is null"),
        ({"loader": "guess"}, "request", "guess"),
        ({"device": "tpu"}, "request", "tpu"),
        ({"model_dir": ABSENT}, "model", ABSENT),
    ],
)
def test_an_invalid_request_is_refused_in_one_line(
    emitter: EmitterProcess, llama: Path, tmp_path: Path, changes: dict[str, object], kind: str, told: str
) -> None:
    error = fails(emitter, real_request(llama, tmp_path / "case.json", **changes))
    assert error.kind == kind and told in error.message
    assert list(tmp_path.iterdir()) == []
    emitter.emit(real_request(llama, tmp_path / "case.json"), timeout=120)


@pytest.mark.rust
def test_absent_or_empty_weights_are_refused(emitter: EmitterProcess, llama: Path, tmp_path: Path) -> None:
    model, shard = copy_model(llama, tmp_path / "model"), "model-00001-of-00002.safetensors"
    (model / "model.safetensors").unlink()
    absent = fails(emitter, real_request(model, tmp_path / "case.json"))
    (model / shard).touch()
    empty = fails(emitter, real_request(model, tmp_path / "case.json"))
    assert absent.kind == empty.kind == "model"
    assert "expected model.safetensors or its shards" in absent.message and shard in empty.message


def header(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["header"]
    return found


@pytest.mark.rust
def test_from_pretrained_reads_the_directory_itself(
    emitter: EmitterProcess, built: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = traced(emitter, llama, tmp_path / "files.json")
    own = traced(emitter, llama, tmp_path / "own.json", loader="pretrained")
    assert files.keys() == own.keys() and all(np.array_equal(files[name], own[name]) for name in files)
    assert header(tmp_path / "files.json") == header(tmp_path / "own.json"), "the digest is of the same files"
    # A relative path is one of this process's directory.
    monkeypatch.chdir(llama.parent)
    with EmitterProcess(built) as process:
        traced(process, Path(llama.name), tmp_path / "relative.json", loader="pretrained")


@pytest.mark.rust
def test_from_pretrained_says_what_it_refuses(emitter: EmitterProcess, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "case.json"
    for changes, kind, told in (
        ({"dtype": "bfloat16"}, "request", "always loads float32"),
        ({"device": "cuda:0"}, "request", "chooses its device itself: cpu"),
        ({"model_dir": ABSENT}, "io", ABSENT),
    ):
        error = fails(emitter, real_request(llama, out, loader="pretrained", **changes))
        assert error.kind == kind and told in error.message
    model = copy_model(llama, tmp_path / "model")
    (model / "model.safetensors").unlink()
    error = fails(emitter, real_request(model, out, loader="pretrained"))
    assert error.kind == "model" and "no weight files found" in error.message


@pytest.mark.rust
def test_from_pretrained_reads_a_pickle(emitter: EmitterProcess, llama: Path, tmp_path: Path) -> None:
    model = copy_model(llama, tmp_path / "model")
    torch.save(load_torch(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    got = traced(emitter, model, tmp_path / "bin.json", loader="pretrained")
    want = traced(emitter, llama, tmp_path / "case.json")
    assert all(np.array_equal(got[name], want[name]) for name in want)
    digests = [
        f"{name}:{hashlib.sha256((model / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "pytorch_model.bin")
    ]
    assert header(tmp_path / "bin.json")["model_digest"] == hashlib.sha256("".join(digests).encode()).hexdigest()


@pytest.mark.rust
def test_only_the_build_with_mmap_loads_shards(emitter: EmitterProcess, llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(model, max_shard_size="10KB")
    assert len(list(model.glob("model-*.safetensors"))) > 1
    error = fails(emitter, real_request(model, tmp_path / "case.json", loader="pretrained"))
    assert error.kind == "model" and "requires the `mmap` feature" in error.message
    want = traced(emitter, model, tmp_path / "case.json")
    mapped = build(parse_candidate("0.2.2"), cache_root(), print, ("mmap",))
    default = ["clt", "diffusion", "fused-attn", "quantized", "rwkv", "sae", "training", "transformer"]
    assert mapped.identity["features"] == sorted([*default, "mmap"])
    with EmitterProcess(mapped.path) as process:
        got = traced(process, model, tmp_path / "mapped.json", loader="pretrained")
        assert all(np.array_equal(got[name], want[name]) for name in want)
        assert header(tmp_path / "mapped.json")["model_digest"] == header(tmp_path / "case.json")["model_digest"]
        index = model / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-00001-", "model-00009-"))
        error = fails(process, real_request(model, tmp_path / "case.json", loader="pretrained"))
    assert error.kind == "model" and "shard model-00009-" in error.message


@pytest.mark.rust
def test_a_changed_model_is_loaded_again(emitter: EmitterProcess, llama: Path, tmp_path: Path) -> None:
    digests = set()
    for note in ("first", "second"):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        model = copy_model(llama, tmp_path / "model", note=note)
        emitter.emit(real_request(model, tmp_path / "case.json"), timeout=120)
        digests.add(json.loads((tmp_path / "case.json").read_text())["header"]["model_digest"])
    assert len(digests) == 2


@pytest.fixture(scope="module")
def optimised() -> Path:
    """The emitter with full optimisation of every crate, unlike in its Cargo.toml."""
    target = os.environ.get("PARITY_OPTIMISED")
    if target is None:
        pytest.skip("compiles 170 crates again in minutes: set PARITY_OPTIMISED to a directory for them")
    profile = {"CARGO_PROFILE_RELEASE_OPT_LEVEL": "3", "CARGO_PROFILE_RELEASE_LTO": "false"}
    command = ["cargo", "build", "--release", "--locked", "--manifest-path", str(EMITTER / "Cargo.toml")]
    subprocess.run(command, env=os.environ | profile | {"CARGO_TARGET_DIR": target}, check=True)
    return Path(target, "release", "parity-emitter")


@pytest.mark.thorough  # not `rust`: --require-rust does not ask for this second build
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_low_optimisation_changes_no_bit(
    built: Path, optimised: Path, llama: Path, tmp_path: Path, dtype: str
) -> None:
    traces = []
    for binary in (built, optimised):
        out = tmp_path / binary.parent.name / "case.json"
        with EmitterProcess(binary) as emitter:
            emitter.emit(real_request(llama, out, dtype=dtype), timeout=120)
        document = json.loads(out.read_text())
        del document["run"]
        traces.append((document, out.with_suffix(".safetensors").read_bytes()))
    assert built.read_bytes() != optimised.read_bytes() and traces[0] == traces[1]


# --- the auto reader of config.json ---------------------------------------------------------------


@pytest.mark.rust
def test_auto_reads_an_unknown_family(emitter: EmitterProcess, llama: Path, tmp_path: Path) -> None:
    unknown, out = copy_model(llama, tmp_path / "model", model_type="mystery"), tmp_path / "case.json"
    known, guessed = traced(emitter, llama, out), traced(emitter, unknown, out, loader="auto")
    # The cached model was read by the other reader and must not be used.
    error = fails(emitter, real_request(unknown, tmp_path / "refused.json", loader="hf"))
    assert error.kind == "model" and "mystery" in error.message
    for name, array in known.items():
        np.testing.assert_array_equal(guessed[name], array, err_msg=name)


@pytest.mark.rust
@pytest.mark.parametrize("shards", [1, 2])
def test_auto_refuses_what_candle_mi_calls_incompatible(
    emitter: EmitterProcess, llama: Path, tmp_path: Path, shards: int
) -> None:
    model = copy_model(llama, tmp_path / "model", model_type="mystery")
    weights, names = load_file(model / "model.safetensors"), sorted(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()

    def write(held: list[str]) -> None:
        for shard in range(shards):
            file = f"model-0000{shard + 1}-of-00002.safetensors" if shards == 2 else "model.safetensors"
            save_file({name: weights[name] for name in held[shard::shards]}, model / file)

    request = real_request(model, tmp_path / "case.json", loader="auto")
    write(names)
    emitter.emit(request, timeout=120)
    # One name is missing in each shard.
    write([name for name in names if name not in {"model.norm.weight", "model.embed_tokens.weight"}])
    errors = [fails(emitter, request) for _ in range(2)]
    assert errors[0].kind == "model"
    assert "model.norm.weight" in errors[0].message and "model.embed_tokens.weight" in errors[0].message
    assert errors[0].message == errors[1].message


# --- the logit lens -------------------------------------------------------------------------------


@pytest.mark.rust
def test_the_last_residual_projects_to_the_logits(emitter: EmitterProcess, llama: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "inputs.safetensors", tmp_path / "case.json"
    given = traced(emitter, llama, out)
    last = np.ascontiguousarray(given[RESIDUAL][:, -1])
    save_file({RESIDUAL: given[RESIDUAL], "last": last, "zero": np.zeros((1, WIDTH), np.float32)}, inputs)
    got = traced(emitter, llama, out, inputs=str(inputs), project=["last", RESIDUAL, "zero"])
    assert list(got) == [*given, "lens.last", f"lens.{RESIDUAL}", "lens.zero"]
    np.testing.assert_allclose(got[f"lens.{RESIDUAL}"], given["logits"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(got["lens.last"], given["logits"][:, -1], rtol=0, atol=1e-6)
    assert not got["lens.zero"].any()
    header = json.loads(out.read_text())["header"]
    assert header["inputs_digest"] == hashlib.sha256(inputs.read_bytes()).hexdigest()


@pytest.mark.rust
@pytest.mark.parametrize("shape", [(WIDTH,), (1, 4, 1), (1, 1, 4, WIDTH), None])
def test_a_tensor_that_cannot_be_projected_is_refused(
    emitter: EmitterProcess, llama: Path, tmp_path: Path, shape: tuple[int, ...] | None
) -> None:
    inputs = tmp_path / "inputs.safetensors"
    save_file({"other" if shape is None else "key": np.ones(shape or (1, WIDTH), np.float32)}, inputs)
    error = fails(emitter, real_request(llama, tmp_path / "case.json", inputs=str(inputs), project=["key"]))
    assert error.kind == "request" and '"key"' in error.message
    assert not (tmp_path / "case.json").exists()


# --- tokenising -----------------------------------------------------------------------------------


def words(directory: Path, unknown: str) -> Path:
    """A tokenizer of three words that prepends ``<s>`` to every text."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 3}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def tokenize_request(tokenizer: Path, out: Path) -> dict[str, object]:
    return {
        "format": "candle-mi-parity/tokenize/1",
        "tokenizer": str(tokenizer),
        "texts": ["a b", "", "c d", "b"],
        "out": str(out),
    }


@pytest.mark.rust
def test_tokens_of_texts(emitter: EmitterProcess, tmp_path: Path) -> None:
    tokenizer = words(tmp_path, unknown="<nothing>")
    out = emitter.emit(tokenize_request(tokenizer, tmp_path / "tokens.json"), timeout=120)
    document: dict[str, Any] = json.loads(out.read_text())
    assert document.pop("candle_mi")["version"] == "0.2.2"
    assert document.pop("emitter")
    errors = document.pop("errors")
    assert document == {
        "format": "candle-mi-parity/tokens/1",
        "tokenizer_digest": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        "encode": [[0, 1, 2], [0], None, [0, 2]],
        "encode_raw": [[1, 2], [], None, [2]],
        "decode": ["<s> a b", "<s>", None, "<s> b"],
        "offsets": [[0, 0, 0, 1, 2, 3], [0, 0], None, [0, 0, 0, 1]],
    }
    assert list(errors) == ["2"] and "\n" not in errors["2"] and "encode" in errors["2"]


@pytest.mark.rust
def test_an_invalid_tokenising_request_is_refused_in_one_line(
    emitter: EmitterProcess, llama: Path, tmp_path: Path
) -> None:
    tokenizer = words(tmp_path, unknown="<s>")
    broken, out = tmp_path / "broken.json", tmp_path / "out" / "tokens.json"
    broken.write_text("{}")
    before = tokenizer.read_bytes()
    for changes, kind, told in (
        ({"colour": "red"}, "request", "colour"),
        ({"texts": "a"}, "request", "sequence"),
        ({"tokenizer": ABSENT}, "model", ABSENT),
        ({"tokenizer": str(broken)}, "model", "broken.json"),
        ({"out": str(tokenizer)}, "request", "tokenizer itself"),
    ):
        error = fails(emitter, {**tokenize_request(tokenizer, out), **changes})
        assert error.kind == kind and told in error.message
        assert not out.exists()
    assert tokenizer.read_bytes() == before
    # The process continues with either kind of request.
    emitter.emit(real_request(llama, tmp_path / "case.json"), timeout=120)
    emitter.emit(tokenize_request(tokenizer, out), timeout=120)
    assert json.loads(out.read_text())["errors"] == {}
