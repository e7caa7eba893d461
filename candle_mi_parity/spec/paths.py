"""The paths of this clone, its fixtures, its command, and the cache."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
OUTPUTS = ROOT / "rust_outputs"
"""The stored traces of candle-mi's releases."""


def cache_root() -> Path:
    """``$PARITY_CACHE``, or ``~/.cache/candle-mi-parity``: built emitters, generated models, truths."""
    return Path(os.environ.get("PARITY_CACHE") or "~/.cache/candle-mi-parity").expanduser()


def command(*arguments: str) -> str:
    """A call of ``candle-mi-parity`` to be copied into a shell; in a clone, relative to its root."""
    clone = Path(sys.prefix).resolve() == ROOT / ".venv"
    return shlex.join([".venv/bin/candle-mi-parity" if clone else "candle-mi-parity", *arguments])
