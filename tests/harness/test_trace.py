"""A damaged trace is refused with one line of TraceError that names the file, and no other exception."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from candle_mi_parity.errors import TraceError
from candle_mi_parity.trace.formats import round_to_dtype
from candle_mi_parity.trace.trace import Trace
from tests.support.planting import Edit, compare_trace, entry, real, write

NAME = "blocks.0.attn.hook_k"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A valid trace, which each test damages."""
    return write(tmp_path, real("llama/hub"))


def read(path: Path, name: str | None) -> None:
    trace = Trace(path)
    for each in [name] if name else trace.entries:
        trace.tensor(each)


def refused(path: Path, name: str | None = None) -> str:
    """The message with which a trace, or one of its tensors, is refused."""
    with pytest.raises(TraceError) as caught:
        read(path, name)
    message = str(caught.value)
    assert "\n" not in message and (path.name in message or ".safetensors" in message), message
    return message


def edited(path: Path, edit: Edit) -> Path:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


def test_a_truncated_file_is_refused(path: Path) -> None:
    assert all(result.status == "PASS" for result in compare_trace(real("llama/hub"), path))
    for file, said in ((path, "not valid JSON"), (path.with_suffix(".safetensors"), "")):
        content = file.read_bytes()
        for length in [*range(0, 64, 3), *range(64, len(content), len(content) // 40), len(content) - 1]:
            file.write_bytes(content[:length])
            assert said in refused(path), f"{file.name} truncated after {length} bytes"
        file.write_bytes(content)


@pytest.mark.parametrize("form", ["candle-mi-parity/trace/2", None, 1, ["candle-mi-parity/trace/1"]])
def test_an_unknown_format_is_refused_before_the_schema_is_checked(path: Path, form: object) -> None:
    edited(path, lambda document: document.update(format=form, header="nonsense"))
    shown = type(form).__name__ if isinstance(form, list) else repr(form)
    assert f"format is {shown}, expected 'candle-mi-parity/trace/1'" in refused(path)
    path.write_text("[]")
    assert "format is None" in refused(path)


DAMAGED: dict[str, tuple[str, str, str]] = {
    "null": ('"threads": 2', '"threads": null', "run.threads"),
    "unknown key with a line break": ('"threads": 2', '"threads": 2, "col\\nour": "red"', "run.col"),
    "missing key": ('"candle": "0.11.1", ', "", "header.candle: Field required"),
    "text for a number": ('"threads": 2', '"threads": "2"', "run.threads"),
    "number beyond float64": ('"forward": 0.1', f'"forward": {"9" * 400}', "run.seconds.forward"),
    "negative token": ('"tokens": [[1,', '"tokens": [[-1,', "tokens.0.0"),
    "digest too short": ('"sae_digest": null', '"sae_digest": "abc"', "header.sae_digest"),
    "lone surrogate": ('"device": "cpu"', '"device": "\\ud800"', "header.device"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_violation_of_the_schema_is_refused_with_its_place(path: Path, name: str) -> None:
    old, new, expected = DAMAGED[name]
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert expected in refused(path)


def test_a_file_that_is_absent_or_a_directory_is_refused(path: Path) -> None:
    path.unlink()
    assert "no such file" in refused(path)
    path.mkdir()
    assert "Is a directory" in refused(path)


# --- tensors --------------------------------------------------------------------------------------


def tensor(**change: Any) -> Edit:
    return lambda document: document["tensors"][3].update(change)


def inline(values: list[Any], shape: list[int], **change: Any) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        kept = {key: value for key, value in document["tensors"][3].items() if key not in ("file", "key")}
        document["tensors"][3] = kept | {"values": values, "shape": shape} | change

    return edit


TENSORS: dict[str, tuple[Edit, str]] = {
    "name given twice": (lambda d: d["tensors"].append(dict(d["tensors"][3])), f"tensors given twice: {NAME}"),
    "digest of another tensor": (lambda d: d["tensors"][3].update(sha256=d["tensors"][2]["sha256"]), "have sha256"),
    "unknown key": (tensor(key="nothing"), "cannot read nothing"),
    "absent file": (tensor(file="other.safetensors"), "other.safetensors, which holds"),
    "the JSON itself as the file": (tensor(file="trace.json"), "cannot read"),
    "path to the parent": (tensor(file="../trace.safetensors"), "tensors.3.file"),
    "absolute path": (tensor(file="/etc/passwd"), "tensors.3.file"),
    "the directory": (tensor(file="."), "tensors.3.file"),
    "wrong shape": (tensor(shape=[1, 24, 2, 20]), "declared float32[1, 24, 2, 20]"),
    "huge shape": (tensor(shape=[2**62, 2**62]), "declared float32"),
    "negative shape": (tensor(shape=[-1, 24, 20]), "tensors.3.shape"),
    "wrong dtype": (tensor(dtype="float64"), "declared float64[1, 2, 24, 20]"),
    "unknown dtype": (tensor(dtype="int8"), "tensors.3.dtype"),
    "bfloat16 that is float32": (tensor(dtype="bfloat16"), "is F32[1, 2, 24, 20] in trace.safetensors, declared bf"),
    "both places": (tensor(values=[1.0]), "exactly one of `values` and `file`"),
    "file without key": (tensor(key=None), "exactly one of `values` and `file`"),
    "too few inline values": (inline([1.0], [2**62, 2**62]), "1 values for shape"),
    "inline null": (inline([None], [1]), "tensors.3.values.0"),
    "inline too large for float32": (inline([1e39], [1]), "have sha256"),
    "name with an escape sequence": (tensor(name="\x1b[31m"), "holds unprintable characters"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_differs_from_its_entry_is_refused(path: Path, name: str) -> None:
    edit, expected = TENSORS[name]
    assert expected in refused(edited(path, edit))


def test_valid_inline_values_are_accepted(path: Path) -> None:
    value = np.array([[0.1, -2.0]], np.float32)
    edited(path, inline(value.ravel().tolist(), [1, 2], sha256=entry("x", value, "")["sha256"]))
    np.testing.assert_array_equal(Trace(path).tensor(NAME), value)


def test_bfloat16_is_read_exactly_or_refused(path: Path) -> None:
    value = torch.tensor([[1.0, -0.0, 3.140625], [1e-40, float("inf"), -1e38]]).bfloat16()
    beside = path.with_name("half.safetensors")
    save_file({"x": value}, beside)
    digest = hashlib.sha256(value.view(torch.uint16).numpy().tobytes()).hexdigest()
    place = {"dtype": "bfloat16", "shape": [2, 3], "file": beside.name, "key": "x"}
    edited(path, tensor(sha256=digest, nonfinite=1, **place))
    np.testing.assert_array_equal(Trace(path).tensor(NAME), value.float().numpy())
    content = beside.read_bytes()
    for length in range(0, len(content), 7):
        beside.write_bytes(content[:length])
        refused(path, NAME)
    beside.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "sha256" in refused(path, NAME)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_inputs_of_a_format_are_numbers_of_that_format(dtype: str) -> None:
    """Also below its normal range; a candidate would otherwise round them once more."""
    draw = np.random.Generator(np.random.PCG64(0)).standard_normal(4096)
    for scale in (1.0, 2.0**-10, 2.0**-16, 2.0**-20):
        rounded = torch.from_numpy(round_to_dtype(draw * scale, dtype))
        assert torch.equal(rounded.to(getattr(torch, dtype)).float(), rounded), scale
        assert torch.allclose(rounded.double(), torch.from_numpy(draw * scale), rtol=2.0**-8, atol=2.0**-25)
