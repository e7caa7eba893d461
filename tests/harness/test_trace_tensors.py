"""The tensors of a trace are untrusted: a name, shape, dtype, place or digest that is not so is one line.

A file may only be named, never located: no path, link or other directory is followed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from candle_mi_parity.errors import TraceError
from candle_mi_parity.trace.trace import Trace
from tests.harness.test_trace import edited, refused
from tests.support.planting import Edit, entry, real, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good trace; each test spoils it."""
    return write(tmp_path, real("llama/hub"))


def tensor(**change: Any) -> Edit:
    return lambda document: document["tensors"][3].update(change)


def inline(values: list[Any], shape: list[int], **change: Any) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        kept = {key: value for key, value in document["tensors"][3].items() if key not in ("file", "key")}
        document["tensors"][3] = kept | {"values": values, "shape": shape} | change

    return edit


def twice(document: dict[str, Any]) -> None:
    document["tensors"].append(dict(document["tensors"][3]))


TENSORS: dict[str, tuple[Edit, str]] = {
    "name given twice": (twice, "tensors given twice: blocks.0.attn.hook_k"),
    "wrong digest": (tensor(sha256="0" * 64), "bytes of blocks.0.attn.hook_k have sha256"),
    "digest of another tensor": (lambda d: d["tensors"][3].update(sha256=d["tensors"][2]["sha256"]), "have sha256"),
    "a key that is not there": (tensor(key="nothing"), "cannot read nothing"),
    "a file that is not there": (tensor(file="other.safetensors"), "other.safetensors is not beside it"),
    "the JSON itself as the file": (tensor(file="trace.json"), "cannot read"),
    "path to the parent": (tensor(file="../trace.safetensors"), "tensors.3.file"),
    "absolute path": (tensor(file="/etc/passwd"), "tensors.3.file"),
    "path below": (tensor(file="a/trace.safetensors"), "tensors.3.file"),
    "hidden file": (tensor(file=".trace.safetensors"), "tensors.3.file"),
    "the directory": (tensor(file="."), "tensors.3.file"),
    "file name with a line break": (tensor(file="trace.safetensors\n"), "tensors.3.file"),
    "wrong shape": (tensor(shape=[1, 24, 2, 20]), "declared float32[1, 24, 2, 20]"),
    "shape without the batch": (tensor(shape=[2, 24, 20]), "declared float32[2, 24, 20]"),
    "huge shape": (tensor(shape=[2**62, 2**62]), "declared float32"),
    "negative shape": (tensor(shape=[-1, 24, 20]), "tensors.3.shape"),
    "wrong dtype": (tensor(dtype="float64"), "declared float64[1, 2, 24, 20]"),
    "unknown dtype": (tensor(dtype="int8"), "tensors.3.dtype"),
    "bfloat16 that is float32": (tensor(dtype="bfloat16"), "is F32[1, 2, 24, 20], declared bfloat16"),
    "both places": (tensor(values=[1.0]), "exactly one of `values` and `file`"),
    "no place": (tensor(file=None, key=None), "exactly one of `values` and `file`"),
    "file without key": (tensor(key=None), "exactly one of `values` and `file`"),
    "too few inline values": (inline([1.0], [1, 2]), "1 values for shape [1, 2]"),
    "inline values of a huge shape": (inline([1.0], [2**62, 2**62]), "1 values for shape"),
    "inline null": (inline([None], [1]), "tensors.3.values.0"),
    "inline text": (inline(["1"], [1]), "tensors.3.values.0"),
    "inline too large for float32": (inline([1e39], [1]), "have sha256"),
    "inline too large for a float": (inline([10**400], [1]), "tensors.3.values.0"),
    "tensor name with a line break": (tensor(name="a\nb"), "'a\\nb' holds unprintable characters"),
    "tensor name that colours a terminal": (tensor(name="\x1b[31m"), "holds unprintable characters"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_not_what_it_says_is_refused(path: Path, name: str) -> None:
    edit, said = TENSORS[name]
    assert said in refused(edited(path, edit))


def test_good_inline_values_are_accepted(path: Path) -> None:
    value = np.array([[0.1, -2.0]], np.float32)
    good = inline([float(v) for v in value.ravel()], [1, 2], sha256=entry("x", value, "")["sha256"])
    np.testing.assert_array_equal(Trace(edited(path, good)).tensor("blocks.0.attn.hook_k"), value)


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    beside = path.with_suffix(".safetensors")
    elsewhere = tmp_path / "elsewhere"
    beside.rename(elsewhere)
    beside.symlink_to(elsewhere)
    assert "trace.safetensors is not beside it" in refused(path)


def test_a_tensor_file_cut_off_anywhere_is_refused(path: Path) -> None:
    beside = path.with_suffix(".safetensors")
    content = beside.read_bytes()
    for length in [*range(0, 64, 3), *range(64, len(content), len(content) // 40), len(content) - 1]:
        beside.write_bytes(content[:length])
        refused(path)


def bfloat16(path: Path, value: torch.Tensor) -> Path:
    """Put a bfloat16 tensor in place of one, in a file of its own, as the emitter writes it."""
    save_file({"x": value}, path.with_name("half.safetensors"))
    content = value.view(torch.uint16).numpy().tobytes()
    change = {"dtype": "bfloat16", "shape": list(value.shape), "file": "half.safetensors", "key": "x"}
    return edited(path, tensor(sha256=hashlib.sha256(content).hexdigest(), **change))


def test_bfloat16_is_read_exactly(path: Path) -> None:
    value = torch.tensor([[1.0, -0.0, 3.140625], [1e-40, float("inf"), -1e38]]).bfloat16()
    found = Trace(bfloat16(path, value)).tensor("blocks.0.attn.hook_k")
    np.testing.assert_array_equal(found, value.float().numpy())


def test_a_bfloat16_file_that_was_changed_or_cut_off_is_refused(path: Path) -> None:
    bfloat16(path, torch.linspace(-3, 3, 40).bfloat16().reshape(5, 8))
    beside = path.with_name("half.safetensors")
    content = beside.read_bytes()
    for length in range(0, len(content), 7):
        beside.write_bytes(content[:length])
        half_refused(path)
    beside.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "sha256" in half_refused(path)
    beside.unlink()
    assert "half.safetensors is not beside it" in half_refused(path)


def half_refused(path: Path) -> str:
    with pytest.raises(TraceError) as caught:
        Trace(path).tensor("blocks.0.attn.hook_k")
    assert "\n" not in str(caught.value)
    return str(caught.value)
