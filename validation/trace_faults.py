"""Harm done to a trace after it was written, by the name that a row gives as ``io``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.planting import real, write

Edit = Callable[[dict[str, Any]], object]
Harm = Callable[[Path], None]
OTHER = "0" * 64


def _file(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _edited(edit: Edit) -> Harm:
    def harm(path: Path) -> None:
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return harm


def _replaced(old: str, new: str) -> Harm:
    def harm(path: Path) -> None:
        text = path.read_text()
        assert old in text, f"{path} has no {old}"
        path.write_text(text.replace(old, new, 1))

    return harm


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _link(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    target = _file(path).rename(elsewhere / "tensors")
    _file(path).symlink_to(target)


def _byte(path: Path) -> None:
    content = bytearray(_file(path).read_bytes())
    content[-1] ^= 1
    _file(path).write_bytes(bytes(content))


def _wrong_file(path: Path) -> None:
    write(path.parent, real("mistral/hub"))


def _tokens(change: Callable[[list[int]], list[int]]) -> Harm:
    return _edited(lambda content: content.update(tokens=[change(row) for row in content["tokens"]]))


def _header(**values: object) -> Harm:
    return _edited(lambda content: content["header"].update(values))


def _first_tensor(**values: object) -> Harm:
    return _edited(lambda content: content["tensors"][0].update(values))


IO: dict[str, Harm] = {
    "bos_dropped": _tokens(lambda row: row[1:]),
    "bos_doubled": _tokens(lambda row: [row[0], *row]),
    "tokens_others_said": _tokens(lambda row: [*row[:-1], (row[-1] + 1) % 200]),
    "file_cut": lambda path: _cut(_file(path)),
    "file_missing": lambda path: _file(path).unlink(),
    "file_is_a_link": _link,
    "file_elsewhere": _first_tensor(file="../trace.safetensors"),
    "bytes_changed": _byte,
    "document_cut": _cut,
    "document_nan": _replaced('"scalars": {', '"scalars": {"odd": NaN, '),
    "document_key_twice": _replaced('"tokens":', '"tokens": [], "tokens":'),
    "document_key_unknown": _edited(lambda content: content.update(tolerance=1e9)),
    "format_unknown": _replaced("trace/1", "trace/2"),
    "tensor_twice": _edited(lambda content: content["tensors"].append(content["tensors"][0])),
    "case_stale": _edited(lambda content: content["header"]["case"].update(digest=OTHER)),
    "model_stale": _header(model_digest=OTHER),
    "sae_stale": _header(sae_digest=OTHER),
    "inputs_stale": _header(inputs_digest=OTHER),
    "dtype_said_bf16": _header(dtype="bfloat16"),
    "shape_said": _edited(lambda content: content["tensors"][0]["shape"].reverse()),
    "nonfinite_said": _first_tensor(nonfinite=1),
    "wrong_file": _wrong_file,
    "other_candidate": _edited(lambda content: content["header"]["candle_mi"].update(checksum="b" * 64)),
}
