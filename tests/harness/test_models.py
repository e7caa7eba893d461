"""Generated models are the same on every machine and show any fault; the cache holds only complete directories."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files.cache import publish
from candle_mi_parity.models import generate
from candle_mi_parity.models.checkpoint import model_digest, read_config
from candle_mi_parity.models.generate import (
    bit_stream,
    normal_numbers,
    tensor_chunks,
    tensor_values,
    tiny_config,
    write_config,
    write_safetensors,
)
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.models.sae import load_sae, sae_path
from candle_mi_parity.spec.cases import ScopeSae, TinyModel, select
from candle_mi_parity.spec.families import FAMILIES, RECURRENT
from candle_mi_parity.spec.paths import cache_root
from tests.support.planting import CASES

LLAMA = TinyModel(source="tiny", config="models/llama.json", dialect="hub")
LLAMA_TENSORS = "9954571900e0c06a6c2ef09d8dc276896c4ab781796a8c5636c3634dea0823be"


def tensors_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(load_file(directory / "model.safetensors").items()):
        digest.update(f"{name}{list(array.shape)}{array.dtype}".encode() + array.astype("<f4").tobytes())
    return digest.hexdigest()


def test_weights_are_bit_identical_everywhere_and_under_both_dialects(tmp_path: Path) -> None:
    v5 = model_directory(LLAMA.model_copy(update={"dialect": "v5"}), tmp_path)
    assert tensors_digest(v5) == tensors_digest(model_directory(LLAMA, tmp_path)) == LLAMA_TENSORS
    hub, saved = read_config(prepare(CASES["llama/hub"], cache_root()).model_dir), read_config(v5)
    assert hub["rope_theta"] == 500000.0 and "rope_theta" not in saved
    assert isinstance(saved["rope_parameters"], dict) and saved["rope_parameters"]["rope_theta"] == 500000.0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_zero_or_at_a_default(family: str) -> None:
    offset = FAMILIES[family].norm_offset
    biases = 0
    for name, array in load_file(
        prepare(CASES[f"{family}/hub"], cache_root()).model_dir / "model.safetensors"
    ).items():
        assert array.dtype == np.float32 and array.std() > 0.01, f"{family}: {name} is constant"
        assert (array == 0).mean() < 0.01, f"{family}: {name} holds zeros"
        if name.endswith(".bias"):
            biases += 1
            assert 0.05 < array.std() < 0.2, name
        elif array.ndim == 1:
            assert abs(array.mean() - (1 - offset)) < 0.15 and 0.1 < array.std() < 0.3, name
        else:
            assert array.std() * array.shape[-1] ** 0.5 == pytest.approx(1, abs=0.15), name
    assert (biases > 0) == (family in ("qwen2", "starcoder2")), "a dropped bias would not show"


def test_no_prompt_is_as_long_as_there_are_heads() -> None:
    """Otherwise an exchange of the two axes could not show as a wrong shape."""
    for case in select([*CASES.values()], []):
        if isinstance(case.model, TinyModel) and case.id.endswith(("/hub", "/v5", "/window")):
            subject = prepare(case, cache_root())
            config, length = read_config(subject.model_dir), len(subject.tokens[0])
            if subject.model_type in RECURRENT:
                heads = [int(str(config["hidden_size"])) // int(str(config.get("head_dim", config.get("head_size"))))]
            else:
                heads = [int(str(config[key])) for key in ("num_attention_heads", "num_key_value_heads")]
            assert length not in (*heads, 1), case.id


def test_a_model_is_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_directory(LLAMA, tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr(generate, "_generate", never)
    assert model_directory(LLAMA, tmp_path) == first
    with pytest.raises(AssertionError, match="generated again"):
        model_directory(LLAMA.model_copy(update={"change": {"vocab_size": 50}}), tmp_path)


def test_the_digest_of_a_model_sees_config_and_weights(tmp_path: Path) -> None:
    found = []
    for config, weights in (("{}", b"a"), ("{}", b"b "), ('{"a": 1}', b"a")):
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "model.safetensors").write_bytes(weights)
        found.append(model_digest(tmp_path))
        (tmp_path / "notes.md").write_text(config)
        assert model_digest(tmp_path) == found[-1]
    a, b = (hashlib.sha256(content).hexdigest() for content in (b"{}", b"a"))
    assert found[0] == hashlib.sha256(f"config.json:{a}\nmodel.safetensors:{b}\n".encode()).hexdigest()
    assert len(set(found)) == 3


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a bug"), KeyboardInterrupt()])
def test_an_incomplete_directory_is_not_published(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "models" / "key"
    for leftover in (target, target.with_name(".key.making") / "old"):
        leftover.mkdir(parents=True)

    def held() -> list[str]:
        paths = (path for path in target.parent.rglob("*") if path.suffix != ".lock")
        return sorted(str(path.relative_to(target.parent)) for path in paths)

    def make(out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise error

    with pytest.raises(ModelError if isinstance(error, OSError) else type(error)):
        publish(target, make)
    assert held() == ["key"], "a half-made directory was left behind"
    assert publish(target, lambda out: (out / "a").touch()) == target and held() == ["key", "key/a"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot write to the cache \S+: Not a directory"):
        model_directory(LLAMA, tmp_path / "file")


# --- chunks ---------------------------------------------------------------------------------------

FULL = CASES["gemma-2-2b/generated"]
SHAPES: dict[str, tuple[int, ...]] = {"b.weight": (7, 5), "a.bias": (3,), "a.norm": (1,), "c.weight": (2, 3, 4)}


def plain(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    return tensor_chunks(name, shape, 0)


def test_numbers_are_sums_of_twelve_integers_for_any_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.asarray(bit_stream("x").random_raw(3 * 1000), "<u8")
    sums = np.frombuffer(words.tobytes(), "<u2").reshape(1000, 12).astype(np.int64).sum(axis=1)
    for chunk in (1, 7, 999, 1000, 1 << 16):
        monkeypatch.setattr(generate, "CHUNK", chunk)
        found = [*normal_numbers("x", 1000)]
        assert len(found) == -(-1000 // chunk)
        np.testing.assert_array_equal(np.concatenate(found), (sums - 393210) / 65536.0)


def test_another_seed_gives_other_weights_in_another_directory(tmp_path: Path) -> None:
    other = prepare(CASES["gemma/other-weights"], tmp_path)
    assert other.model_digest != prepare(CASES["gemma/hub"], tmp_path).model_digest
    for name, shape in SHAPES.items():
        values = {next(tensor_chunks(name, shape, 0, seed)).tobytes() for seed in (0, 1, 2)}
        assert len(values) == 3 and tensor_values(name, shape, 0).tobytes() in values


def test_a_file_is_the_one_that_safetensors_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: tensor_values(name, shape, 0) for name, shape in SHAPES.items()}
    save_file(whole, tmp_path / "whole", metadata={"format": "pt"})
    monkeypatch.setattr(generate, "CHUNK", 4)
    assert write_safetensors(tmp_path / "ours", SHAPES, plain) == sum(array.nbytes for array in whole.values())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(OSError, match="4 bytes of tensors, 8 announced"):
        write_safetensors(tmp_path / "ours", {"a": (2,)}, lambda name, shape: iter([np.zeros(1, np.float32)]))


def test_the_digest_of_a_saved_config_does_not_depend_on_the_version_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["llama/v5"]
    first = prepare(case, tmp_path / "first")
    assert "transformers_version" not in json.loads((first.model_dir / "config.json").read_text())
    monkeypatch.setattr(transformers.configuration_utils, "__version__", "9.9.9")
    monkeypatch.setattr(generate, "version", lambda _: "9.9.9")
    second = prepare(case, tmp_path / "second")
    assert first.model_dir.name != second.model_dir.name
    assert (second.model_digest, second.digest) == (first.model_digest, first.digest)


def test_the_full_size_is_that_of_gemma_2_2b(tmp_path: Path) -> None:
    assert isinstance(FULL.model, TinyModel) and isinstance(FULL.sae, ScopeSae) and FULL.lane == "fullsize"
    write_config(tiny_config(FULL.model), FULL.model.dialect, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    # What the hub says of google/gemma-2-2b.
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_614_341_888
    assert (FULL.model.shards, FULL.sae.d_sae, FULL.sae.hook) == (3, 16384, "blocks.0.hook_resid_post")


def test_a_generated_scope_sae_is_a_jumprelu_and_reproducible(tmp_path: Path) -> None:
    row = ScopeSae(layer=0, d_sae=40, threshold=1.5)
    one, other = (sae_path(row, 16, tmp_path / name) for name in "ab")
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()
    sae = load_sae(one)
    assert (sae.architecture, sae.d_in, sae.d_sae) == ("JumpReLU", 16, 40)
    assert sae.threshold is not None and sae.threshold.min() >= 1.5 and len(set(sae.threshold)) == 40
    assert all(array.std() > 0 for array in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    assert sae_path(row, 17, tmp_path / "a") != one
