"""A trace is untrusted input: whatever is wrong with it is one line of TraceError, and never another exception.

A trace that is half written, tampered with, or of another version must end as an ERROR that names the file, and
neither as numbers that look like a divergence nor as a stack trace.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from candle_mi_parity.errors import TraceError
from candle_mi_parity.trace.trace import Trace, read_json
from tests.support.planting import Edit, judge, real, write


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
    assert all(result.status == "PASS" for result in judge(real("llama/hub"), path))


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
