"""JSON that is written whole or not at all, with every number spelt so that JSON can hold it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from candle_mi_parity.errors import ParityError
from candle_mi_parity.files import atomic


class ReportError(ParityError):
    """The report cannot be written."""


def plain(value: Any) -> Any:
    """The same value with NaN and infinities, which JSON lacks, as strings."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def write_json(data: Any, path: Path) -> None:
    """Write whole or not at all: a temporary file beside it, flushed to disk, renamed.

    :raises ReportError: the disk is full or read-only.
    """
    write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """The same of any text, as UTF-8.

    :raises ReportError: the disk is full or read-only.
    """
    try:
        atomic.write_text(text, path)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}") from error
