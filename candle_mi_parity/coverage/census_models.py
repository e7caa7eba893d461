"""A tiny model of any text-only class that ``AutoModelForCausalLM`` maps, by ``fixtures/census.toml``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import Field
from torch import nn
from transformers import CONFIG_MAPPING

from candle_mi_parity.errors import CensusError, ModelError
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.models import generate
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.generate import tensor_values
from candle_mi_parity.models.transformers_private import config_fields, private
from candle_mi_parity.spec.cases import Scalar
from candle_mi_parity.spec.families import BIDIRECTIONAL, transformers_type
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.spec.table import TableRow, read_toml

Dialect = Literal["hub", "v5"]
Values = dict[str, Scalar | list[int] | list[str] | dict[str, Scalar]]

LARGEST = 4_000_000
"""Largest number of parameters of a tiny model."""

_OTHER_MODALITIES = frozenset({"vision_config", "audio_config", "vq_config", "audio_encoder", "audio_encoder_config"})


class Override(TableRow):
    """Values for one model type only; the keys in ``null`` are set to null."""

    set: Values = Field(default_factory=dict)
    null: list[str] = Field(default_factory=list)


class Table(TableRow):
    """``fixtures/census.toml``.

    :ivar shrink: key → value, for every class that has the key.
    :ivar shrink_given: the same, for classes whose own default is not null.
    :ivar rotary: keys of the class's rotary parameters.
    :ivar fallback: other values, tried in order if the class refuses the ones before.
    """

    shrink: Values
    shrink_given: Values
    rotary: dict[str, float]
    fallback: list[Values]
    override: dict[str, Override]


@remembered
def load_table(path: Path = FIXTURES / "census.toml") -> Table:
    """The table.

    :raises CensusError: unreadable, unknown or missing key, wrong type.
    """
    return read_toml(path, Table, CensusError)


def mapped_classes() -> dict[str, str]:
    """model_type → class of every causal language model that the installed transformers knows, and of each
    bidirectional decoder that has the layers of one."""
    listed = private("models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    known = {name: str(kind) for name, kind in listed.items()}
    return dict(sorted((known | {name: known[family] for name, family in BIDIRECTIONAL.items()}).items()))


@dataclass(frozen=True)
class Tiny:
    """A generated model directory.

    :ivar dialect: ``hub`` where ``config.json`` has the rotary base at its top level, as hub files do; ``v5`` as the
        installed transformers saves it, which is the same file for a class without a rotary base.
    """

    directory: Path
    dialect: Dialect


def tiny_model(model_type: str, cache: Path) -> Tiny:
    """The tiny model of a type, from the cache or generated.

    :raises ModelError: the class is not text-only, or has no tiny config.
    :raises Exception: whatever transformers raises for a config that it cannot instantiate.
    """
    kind = CONFIG_MAPPING[transformers_type(model_type)]
    if other := sorted(_OTHER_MODALITIES & set(getattr(kind, "sub_configs", None) or {})):
        raise ModelError(f"not text-only: its config has {', '.join(other)}")
    table = load_table()
    sources = digest_files([Path(__file__), Path(str(generate.__file__))])
    key = content_key("census", model_type, table.model_dump(), sources, transformers.__version__)
    directory = publish(cache / "models" / key, lambda out: _generate(model_type, table, out))
    return Tiny(directory, "hub" if "rope_theta" in read_config(directory) else "v5")


def settings(model_type: str, table: Table) -> dict[str, object]:
    """The keys of the table that a class has, with their values."""
    fields = config_fields(CONFIG_MAPPING[model_type])
    found: dict[str, object] = {key: value for key, value in table.shrink.items() if key in fields}
    found |= {
        key: value for key, value in table.shrink_given.items() if key in fields and fields[key].default is not None
    }
    override = table.override.get(model_type, Override())
    return found | override.set | dict.fromkeys(override.null)


def tiny_config(model_type: str, table: Table) -> Any:
    """A configuration object that transformers can instantiate.

    :raises Exception: what transformers raised at the first attempt, if it refuses every one.
    """
    kind: Any = CONFIG_MAPPING[model_type]
    first_error: Exception | None = None
    base = settings(model_type, table)
    for row in [{}, *table.fallback]:
        fallback = {key: value for key, value in row.items() if key in base}
        try:
            config = kind(**base | fallback)
            _set_rotary(config, table.rotary)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        except Exception as error:  # dataclasses and modules each raise errors of their own
            first_error = first_error or error
            continue
        if (count := sum(tensor.numel() for tensor in model.state_dict().values())) > LARGEST:
            name, largest = max(model.state_dict().items(), key=lambda item: item[1].numel())
            raise ModelError(f"does not get tiny: {count} parameters, {name} {list(largest.shape)}")
        return config
    assert first_error is not None
    raise first_error


def _set_rotary(config: Any, rotary: Mapping[str, float]) -> None:
    """Another rotary base, where the class has one; a rotary dictionary by layer type keeps its own."""
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config.rope_parameters = {**parameters, **rotary}


def _generate(model_type: str, table: Table, out: Path) -> None:
    config = tiny_config(transformers_type(model_type), table)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    fill(model.float())
    model.save_pretrained(out)  # not our own file: some classes have other names on disk than in memory
    _as_hub(out)
    if model_type in BIDIRECTIONAL:
        config = read_config(out) | {"model_type": model_type}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def fill(model: nn.Module) -> None:
    """Fill every parameter, and every buffer that is all 0 or all 1, with :func:`tensor_values`.

    Values are 0.2·N around an initial value of 0, and 1 + 0.2·N otherwise. Other buffers are tables that the class
    computed.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            zero, one = bool((tensor == 0).all()), bool((tensor == 1).all())
            if tensor.is_floating_point() and (name in parameters or zero or one):
                tensor.copy_(values(name, tensor, 1 if zero else 0))


def values(name: str, tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The generated values of a tensor, a scalar as a vector of one."""
    shape = tuple(tensor.shape) or (1,)
    return torch.from_numpy(tensor_values(name, shape, offset)).reshape(tensor.shape)


def check_filled(model: nn.Module) -> None:
    """Check that transformers loaded every generated parameter.

    :raises ModelError: a parameter has another value, because transformers did not find it in the file it wrote.
    """
    state = model.state_dict()
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        aliases = [other for other, tensor in state.items() if tensor.data_ptr() == parameter.data_ptr()]
        made = [values(alias, parameter, offset).to(parameter) for alias in aliases for offset in (0, 1)]
        if not any(torch.equal(parameter, tensor) for tensor in made):
            raise ModelError(f"transformers does not load {name} as it saved it")


def _as_hub(out: Path) -> None:
    """Rewrite ``config.json`` with its rotary parameters at the top level, if transformers reads the same from it."""
    path = out / "config.json"
    saved = read_config(out)
    rotary = hub_rotary(saved.get("rope_parameters"))
    if rotary is None:
        return
    before = transformers.AutoConfig.from_pretrained(out).to_dict()
    hub = {key: value for key, value in saved.items() if key != "rope_parameters"} | rotary
    path.write_text(json.dumps(hub, indent=2) + "\n", encoding="utf-8")
    after = transformers.AutoConfig.from_pretrained(out).to_dict()
    if after.get("rope_parameters") != before.get("rope_parameters"):
        path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def hub_rotary(parameters: Any) -> dict[str, object] | None:
    """Rotary parameters as hub files spell them at the top level; None if there is no such spelling.

    ``rope_local_base_freq`` is the base of windowed layers.
    """
    if not isinstance(parameters, dict) or not parameters:
        return None
    if set(parameters) == {"full_attention", "sliding_attention"}:
        whole, local = hub_rotary(parameters["full_attention"]), hub_rotary(parameters["sliding_attention"])
        if whole is None or local is None or set(local) != {"rope_theta"} or "rope_scaling" in whole:
            return None
        return whole | {"rope_local_base_freq": local["rope_theta"]}
    if "rope_theta" not in parameters:
        return None
    top = {key: value for key, value in parameters.items() if key in ("rope_theta", "partial_rotary_factor")}
    if parameters.get("rope_type", "default") == "default":
        return top
    return top | {"rope_scaling": {key: value for key, value in parameters.items() if key not in top}}
