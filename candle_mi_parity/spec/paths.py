"""The paths of this clone or of an installed package: data, command, cache."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PACKED = _PACKAGE / "data"
"""The data of an installed package; a clone has them beside the package."""
INSTALLED = _PACKED.is_dir()
ROOT = _PACKED if INSTALLED else _PACKAGE.parent
FIXTURES = ROOT / "fixtures"
EMITTER = ROOT / "emitter"
"""The Rust sources of the emitter."""
CENSUS = ROOT / ("census" if INSTALLED else "rust_outputs/census")
"""What the census said of each release."""
OUTPUTS = _PACKAGE.with_name("candle_mi_parity_stored") if INSTALLED else ROOT / "rust_outputs"
"""The stored traces of candle-mi's releases; of an installed package, the package ``candle-mi-parity-stored``."""


def cache_root() -> Path:
    """``$PARITY_CACHE``, or ``~/.cache/candle-mi-parity``: built emitters, generated models, truths."""
    return Path(os.environ.get("PARITY_CACHE") or "~/.cache/candle-mi-parity").expanduser()


def command(*arguments: str) -> str:
    """A call of ``candle-mi-parity`` that a shell runs as it is: by its path where a clone's own is meant."""
    prefix = Path(sys.prefix).resolve()
    if not prefix.is_relative_to(ROOT):
        return shlex.join(["candle-mi-parity", *arguments])
    program = prefix.relative_to(ROOT) / "bin" / "candle-mi-parity"
    return shlex.join([str(program if Path.cwd() == ROOT else ROOT / program), *arguments])
