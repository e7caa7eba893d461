"""Which tensors of a checkpoint candle-mi loads a model without: doubled, they leave its logits as they were."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file, save_file

Logits = Callable[[Path], str]
"""The digest of the logits that candle-mi computes for a model directory."""


def unread_tensors(directory: Path, logits: Logits) -> list[str]:
    """Names of the tensors that do not move the logits, ``*`` for the number of a layer or expert; sorted.

    :param directory: a model in one file, all of whose values are nonzero; it is not changed.
    """
    tensors = load_file(directory / "model.safetensors")
    kinds: dict[str, list[str]] = {}
    for name in tensors:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    before = logits(directory)
    return [kind for kind, names in sorted(kinds.items()) if _logits_without(directory, names, logits) == before]


def _logits_without(directory: Path, names: list[str], logits: Logits) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        changed = Path(scratch)
        shutil.copy(directory / "config.json", changed)
        tensors = load_file(directory / "model.safetensors")
        for name in names:
            tensors[name] = tensors[name] * 2
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        return logits(changed)
