"""Generated models: a fixture's config, and random weights seeded by the name of each tensor.

The weights are the same bits on every machine and are written in chunks.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.versions import version
from candle_mi_parity.models.quiet import transformers_runs
from candle_mi_parity.models.transformers_config import as_meant, load_config
from candle_mi_parity.models.transformers_private import import_model
from candle_mi_parity.models.unusual import varied, write_unusual
from candle_mi_parity.spec.cases import Layout, Statistic, TinyModel
from candle_mi_parity.spec.families import family_of, transformers_type
from candle_mi_parity.spec.paths import FIXTURES

GENERATOR = 1
"""Raise it when the generated weights change: it is part of every cache key."""


_MIXING = re.compile(r"\.(x_[rwkvag]|time_maa_[xwkvrg])$")


def tiny_config(model: TinyModel) -> dict[str, object]:
    """``config.json`` of a generated model in the hub's dialect: the fixture's config with the changes of the case.

    :raises ModelError: the case removes a key that the fixture does not have.
    """
    config: dict[str, object] = json.loads((FIXTURES / model.config).read_text(encoding="utf-8"))
    config |= model.change
    config |= dict.fromkeys(model.null)
    if idle := [key for key in model.absent if key not in config]:
        raise ModelError(f"{model.config} has no {', '.join(idle)} to leave out")
    return {key: value for key, value in config.items() if key not in model.absent}


def generated_model(
    config: dict[str, object],
    dialect: str,
    cache: Path,
    shards: int = 1,
    seed: int = 0,
    statistics: Sequence[Statistic] = (),
    layout: Sequence[Layout] = (),
) -> Path:
    """The directory of a generated model, which is made on first use.

    :param config: in the hub's dialect; with dialect ``v5`` it is written as the installed transformers saves it.
    :raises ModelError: a statistic or a layout concerns no tensor of the model.
    """
    path = cache / "models" / model_key(config, dialect, shards, seed, statistics, layout)
    return publish(path, lambda out: _generate(config, dialect, shards, seed, statistics, layout, out))


def model_key(
    config: dict[str, object],
    dialect: str,
    shards: int = 1,
    seed: int = 0,
    statistics: Sequence[Statistic] = (),
    layout: Sequence[Layout] = (),
) -> str:
    """The name of a generated model's directory in the cache."""
    unusual = [[*statistics], [*layout]] if statistics or layout else []
    plain = ("tiny", GENERATOR, config, dialect, shards, dialect_key(dialect))
    return content_key(*plain, *([seed] if seed or unusual else []), *unusual)


def dialect_key(dialect: str) -> str:
    """Part of a cache key: the v5 dialect depends on the installed transformers."""
    return "" if dialect == "hub" else f"saved by {version('transformers')} as meant, which is not in the file"


def _generate(
    hub: dict[str, object],
    dialect: str,
    shards: int,
    seed: int,
    statistics: Sequence[Statistic],
    layout: Sequence[Layout],
    out: Path,
) -> None:
    """The tensors that transformers expects for the config, filled by :func:`tensor_chunks`."""
    import torch
    import transformers

    offset = family_of(str(hub["model_type"])).norm_offset
    write_config(hub, dialect, out)
    with transformers_runs(out):
        config = load_config(out)
        config._attn_implementation = "eager"  # whatever the config says
        import_model(config)
    with transformers_runs(out), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("head.weight" if "head.weight" in shapes else "lm_head.weight")
    if statistics or layout:
        arrays = {name: tensor_values(name, shape, offset, seed) for name, shape in shapes.items()}
        write_unusual(varied(arrays, offset, statistics), layout, shards, out)
        return
    chunks = partial(tensor_chunks, norm_offset=offset, seed=seed)
    if shards == 1:
        write_safetensors(out / "model.safetensors", shapes, chunks)
        return
    names = sorted(shapes)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    sizes = [
        write_safetensors(out / file, {name: shapes[name] for name in held}, chunks) for file, held in files.items()
    ]
    index = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {name: file for file, held in files.items() for name in held},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(hub: dict[str, object], dialect: str, out: Path) -> None:
    """Write ``config.json`` in the hub's dialect, or as the installed transformers saves the same configuration.

    ``transformers_version`` is left out: no model reads it, and the digests of cases would change with each version.
    """
    if dialect == "hub":
        (out / "config.json").write_text(json.dumps(hub, indent=2) + "\n", encoding="utf-8")
        return
    import transformers

    settings, model_type = dict(hub), str(hub["model_type"])
    del settings["model_type"]
    with transformers_runs(out):
        as_meant(transformers.AutoConfig.for_model(transformers_type(model_type), **settings)).save_pretrained(out)
    saved = json.loads((out / "config.json").read_text(encoding="utf-8")) | {"model_type": model_type}
    del saved["transformers_version"]
    (out / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensor_chunks(name: str, shape: tuple[int, ...], norm_offset: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Chunks of a generated tensor, float32 in row-major order.

    With N ~ N(0, 1), norm weights are 1 + 0.2·N (0.2·N where the norm adds the 1 itself), biases 0.1·N, matrices
    N/sqrt(fan_in). RWKV's mixing weights are 0.5 + 0.2·N, its rates of decay N - 1. No weight is zero or at a
    default, so that a dropped bias or weight changes the results.
    """
    for normal in normal_numbers(f"{GENERATOR}:{name}" + f":{seed}" * bool(seed), math.prod(shape)):
        if name.endswith(".bias"):
            values = 0.1 * normal
        elif _MIXING.search(name):
            values = 0.5 + 0.2 * normal
        elif name.endswith(".time_decay"):
            values = normal - 1
        elif len(shape) == 1:
            values = (1 - norm_offset) + 0.2 * normal
        else:
            values = normal / math.sqrt(shape[-1])
        yield values.astype(np.float32)


def tensor_values(name: str, shape: tuple[int, ...], norm_offset: int, seed: int = 0) -> np.ndarray:
    """As :func:`tensor_chunks`, in one array."""
    return np.concatenate([*tensor_chunks(name, shape, norm_offset, seed)]).reshape(shape)


def seeded_words(name: str, count: int) -> np.ndarray:
    """``count`` uniform 64-bit words, little-endian, from the PCG64 stream seeded by ``name``."""
    return np.asarray(bit_stream(name).random_raw(count), dtype="<u8")


CHUNK = 1 << 16
"""Numbers per chunk."""

Chunks = Callable[[str, tuple[int, ...]], Iterator[np.ndarray]]
"""Maps a tensor's name and shape to chunks of its float32 values in row-major order."""


def bit_stream(name: str) -> np.random.PCG64:
    """The PCG64 stream seeded by a name; numpy guarantees its raw output."""
    return np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def normal_numbers(name: str, count: int) -> Iterator[np.ndarray]:
    """Chunks of ``count`` numbers N(0, 1), float64.

    Each is a sum of twelve uniform 16-bit integers minus its mean (Irwin-Hall distribution), exact in float32.
    """
    stream, lanes, low = bit_stream(name), np.uint64(0x0000FFFF0000FFFF), np.uint64(0xFFFFFFFF)
    for start in range(0, count, CHUNK):
        words = stream.random_raw(3 * min(CHUNK, count - start))
        # Four integers a word: two lanes of 32 bits take the sums of the twelve, which stay below 2²⁰.
        pairs = (words & lanes) + ((words >> np.uint64(16)) & lanes)
        sums = pairs[0::3] + pairs[1::3] + pairs[2::3]
        yield (((sums & low) + (sums >> np.uint64(32))).astype(np.float64) - 12 * 65535 // 2) / 65536.0


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], values: Chunks) -> int:
    """Write float32 tensors in the same bytes as safetensors' ``save_file(..., metadata={"format": "pt"})``.

    :returns: the size of the tensors in bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in sorted(shapes.items()):
            for chunk in values(name, shape):
                file.write(np.ascontiguousarray(chunk, "<f4").data)
        if file.tell() != 8 + len(text) + end:
            raise OSError(f"{path}: {file.tell() - 8 - len(text)} bytes of tensors, {end} announced")
    return end
