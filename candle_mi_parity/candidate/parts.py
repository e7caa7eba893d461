"""The emitter's optional parts: one that does not compile against a candidate costs its own results and no others.

A part is a feature of the emitter's crate. Some parts switch on a feature of candle-mi, such as ``quantized``, and
are absent from the build of a candle-mi without it. Those in ``default`` are in every build. The others, the *lanes*,
change what the rest computes, and each is a build of its own, which is made when it is asked for.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from candle_mi_parity.candidate.cargo import Ran
from candle_mi_parity.spec.paths import EMITTER

EMITTER_CRATE = "parity-emitter"
_CANDLE_MI = "candle-mi/"
_FILES = {
    "answer.rs": "calls",
    "call.rs": "calls",
    "call_caches.rs": "calls",
    "call_clt.rs": "clt",
    "call_diffusion.rs": "diffusion",
    "call_gradients.rs": "calls",
    "call_measures.rs": "calls",
    "call_model.rs": "calls",
    "call_offsets.rs": "calls",
    "call_rwkv.rs": "rwkv-tokenizer",
    "call_sae.rs": "calls",
    "call_stoicheia.rs": "stoicheia",
    "call_training.rs": "training",
    "clt.rs": "clt",
    "quantized.rs": "quantized",
    "rwkv.rs": "rwkv",
    "sae.rs": "sae",
    "stoicheia.rs": "stoicheia",
    "tokenize.rs": "tokens",
}


def _features() -> dict[str, list[str]]:
    manifest = tomllib.loads((EMITTER / "Cargo.toml").read_text(encoding="utf-8"))
    return {str(name): list(needs) for name, needs in manifest["features"].items()}


_FEATURES = _features()
PARTS = tuple(_FEATURES["default"])
"""The parts of every build; ``calls`` needs ``sae``."""
SWITCHED: Mapping[str, str] = {
    part: need.removeprefix(_CANDLE_MI)
    for part, needs in _FEATURES.items()
    for need in needs
    if need.startswith(_CANDLE_MI) and part != "cuda"
}
"""Part → the feature of candle-mi that it switches on."""
LANES = tuple(part for part in SWITCHED if part not in PARTS)


def absent_parts(has: Callable[[str], bool]) -> tuple[str, ...]:
    """The parts and lanes for which a candle-mi does not have the feature.

    :param has: whether candle-mi has a feature.
    """
    return with_dependents(part for part, feature in SWITCHED.items() if not has(feature))


def with_dependents(parts: Iterable[str]) -> tuple[str, ...]:
    """The parts and those that need one of them, sorted."""
    found = set(parts)
    while more := {part for part, needs in _FEATURES.items() if part != "default" and found & set(needs)} - found:
        found |= more
    return tuple(sorted(found))


def broken_parts(ran: Ran) -> dict[str, str]:
    """Part → its first error, if every error of a build lies in an optional part; otherwise nothing."""
    broken: dict[str, str] = {}
    for target, error in _errors(ran):
        part = _FILES.get(Path(_primary(error)["file_name"]).name) if target == EMITTER_CRATE else None
        if part is None:
            return {}
        for each in with_dependents([part]):
            broken.setdefault(each, f"emitter/{_told(error)}")
    return broken


def broken_feature(ran: Ran, parts: Iterable[str], attempt: Callable[[Collection[str]], Ran]) -> dict[str, str]:
    """Part → the first error of a build that lies in candle-mi, if it goes when the part is left out.

    An error does not say which feature of candle-mi it belongs to. Without such an error, or if it is there without
    any feature, nothing is returned.

    :param attempt: builds without some parts.
    """
    error = next((_told(error) for target, error in _errors(ran) if target != EMITTER_CRATE), "")
    switched = [part for part in parts if part in SWITCHED]

    def remains(without: Collection[str]) -> bool:
        return error in {_told(one) for _, one in _errors(attempt(without))}

    if not error or not switched or remains(with_dependents(switched)):
        return {}
    # The feature that the error names is tried first; the last one need not be tried.
    *tried, last = sorted(switched, key=lambda part: SWITCHED[part] not in error)
    alone = next((part for part in tried if not remains(with_dependents([part]))), last)
    return dict.fromkeys(with_dependents([alone]), error)


def _errors(ran: Ran) -> list[tuple[str, Mapping[str, Any]]]:
    """The errors that have a place, unlike "aborting due to 2 previous errors", each with its target."""
    found = [(target, one) for target, one in ran.diagnostics_by_target if one["level"] == "error"]
    return [(target, one) for target, one in found if any(span["is_primary"] for span in one["spans"])]


def _primary(error: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(span for span in error["spans"] if span["is_primary"])


def _told(error: Mapping[str, Any]) -> str:
    """``src/sae.rs:12:5: error: mismatched types``."""
    span = _primary(error)
    return f"{span['file_name']}:{span['line_start']}:{span['column_start']}: error: {error['message']}"
