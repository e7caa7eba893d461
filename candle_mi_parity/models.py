"""Where a model comes from: generated, out of a PyPI package, the hub, or a local directory.

Whatever the source, the result is a directory with ``config.json`` and ``model.safetensors`` that the oracle
and the candidate both read. Generated and unpacked directories live in the cache under a content key.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError

from candle_mi_parity import durable
from candle_mi_parity.cases import FIXTURES, HubModel, LocalModel, Model, PackageModel, TinyModel
from candle_mi_parity.errors import ModelError, ParityError
from candle_mi_parity.families import family_of
from candle_mi_parity.generated import bit_stream, normal_numbers, write_safetensors
from candle_mi_parity.printable import one_line
from candle_mi_parity.tensor_file import TensorFile
from candle_mi_parity.untrusted import read_json, require_inside, require_regular

GENERATOR = 1
"""Raise it when the generated weights change: it is part of every cache key."""


def model_directory(model: Model, cache: Path) -> Path:
    """The directory of a model, made or downloaded if it is not there yet.

    :raises ModelError: missing directory, package or weights; says what to do.
    :raises HubError: the hub does not give it.
    """
    if isinstance(model, TinyModel):
        directory = generated_model(tiny_config(model), model.dialect, cache, model.shards)
    elif isinstance(model, PackageModel):
        from candle_mi_parity import package_model

        source = Path(package_model.__file__).read_text(encoding="utf-8")
        key = content_key("package", model.package, source, model.dialect, _transformers(model.dialect))
        directory = publish(cache / "models" / key, lambda out: _unpack(model.dialect, out))
    elif isinstance(model, HubModel):
        from candle_mi_parity.hub import fetch_model

        directory, _ = fetch_model(model)
    else:
        directory = local_path(model.path, ModelError)
    return require_model(directory)


def tiny_config(model: TinyModel) -> dict[str, object]:
    """``config.json`` of a generated model as a hub file has it: the fixture's, with what the case changes.

    :raises ModelError: when the case leaves out a key that the fixture does not have; it would test nothing.
    """
    config: dict[str, object] = json.loads((FIXTURES / model.config).read_text(encoding="utf-8"))
    config |= model.change
    config |= dict.fromkeys(model.null)
    if idle := [key for key in model.absent if key not in config]:
        raise ModelError(f"{model.config} has no {', '.join(idle)} to leave out")
    return {key: value for key, value in config.items() if key not in model.absent}


def generated_model(config: dict[str, object], dialect: str, cache: Path, shards: int = 1) -> Path:
    """The directory of a generated model, made if it is not there yet.

    :param config: as a hub file has it; with dialect ``v5`` it is written as the installed transformers saves it.
    """
    key = content_key("tiny", GENERATOR, config, dialect, shards, _transformers(dialect))
    return publish(cache / "models" / key, lambda out: _generate(config, dialect, shards, out))


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


def weight_bytes(directory: Path, itemsize: int) -> int:
    """What the weights of a model directory take at so many bytes a number.

    :raises ModelError: they cannot be read.
    """
    try:
        files = [TensorFile(path) for path in weight_files(directory)]
        return itemsize * sum(math.prod(file.kind(key)[1]) for file in files for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: weights cannot be read: {one_line(str(error))}") from error


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


def digest_files(paths: list[Path]) -> str:
    """One digest for a set of files: sha256 of the lines ``name:sha256-of-bytes``, sorted by name.

    A file's own digest is remembered by path, size, mtime and inode while the process lives.
    """
    lines = [f"{path.name}:{file_digest(path)}\n" for path in sorted(paths, key=lambda path: path.name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


_digests: dict[tuple[str, int, int, int], str] = {}


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hex; remembered by path, size, mtime and inode while the process lives.

    :raises ModelError: when it cannot be read.
    """
    try:
        stat = require_regular(path)
        key = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if key not in _digests:
            with path.open("rb") as file:
                _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return _digests[key]


def publish(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a directory once: fill one beside it, then rename, so that nobody reads half of it.

    Of two processes that ask for the same one, the second waits for the first. An empty directory is not there:
    whoever follows "delete it" deletes the file.
    """
    if _is_made(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        lock.acquire()
    except OSError as error:
        raise ModelError(f"cannot write to the cache {target.parent}: {error.strerror}") from error
    making = target.parent / f".{target.name}.making"
    try:
        if not _is_made(target):
            shutil.rmtree(making, ignore_errors=True)  # of a process that was killed
            making.mkdir()
            make(making)
            durable.put(making, target)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise ModelError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
        lock.release()
    return target


def _is_made(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def content_key(*parts: object) -> str:
    """A directory name for content: a digest of JSON-ready parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _transformers(dialect: str) -> str:
    """The v5 dialect is whatever the installed transformers writes, so its version is part of the content."""
    if dialect == "hub":
        return ""
    import transformers

    return str(transformers.__version__)


def _generate(hub: dict[str, object], dialect: str, shards: int, out: Path) -> None:
    """The tensors that transformers expects for the config, filled by :func:`tensor_stretches`."""
    import torch
    import transformers

    offset = family_of(str(hub["model_type"])).norm_offset
    write_config(hub, dialect, out)
    config = transformers.AutoConfig.from_pretrained(out)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    stretches = partial(tensor_stretches, norm_offset=offset)
    if shards == 1:
        write_safetensors(out / "model.safetensors", shapes, stretches)
        return
    names = sorted(shapes)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    sizes = [
        write_safetensors(out / file, {name: shapes[name] for name in held}, stretches)
        for file, held in files.items()
    ]
    index = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {name: file for file, held in files.items() for name in held},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(hub: dict[str, object], dialect: str, out: Path) -> None:
    """``config.json`` as a hub file has it, or as the installed transformers saves the same configuration."""
    if dialect == "hub":
        (out / "config.json").write_text(json.dumps(hub, indent=2) + "\n", encoding="utf-8")
        return
    import transformers

    settings = {name: value for name, value in hub.items() if name != "model_type"}
    transformers.AutoConfig.for_model(str(hub["model_type"]), **settings).save_pretrained(out)


def tensor_stretches(name: str, shape: tuple[int, ...], norm_offset: int) -> Iterator[np.ndarray]:
    """Weights of a generated tensor, float32 in row-major order, a stretch at a time.

    Norm weights are 1 + 0.2·N (0.2·N where the norm adds the 1 itself), biases 0.1·N, matrices N/sqrt(fan_in):
    nothing is zero or at a default, so a dropped bias or an ignored weight shows.
    """
    for normal in normal_numbers(f"{GENERATOR}:{name}", math.prod(shape)):
        if name.endswith(".bias"):
            values = 0.1 * normal
        elif len(shape) == 1:
            values = (1 - norm_offset) + 0.2 * normal
        else:
            values = normal / math.sqrt(shape[-1])
        yield values.astype(np.float32)


def tensor_values(name: str, shape: tuple[int, ...], norm_offset: int) -> np.ndarray:
    """The same in one array."""
    return np.concatenate([*tensor_stretches(name, shape, norm_offset)]).reshape(shape)


def seeded_words(name: str, count: int) -> np.ndarray:
    """``count`` uniform 64-bit words, little-endian, from the raw PCG64 stream that ``name`` seeds."""
    return np.asarray(bit_stream(name).random_raw(count), dtype="<u8")


def _unpack(dialect: str, out: Path) -> None:
    from candle_mi_parity.package_model import materialise_smollm2

    materialise_smollm2(out)
    if dialect == "v5":
        hub = read_config(out)
        (out / "config.json").unlink()
        write_config(hub, dialect, out)


def local_path(text: str, fault: type[ParityError]) -> Path:
    """A path as a user or a data file spells it.

    :raises ParityError: of the given kind, for a home that nobody has.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise fault(f"{one_line(text)}: {error}") from error


def as_model(id_or_directory: str) -> Model:
    """A model named on the command line: an existing directory, or else a hub repository.

    :raises ModelError: a name that cannot be either.
    """
    try:
        local = Path(id_or_directory).expanduser().is_dir() or id_or_directory.startswith((".", "/", "~"))
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, the home of nobody
        raise ModelError(f"{one_line(id_or_directory)} is no model: {one_line(str(error))}") from error
    if local:
        return LocalModel(source="local", path=id_or_directory)
    repo, _, revision = id_or_directory.partition("@")
    return HubModel(source="hub", repo=repo, revision=revision or "main")
