"""A trace is untrusted input: whatever is wrong with it is one line of TraceError, and never another exception.

A trace that is half written, tampered with, or of another version must end as an ERROR that names the file, and
neither as numbers that look like a divergence nor as a stack trace.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from candle_mi_parity.errors import TraceError
from candle_mi_parity.trace.trace import Trace, read_json
from tests.support.planting import Edit, compare_trace, entry, real, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good trace; each test spoils it."""
    return write(tmp_path, real("llama/hub"))


def read_all(path: Path) -> int:
    trace = Trace(path)
    return sum(trace.tensor(name).size for name in trace.entries)


def refused(path: Path) -> str:
    """The one line with which a trace is refused."""
    with pytest.raises(TraceError) as caught:
        read_all(path)
    message = str(caught.value)
    assert "\n" not in message, f"not one line: {message!r}"
    assert path.name in message or "trace.safetensors" in message, f"does not name the file: {message!r}"
    return message


def edited(path: Path, edit: Edit) -> Path:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


def test_the_unspoilt_twin_is_read_whole(path: Path) -> None:
    expected = sum(tensor.value.size for tensor in real("llama/hub").truth.tensors.values())
    assert read_all(path) == expected
    assert all(result.status == "PASS" for result in compare_trace(real("llama/hub"), path))


def test_a_document_cut_off_anywhere_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in [*range(64), *range(64, len(content), 199), len(content) - 1]:
        path.write_bytes(content[:length])
        assert "not valid JSON" in refused(path), f"cut after {length} bytes"


@pytest.mark.parametrize("form", ["candle-mi-parity/trace/2", "", None, 1, ["candle-mi-parity/trace/1"], {}])
def test_an_unknown_format_is_refused_before_anything_else(path: Path, form: object) -> None:
    spoilt = edited(path, lambda document: document.update(format=form, header="nonsense"))
    shown = type(form).__name__ if isinstance(form, list | dict) else repr(form)
    assert f"format is {shown}, expected 'candle-mi-parity/trace/1'" in refused(spoilt)


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', "{}", "[[1]]"])
def test_json_that_is_no_trace_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    assert "format is None" in refused(path)


SPOILT: dict[str, tuple[str, str, str]] = {
    "duplicate key": ('"device": "cpu"', '"device": "cpu", "device": "cpu"', "key given twice: 'device'"),
    "duplicate key with a line break": ('"device": "cpu"', '"a\\nb": 1, "a\\nb": 1', "key given twice"),
    "NaN": ('"threads": 2', '"threads": NaN', "NaN is not JSON"),
    "Infinity": ('"threads": 2', '"threads": -Infinity', "-Infinity is not JSON"),
    "null": ('"threads": 2', '"threads": null', "run.threads"),
    "null for a number": ('"forward": 0.1', '"forward": null', "run.seconds.forward"),
    "unknown key": ('"threads": 2', '"threads": 2, "colour": "red"', "run.colour"),
    "unknown key with a line break": ('"threads": 2', '"threads": 2, "col\\nour": "red"', "run.col"),
    "missing key": ('"candle": "0.11.1", ', "", "header.candle: Field required"),
    "text for a number": ('"threads": 2', '"threads": "2"', "run.threads"),
    "true for a number": ('"threads": 2', '"threads": true', "run.threads"),
    "huge number": ('"threads": 2', f'"threads": {"9" * 5000}', "not valid JSON"),
    "huge number for a float": ('"forward": 0.1', f'"forward": {"9" * 400}', "run.seconds.forward"),
    "negative token": ('"tokens": [[1,', '"tokens": [[-1,', "tokens.0.0"),
    "digest too short": ('"sae_digest": null', '"sae_digest": "abc"', "header.sae_digest"),
    "lone surrogate": ('"device": "cpu"', '"device": "\\ud800"', "header.device"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_document_that_breaks_the_schema_is_refused_where_it_breaks(path: Path, name: str) -> None:
    old, new, said = SPOILT[name]
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert said in refused(path)


def test_a_file_that_is_not_there_or_a_directory_is_refused(path: Path) -> None:
    path.unlink()
    assert "no such file" in refused(path)
    path.mkdir()
    assert "Is a directory" in refused(path)


def test_read_json_is_strict_about_any_document(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, {"b": 0.1}]}')
    assert read_json(path) == {"a": [1, {"b": 0.1}]}


# --- its tensors ----------------------------------------------------------------------------------


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
