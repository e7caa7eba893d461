"""A model directory as it stands: ``config.json`` and its safetensors files, checked and digested."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from candle_mi_parity.errors import ModelError, ParityError
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.files.untrusted import read_json, require_inside


def require_model(directory: Path) -> Path:
    """The directory itself, once it is known to hold a config and one file of weights.

    :raises ModelError: naming the first thing that is missing.
    """
    if not directory.is_dir():
        raise ModelError(f"model directory {directory} does not exist")
    there = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
    if not (directory / "config.json").is_file():
        raise ModelError(f"model directory {directory} has no config.json; it holds {there}")
    if not weight_files(directory):
        raise ModelError(f"model directory {directory} has no model.safetensors nor its shards; it holds {there}")
    require_inside(directory, ModelError)
    _require_one_meaning(directory)
    return directory


ELSEWHERE = ("transformers_weights", "quantization_config")
"""Keys of ``config.json`` by which transformers reads other weights than those that are digested, or alters them."""


def _require_one_meaning(directory: Path) -> None:
    """Refuse what would make transformers load something else than the weights that the candidate is given.

    :raises ModelError: an adapter, a key that points elsewhere, shards without the index that lists just them.
    """
    if (directory / "adapter_config.json").exists():
        raise ModelError(f"model directory {directory} holds adapter_config.json: an adapter to another model")
    config = read_config(directory)
    if odd := [key for key in ELSEWHERE if config.get(key) is not None]:
        raise ModelError(f"{directory}/config.json: {odd[0]} is set; only plain weights are compared")
    files = [path.name for path in weight_files(directory)]
    if files == ["model.safetensors"]:
        return
    index = directory / "model.safetensors.index.json"
    found = read_json(index, ModelError)
    listed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(listed, dict) or {str(name) for name in listed.values()} != set(files):
        named = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else "no weight_map"
        raise ModelError(f"{index}: lists {one_line(str(named))}, and there are {one_line(str(files))}")


def weight_files(directory: Path) -> list[Path]:
    """``model.safetensors``, or else its shards ``model-*-of-*.safetensors`` in order; as the emitter chooses."""
    whole = directory / "model.safetensors"
    return [whole] if whole.is_file() else sorted(directory.glob("model-*-of-*.safetensors"))


class StoredTensor(NamedTuple):
    """Where a tensor of a model directory is, and its shape."""

    file: Path
    shape: tuple[int, ...]


def weight_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory's weights, by name; only headers are read.

    :raises ModelError: they cannot be read, or two files hold one tensor.
    """
    found: dict[str, StoredTensor] = {}
    try:
        for path in weight_files(directory):
            file = TensorFile(path)
            for name in sorted(file.keys()):
                if name in found:
                    raise ModelError(
                        f"{directory}: {one_line(name)} is in {found[name].file.name} and in {path.name}; which copy "
                        "is read depends on the reader, so candle-mi-parity refuses the directory"
                    )
                found[name] = StoredTensor(path, tuple(file.kind(name)[1]))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: weights cannot be read: {one_line(str(error))}") from error
    return found


def weight_bytes(directory: Path, itemsize: int) -> int:
    """What the weights of a model directory take at so many bytes a number.

    :raises ModelError: see :func:`weight_tensors`.
    """
    return itemsize * sum(math.prod(tensor.shape) for tensor in weight_tensors(directory).values())


def read_config(directory: Path) -> dict[str, object]:
    """``config.json`` as it stands, in its own dialect.

    :raises ModelError: when it is not a JSON object.
    """
    path = directory / "config.json"
    config = read_json(path, ModelError)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def model_digest(directory: Path) -> str:
    """sha256 over the ``name:sha256(file)`` lines of ``config.json`` and the weights; as the emitter computes it."""
    return digest_files([directory / "config.json", *weight_files(directory)])


def local_path(text: str, fault: type[ParityError]) -> Path:
    """A path as a user or a data file spells it.

    :raises ParityError: of the given kind, for a home that nobody has.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise fault(f"{one_line(text)}: {error}") from error
