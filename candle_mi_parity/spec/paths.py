"""Where things lie: this clone and its fixtures, and the cache."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"


def cache_root() -> Path:
    """``$PARITY_CACHE``, or ``~/.cache/candle-mi-parity``: built emitters, generated models, truths."""
    told = os.environ.get("PARITY_CACHE")
    return Path(told).expanduser() if told else Path.home() / ".cache" / "candle-mi-parity"
