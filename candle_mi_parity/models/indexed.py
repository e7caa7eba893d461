"""Shards beside a whole file of weights: transformers reads ``model.safetensors``, candle-mi the shards of the index.

transformers 5.24 looks for ``model.safetensors`` before the index (``_get_resolved_checkpoint_files`` of
``modeling_utils``); ``resolve_safetensors_paths`` of candle-mi 0.2.2 (``src/backend.rs``) looks for the index first.
"""

from __future__ import annotations

from pathlib import Path

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.files.untrusted import read_object
from candle_mi_parity.models.checkpoint import given_files
from candle_mi_parity.models.prepared_case import PreparedCase

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def files_read(directory: Path, loader: str) -> list[Path]:
    """The files of weights that candle-mi reads of a directory with a given loader, as the emitter lists them."""
    return shards_beside(directory, loader) or given_files(directory)


def read_digest(subject: PreparedCase) -> str:
    """The digest of the config and the weights that candle-mi reads of a case."""
    shards = shards_beside(subject.given, subject.case.loader)
    return digest_files([subject.given / "config.json", *shards]) if shards else subject.given_digest


def shards_beside(directory: Path, loader: str) -> list[Path]:
    """The shards that an index names beside a whole file of weights, sorted, if the loader prefers the index.

    None where either file is missing.
    """
    index = directory / INDEX
    if loader != "pretrained" or not (index.is_file() and (directory / WHOLE).is_file()):
        return []
    listed = read_object(index, ModelError).get("weight_map")
    names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    return [path for name in names if (path := directory / name).parent == directory and path.is_file()]
