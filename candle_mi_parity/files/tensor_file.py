"""A safetensors file that is read tensor by tensor, or box by box."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from candle_mi_parity.files.untrusted import require_regular

WINDOW = 32 << 20
"""Bytes after which the file is mapped again, because pages that were read count as memory of the process."""
MAX_HEADER = 16 << 20
"""Bytes; about 100,000 tensors. safetensors allows 100 MB, whose parsing takes a gigabyte."""


class TensorFile:
    """The file is opened at the first read; methods raise the exceptions of safetensors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._read = 0

    def tensor(self, key: str) -> np.ndarray:
        return self._counted(np.asarray(self._opened().get_tensor(key)))

    def box(self, key: str, box: tuple[slice, ...]) -> np.ndarray:
        return self._counted(np.asarray(self._opened().get_slice(key)[box]))

    def kind(self, key: str) -> tuple[str, list[int]]:
        """The dtype, as safetensors spells it, and the shape."""
        part = self._opened().get_slice(key)
        return str(part.get_dtype()), list(part.get_shape())

    def raw(self, key: str) -> bytes:
        """The bytes of a tensor whose format numpy lacks."""
        self._opened()  # safetensors checks the header
        with self._path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            start, end = json.loads(file.read(size))[key]["data_offsets"]
            file.seek(8 + size + start)
            return file.read(end - start)

    def keys(self) -> set[str]:
        return set(self._opened().keys())

    def metadata(self) -> dict[str, str]:
        return dict(self._opened().metadata() or {})

    def _opened(self) -> Any:
        if self._file is None:
            self._check_header()
            try:
                self._file, self._read = safe_open(self._path, framework="numpy"), 0
            except SafetensorError as error:
                raise SafetensorError(f"{self._path.name}: {self._cut_off() or error}") from error
        return self._file

    def _check_header(self) -> None:
        require_regular(self._path)
        with self._path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise SafetensorError(
                    f"{self._path.name}: it has {len(start) or 'no'} bytes, and a safetensors file begins with 8 "
                    "that give the length of its header"
                )
            if start == b"version ":
                raise SafetensorError(
                    f"{self._path.name}: it is a pointer of Git LFS in place of the file: run `git lfs pull`"
                )
            if (size := int.from_bytes(start, "little")) > MAX_HEADER:
                raise SafetensorError(f"{self._path.name}: a header of {size} bytes, more than {MAX_HEADER}")

    def _cut_off(self) -> str:
        """How many bytes are missing at the end of the file; empty if its header does not tell or none is."""
        there = self._path.stat().st_size - 8
        with self._path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > there:
                return f"it is cut off: its header has {size} bytes, and the file has {there} after the first 8"
            try:
                header = json.loads(file.read(size))
                described = max(part["data_offsets"][1] for name, part in header.items() if name != "__metadata__")
            except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                return ""
        there -= size
        if isinstance(described, int) and described > there:
            return f"it is cut off: its header describes {described} bytes of tensors, and {there} follow it"
        return ""

    def _counted(self, array: np.ndarray) -> np.ndarray:
        self._read += array.nbytes
        if self._read > WINDOW:
            self._file = None
        return array
