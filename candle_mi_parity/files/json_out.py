"""Writing JSON and text files atomically, with NaN and infinities as strings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from candle_mi_parity.errors import ParityError
from candle_mi_parity.files import atomic


class ReportError(ParityError):
    """The report cannot be written."""


def plain(value: Any) -> Any:
    """The value with NaN and infinities, which JSON does not have, as strings."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def unplain(value: Any) -> Any:
    """The inverse of :func:`plain`, for values in which no text is the name of such a number."""
    if isinstance(value, dict):
        return {key: unplain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unplain(item) for item in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def write_json(data: Any, path: Path) -> None:
    """Write JSON atomically, see :func:`plain`.

    :raises ReportError: the disk is full or read-only.
    """
    write_text(to_json(plain(data), indent=1, ensure_ascii=True).decode() + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write text in UTF-8 atomically.

    :raises ReportError: the disk is full or read-only.
    """
    try:
        atomic.write_text(text, path)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}") from error
