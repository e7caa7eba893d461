"""A case of release 0.2.2 as it is stored, copied to where a test may damage it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from candle_mi_parity.candidate.store import write_named
from candle_mi_parity.spec.paths import OUTPUTS
from candle_mi_parity.trace.release import Release, StoredCase, StoredRelease, trace_name
from candle_mi_parity.trace.trace import MadeBy

INDEX = OUTPUTS / "0.2.2.json"
Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], object]


def as_emitted(directory: Path, case_id: str, edit: Edit | None = None) -> Path:
    """Write a stored trace as an emitter writes one: a JSON with its whole header, and all tensors in one file.

    :param edit: changes the document and the tensors, by name, before they are written.
    """
    stored = StoredRelease(INDEX)
    found = stored.release.cases[case_id].free
    assert isinstance(found, str)
    given = stored.release.model_dump(include=set(MadeBy.model_fields))
    kept = stored.file(trace_name(case_id, "free"), found)
    document = json.loads(kept.read_text())
    document["header"] = given | document["header"]
    path = directory / f"{case_id}.json"
    tensors: dict[str, np.ndarray] = {}
    for entry in document["tensors"]:
        tensors[entry["name"]] = load_file(kept.with_name(entry["file"]))[entry["key"]]
        entry["file"], entry["key"] = f"{path.stem}.safetensors", entry["name"]
    if edit is not None:
        edit(document, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".safetensors"))
    path.write_text(json.dumps(document))
    return path


def stored_copy(directory: Path, case_id: str, edit: Edit | None = None) -> Path:
    """A directory of stored traces, ``stored:DIR``, with one case; its index.

    :param edit: see :func:`as_emitted`.
    """
    written = as_emitted(directory / "traces", case_id, edit)
    digest = write_named(written.with_suffix(""), written.read_text())
    whole = StoredRelease(INDEX).release
    return write_index(directory, whole.model_copy(update={"cases": {case_id: StoredCase(free=digest)}}))


def write_index(directory: Path, release: Release) -> Path:
    """Write ``release.json``."""
    index = directory / "release.json"
    index.write_text(release.text())
    return index
