"""Models and SAEs of any size are written a stretch at a time, with the bytes that a whole one would have."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from candle_mi_parity.models import generate
from candle_mi_parity.models.generate import (
    bit_stream,
    normal_numbers,
    tensor_stretches,
    tensor_values,
    tiny_config,
    write_config,
    write_safetensors,
)
from candle_mi_parity.models.sae import load_sae, sae_path
from candle_mi_parity.spec.cases import ScopeSae, TinyModel
from tests.support.planting import CASES

FULL = CASES["gemma-2-2b/generated"]
SHAPES: dict[str, tuple[int, ...]] = {"b.weight": (7, 5), "a.bias": (3,), "a.norm": (1,), "c.weight": (2, 3, 4)}


def plain(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    return tensor_stretches(name, shape, 0)


def test_numbers_are_sums_of_twelve_integers_whatever_the_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.asarray(bit_stream("x").random_raw(3 * 1000), "<u8")
    sums = np.frombuffer(words.tobytes(), "<u2").reshape(1000, 12).astype(np.int64).sum(axis=1)
    for stretch in (1, 7, 999, 1000, 1 << 16):
        monkeypatch.setattr(generate, "STRETCH", stretch)
        found = [*normal_numbers("x", 1000)]
        assert len(found) == -(-1000 // stretch)
        np.testing.assert_array_equal(np.concatenate(found), (sums - 393210) / 65536.0)


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: tensor_values(name, shape, 0) for name, shape in SHAPES.items()}
    save_file(whole, tmp_path / "whole", metadata={"format": "pt"})
    monkeypatch.setattr(generate, "STRETCH", 4)
    assert write_safetensors(tmp_path / "ours", SHAPES, plain) == sum(array.nbytes for array in whole.values())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_tensor_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="4 bytes of tensors, 8 announced"):
        write_safetensors(tmp_path / "ours", {"a": (2,)}, lambda name, shape: iter([np.zeros(1, np.float32)]))


def test_the_full_size_is_that_of_gemma_2_2b(tmp_path: Path) -> None:
    assert isinstance(FULL.model, TinyModel) and isinstance(FULL.sae, ScopeSae) and FULL.lane == "fullsize"
    write_config(tiny_config(FULL.model), FULL.model.dialect, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    # What the hub says of google/gemma-2-2b.
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_614_341_888
    assert (FULL.model.shards, FULL.sae.d_sae, FULL.sae.hook) == (3, 16384, "blocks.0.hook_resid_post")


def test_a_generated_scope_sae_is_a_jumprelu_and_the_same_each_time(tmp_path: Path) -> None:
    row = ScopeSae(layer=0, d_sae=40, threshold=1.5)
    one, other = (sae_path(row, 16, tmp_path / name) for name in "ab")
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()
    sae = load_sae(one)
    assert (sae.architecture, sae.d_in, sae.d_sae) == ("JumpReLU", 16, 40)
    assert sae.threshold is not None and sae.threshold.min() >= 1.5 and len(set(sae.threshold)) == 40
    assert all(array.std() > 0 for array in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    assert sae_path(row, 17, tmp_path / "a") != one
