"""Model directories: ``config.json`` and safetensors files, checked and digested."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from candle_mi_parity.errors import ModelError, ParityError
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.files.untrusted import read_object, require_inside


def require_model(directory: Path) -> Path:
    """The directory itself, after a check that it holds a config and plain weights.

    :raises ModelError: naming the first thing that is missing.
    """
    if not directory.is_dir():
        raise ModelError(f"model directory {directory} does not exist")
    names = sorted(path.name for path in directory.iterdir())
    held = one_line(", ".join(names[:8])) or "nothing"
    if "adapter_config.json" in names:
        raise ModelError(
            f"model directory {directory} holds adapter_config.json: an adapter to another model; merge it into that "
            "model and save the whole"
        )
    if not (directory / "config.json").is_file():
        below = "; give a directory below its snapshots" if {"blobs", "snapshots"} <= {*names} else ""
        raise ModelError(f"model directory {directory} has no config.json; it holds {held}{below}")
    if not weight_files(directory):
        other = next((remedy for end, remedy in _OTHER_WEIGHTS.items() if any(n.endswith(end) for n in names)), "")
        raise ModelError(
            f"model directory {directory} has no model.safetensors and no shards; it holds {held}{other}"
        )
    require_inside(directory, ModelError)
    _require_plain_weights(directory)
    return directory


_OTHER_WEIGHTS = {
    ".bin": "; load it with transformers and save it with save_pretrained, which writes safetensors",
    ".gguf": "; GGUF is not read: give the directory of the model that it was made from",
}
"""End of a name of weights that are not read → what to do."""
ELSEWHERE = ("transformers_weights",)
"""Keys of ``config.json`` with which transformers loads other weights than the digested ones."""


def _require_plain_weights(directory: Path) -> None:
    """Refuse a directory from which transformers would load other weights than candle-mi.

    :raises ModelError: a key of :data:`ELSEWHERE`, or shards that the index does not list exactly.
    """
    config = read_config(directory)
    if odd := [key for key in ELSEWHERE if config.get(key) is not None]:
        raise ModelError(f"{directory}/config.json: {odd[0]} is set; only the weights of this directory are compared")
    files = [path.name for path in weight_files(directory)]
    if files == ["model.safetensors"]:
        return
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        raise ModelError(
            f"{directory}: there are shards ({one_line(', '.join(files))}) and no {index.name}, their index"
        )
    listed = read_object(index, ModelError).get("weight_map")
    named = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else "no weight_map"
    if named != files:
        raise ModelError(
            f"{index}: lists {one_line(str(named))}, and there are {one_line(str(files))}; expected the same files"
        )


def weight_files(directory: Path) -> list[Path]:
    """``model.safetensors``, or else the shards ``model-*-of-*.safetensors`` in order, as the emitter does."""
    whole = directory / "model.safetensors"
    return [whole] if whole.is_file() else sorted(directory.glob("model-*-of-*.safetensors"))


def given_files(directory: Path) -> list[Path]:
    """The files of weights that a candidate reads: :func:`weight_files`, or else pickles."""
    return weight_files(directory) or sorted(directory.glob("pytorch_model*.bin"))


class StoredTensor(NamedTuple):
    """The file and shape of a tensor."""

    file: Path
    shape: tuple[int, ...]


def weight_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a model directory by name; only headers are read.

    :raises ModelError: a file cannot be read, or two files hold the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    try:
        for path in weight_files(directory):
            file = TensorFile(path)
            for name in sorted(file.keys()):
                if name in found:
                    raise ModelError(
                        f"{directory}: {one_line(name)} is in {found[name].file.name} and in {path.name}; which copy "
                        "is used depends on the reader"
                    )
                found[name] = StoredTensor(path, tuple(file.kind(name)[1]))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: weights cannot be read: {one_line(str(error))}") from error
    return found


def weight_bytes(directory: Path, itemsize: int) -> int:
    """The size of a model's weights in memory with ``itemsize`` bytes per element.

    :raises ModelError: see :func:`weight_tensors`.
    """
    return itemsize * sum(math.prod(tensor.shape) for tensor in weight_tensors(directory).values())


def read_config(directory: Path) -> dict[str, object]:
    """``config.json`` without any conversion.

    :raises ModelError: it is not a JSON object.
    """
    return read_object(directory / "config.json", ModelError)


def model_digest(directory: Path) -> str:
    """sha256 over the ``name:sha256(file)`` lines of ``config.json`` and the weights, as the emitter computes it."""
    return digest_files([directory / "config.json", *given_files(directory)])


def local_path(text: str, fault: type[ParityError]) -> Path:
    """A path from a user or a data file, with ``~`` expanded.

    :param fault: the exception for a ``~user`` that does not exist.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise fault(f"{one_line(text)}: {error}") from error
