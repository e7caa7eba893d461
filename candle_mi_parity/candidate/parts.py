"""The emitter's optional parts: one that does not compile against a candidate costs its own results and no others."""

from __future__ import annotations

from pathlib import Path

from candle_mi_parity.candidate.cargo import Ran

PARTS = ("calls", "sae", "tokens")
"""Features of the emitter's crate; ``calls`` needs ``sae``."""
_FILES = {
    "answer.rs": "calls",
    "call.rs": "calls",
    "call_measures.rs": "calls",
    "call_model.rs": "calls",
    "call_sae.rs": "calls",
    "sae.rs": "sae",
    "tokenize.rs": "tokens",
}


def broken_parts(ran: Ran) -> dict[str, str]:
    """Part → its first error, if every error of a build lies in an optional part; otherwise nothing."""
    broken: dict[str, str] = {}
    for target, one in ran.diagnostics_by_target:
        if one["level"] != "error" or not (spans := [span for span in one["spans"] if span["is_primary"]]):
            continue  # such as "aborting due to 2 previous errors"
        part = _FILES.get(Path(spans[0]["file_name"]).name) if target == "parity-emitter" else None
        if part is None:
            return {}
        place = f"{spans[0]['file_name']}:{spans[0]['line_start']}:{spans[0]['column_start']}"
        broken.setdefault(part, f"{place}: error: {one['message']}")
    if "sae" in broken:
        broken.setdefault("calls", broken["sae"])
    return broken
