"""SAE directories in SAELens's format: ``cfg.json`` and ``sae_weights.safetensors``.

Fields are read as SAELens 6 reads them, with its rules for files from before version 6
(``sae_lens/loading/pretrained_sae_loaders.py``, ``sae_lens/saes/*.py``, version 6.54). Fields that do not change the
numbers are listed by name. Any other field is implemented here or refused.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from candle_mi_parity.errors import NoTruthError, SaeError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.files.untrusted import read_object, require_inside, require_memory
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual

CONFIG = "cfg.json"
WEIGHTS = ("sae_weights.safetensors", "model.safetensors")
"""In candle-mi's order of preference; SAELens itself reads only the first."""

_NOTES = {
    *("architecture_version", "b_dec_init_method", "context_size", "d_head", "dataset_path", "device"),
    *("dataset_trust_remote_code", "expansion_factor", "finetuning_scaling_factor", "hook_head_index", "hook_layer"),
    *("hook_name", "hook_point", "hook_point_head_index", "hook_point_layer", "lora_scale", "metadata", "model_name"),
    *("model_class_name", "model_from_pretrained_kwargs", "mse_loss_normalization", "neuronpedia_id", "prepend_bos"),
    *("normalize_sae_decoder", "sae_lens_training_version", "sae_lens_version", "seed", "seqpos_slice"),
    "tokens_per_buffer",
}

ARCHITECTURES = ("standard", "jumprelu", "topk")
"""The architectures that are implemented here."""

Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]


class SaelensConfig(BaseModel):
    """The fields of ``cfg.json`` that change the numbers, by their names in version 6.

    :ivar normalize_activations: how the input is normalised; the reconstruction is scaled back.
    :ivar rescale_acts_by_decoder_norm: TopK selects by ``pre·‖W_dec row‖``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=1)
    architecture: Literal["standard", "jumprelu", "topk"]
    dtype: Literal["float32", "float64", "bfloat16", "float16"]
    apply_b_dec_to_input: bool = True
    normalize_activations: Normalization = "none"
    reshape_activations: Literal["none"] = "none"
    k: int | None = Field(default=None, ge=1)
    rescale_acts_by_decoder_norm: bool = False


def read_directory(path: Path, change: Counterfactual = PLAIN) -> tuple[SaelensConfig, dict[str, np.ndarray]]:
    """The config, and the arrays as float64 after rounding to the config's ``dtype``.

    :param change: a counterfactual, which may change ``cfg.json``.
    :raises SaeError: a file, field or tensor is missing, malformed or unknown.
    :raises NoTruthError: an architecture or field is not implemented here.
    """
    require_inside(path, SaeError)
    config = _config(path / CONFIG, change)
    tensors = _tensors(path, config)
    scale = tensors.pop("scaling_factor", None)
    if scale is not None and not np.allclose(scale, 1.0):
        raise SaeError(f"{path}: scaling_factor is not all ones, and SAELens 6 refuses such a file")
    return config, tensors


def own_hook(directory: Path) -> str | None:
    """The hook point that an SAE's own config names, or None.

    :raises SaeError: two of its fields disagree.
    """
    raw = read_object(directory / CONFIG, SaeError)
    metadata = raw.get("metadata")
    fields = {key: raw.get(key) for key in ("hook_name", "hook_point")}
    fields["metadata.hook_name"] = metadata.get("hook_name") if isinstance(metadata, dict) else None
    named = {key: value for key, value in fields.items() if isinstance(value, str) and value}
    hook = next(iter(named.values()), None)
    if len(set(named.values())) > 1:
        said = ", ".join(f"{key} is {one_line(repr(value))}" for key, value in named.items())
        raise SaeError(f"{directory / CONFIG}: {said}: an SAE is at one place")
    layer = re.match(r"blocks\.([0-9]{1,9})\.", hook or "")
    for key in ("hook_layer", "hook_point_layer"):
        if layer and type(raw.get(key)) is int and raw[key] != int(layer[1]):
            raise SaeError(f"{directory / CONFIG}: {key} is {raw[key]}, and the hook is {one_line(repr(hook))}")
    return hook


def saelens_files(path: Path) -> list[Path]:
    """The paths of ``cfg.json`` and of the weights.

    :raises SaeError: either is missing.
    """
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if weights is None or not (path / CONFIG).is_file():
        raise SaeError(f"{path}: expected {CONFIG} and {' or '.join(WEIGHTS)}")
    return [path / CONFIG, weights]


def _no_truth(path: Path, what: str, known: str) -> NoTruthError:
    return NoTruthError(f"{path}: there is no truth for {one_line(what)}: candle-mi-parity computes {known}")


def _config(path: Path, change: Counterfactual) -> SaelensConfig:
    raw = change.changed_sae_config(read_object(path, SaeError))
    metadata = raw["metadata"] if isinstance(raw.get("metadata"), dict) else {}
    version = raw.get("sae_lens_version") or metadata.get("sae_lens_version")
    fields = {key: value for key, value in raw.items() if key not in _NOTES}
    major = re.match(r"[0-9]{1,4}(?=\.|$)", version) if isinstance(version, str) else None
    if major is None or int(major[0]) < 6:
        fields = _before_version_6(path, fields)
    if isinstance(fields.get("dtype"), str):
        fields["dtype"] = fields["dtype"].removeprefix("torch.")
    if fields.get("normalize_activations") == "expected_average_only_in":
        raise SaeError(
            f"{path}: normalize_activations expected_average_only_in needs a scale that the file does not hold"
        )
    if isinstance(named := fields.get("architecture"), str) and named not in ARCHITECTURES:
        raise _no_truth(path, f"architecture {named!r}", ", ".join(ARCHITECTURES))
    try:
        config = SaelensConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            raise _no_truth(path, f"an SAE with {first['loc'][0]!r}", "no SAE that depends on this field") from error
        if first["type"] == "literal_error":
            what, known = f"{first['loc'][0]} {first['input']!r}", first.get("ctx", {}).get("expected", "others")
            raise _no_truth(path, what, known) from error
        key, said = one_line(".".join(map(str, first["loc"]))), one_line(first["msg"])
        raise SaeError(
            f"{path}: {f'{key} is missing' if first['type'] == 'missing' else f'{key}: {said}'}"
        ) from error
    if (config.architecture == "topk") != (config.k is not None):
        raise SaeError(
            f"{path}: the architecture is {config.architecture} with k = {config.k}; expected a k with topk alone"
        )
    if config.rescale_acts_by_decoder_norm and config.architecture != "topk":
        raise SaeError(
            f"{path}: rescale_acts_by_decoder_norm belongs to topk, the architecture is {config.architecture}"
        )
    return config


def _before_version_6(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Old names and defaults, as SAELens 6 reads them."""
    fields = dict(raw)
    activation = fields.pop("activation_fn_str", fields.pop("activation_fn", "relu"))
    arguments = fields.pop("activation_fn_kwargs", None) or {}
    if activation not in ("relu", "topk", "jumprelu"):
        raise _no_truth(path, f"activation function {activation!r}", "relu, topk and jumprelu")
    if not isinstance(arguments, dict):
        raise SaeError(f"{path}: activation_fn_kwargs is {one_line(repr(arguments))}, expected an object")
    fields.setdefault("architecture", "standard")
    if "k" in arguments and (activation == "topk" or fields["architecture"] == "topk"):
        fields |= {"architecture": "topk", "k": arguments["k"]}
    elif activation != "relu" and fields["architecture"] == "standard":
        raise SaeError(f"{path}: activation function {activation} with architecture standard, and no k")
    normalize = fields.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        fields["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    return fields


def _tensors(path: Path, config: SaelensConfig) -> dict[str, np.ndarray]:
    """Every tensor as float64 after rounding to the config's format; without torch, which takes seconds to import."""
    weights = saelens_files(path)[1]
    try:
        _check_sizes(weights, config)
        file = TensorFile(weights)
        return {
            name: rounded(stored_values(file, name), config.dtype).astype(np.float64) for name in sorted(file.keys())
        }
    except (OSError, SafetensorError) as error:
        raise SaeError(f"{weights}: not readable safetensors: {one_line(str(error))}") from error


def stored_values(file: TensorFile, name: str) -> np.ndarray:
    """A tensor of a file of weights; bfloat16, which numpy does not have, as float32."""
    kind, shape = file.kind(name)
    if kind != "BF16":
        return file.tensor(name)
    upper = np.frombuffer(file.raw(name), "<u2").astype(np.uint32) << 16
    return upper.view(np.float32).reshape(shape)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values rounded to a format as ``torch.Tensor.to`` rounds them: to nearest even, by way of float32 to a half."""
    if dtype in ("float32", "float64"):
        return values.astype(dtype)
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        if dtype == "float16":
            return single.astype(np.float16)
    bits = single.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(single), single, nearest)


def _check_sizes(weights: Path, config: SaelensConfig) -> None:
    """Check the header: every tensor is of a float format and no larger than the config's widths allow."""
    file, whole = TensorFile(weights), config.d_in * config.d_sae
    require_memory(3 * 8 * whole, str(weights), SaeError)  # as stored, in float64, in float32
    for name in sorted(file.keys()):
        dtype, shape = file.kind(name)
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise SaeError(f"{weights}: {one_line(name)} is {dtype}, expected a float format")
        if math.prod(shape) > whole:
            raise SaeError(
                f"{weights}: {one_line(name)} has shape {shape}, {CONFIG} says {(config.d_in, config.d_sae)}"
            )
