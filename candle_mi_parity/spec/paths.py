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
    """A call of ``candle-mi-parity`` that a shell runs as it is: by its path where a clone's own is meant."""
    if Path(sys.prefix).resolve() != ROOT / ".venv":
        return shlex.join(["candle-mi-parity", *arguments])
    program = Path(".venv/bin/candle-mi-parity")
    return shlex.join([str(program if Path.cwd() == ROOT else ROOT / program), *arguments])
