"""Where things lie: this clone, its fixtures, its command, and the cache."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
OUTPUTS = ROOT / "rust_outputs"
"""What the releases of candle-mi emitted."""


def cache_root() -> Path:
    """``$PARITY_CACHE``, or ``~/.cache/candle-mi-parity``: built emitters, generated models, truths."""
    told = os.environ.get("PARITY_CACHE")
    return Path(told).expanduser() if told else Path.home() / ".cache" / "candle-mi-parity"


def command(*arguments: str) -> str:
    """A call of ``candle-mi-parity`` to be copied into a shell; in a clone, from the clone's root."""
    clone = Path(sys.prefix).resolve() == ROOT / ".venv"
    return shlex.join([".venv/bin/candle-mi-parity" if clone else "candle-mi-parity", *arguments])
