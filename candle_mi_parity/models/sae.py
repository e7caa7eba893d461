"""The weights of an SAE: an NPZ in Gemma Scope's layout or a SAELens directory, from disk, the hub or generated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from candle_mi_parity.errors import SaeError
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.npz import read_npz
from candle_mi_parity.models.checkpoint import local_path
from candle_mi_parity.models.generate import tensor_values
from candle_mi_parity.models.saelens import CONFIG, WEIGHTS, Normalization, read_directory, saelens_files
from candle_mi_parity.spec.cases import SaeFile, SaelensDirectory, SaeStatistic, ScopeSae
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual, Variant
from candle_mi_parity.spec.paths import FIXTURES

_REQUIRED = ("W_enc", "W_dec", "b_enc", "b_dec")


@dataclass(frozen=True)
class Sae:
    """An SAE, float32: ``W_enc`` [d_in, d_sae], ``W_dec`` [d_sae, d_in], biases, θ or None.

    :ivar k: number of features that TopK keeps; None for JumpReLU and ReLU.
    :ivar relu: whether only positive ones of the k largest fire; False in a counterfactual, in which all of the k
        fire but the k-th where it is negative and not the last of all.
    :ivar centred: whether ``b_dec`` is subtracted from the input.
    :ivar normalize: how the input is normalised; the reconstruction is scaled back.
    :ivar by_decoder_norm: whether pre-activations are multiplied by ‖W_dec row‖ before TopK selects, and features
        divided by it again before decoding.
    """

    W_enc: np.ndarray
    W_dec: np.ndarray
    b_enc: np.ndarray
    b_dec: np.ndarray
    threshold: np.ndarray | None
    k: int | None = None
    relu: bool = True
    centred: bool = False
    normalize: Normalization = "none"
    by_decoder_norm: bool = False

    @property
    def d_in(self) -> int:
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        return int(self.W_enc.shape[1])

    @property
    def architecture(self) -> str:
        if self.k is not None:
            return "TopK"
        return "ReLU" if self.threshold is None else "JumpReLU"

    @property
    def decoder(self) -> np.ndarray:
        """What one unit of each feature adds to the reconstruction, before normalisation is undone: [d_sae, d_in]."""
        rows: np.ndarray = self.W_dec.astype(np.float64)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True) if self.by_decoder_norm else rows


def sae_path(sae: SaeFile | SaelensDirectory | ScopeSae, width: int, cache: Path) -> Path:
    """The file or directory of an SAE, which is generated or downloaded on first use.

    :param width: the model's hidden size, which is the ``d_in`` of a generated SAE.
    :raises SaeError: a local file does not exist.
    :raises HubError: the download fails.
    """
    if isinstance(sae, SaelensDirectory):
        key = content_key("saelens", sae.model_dump(), width)
        return publish(cache / "saes" / key, lambda out: _generate(sae, width, out))
    if isinstance(sae, ScopeSae):
        key = content_key("scope", sae.d_sae, sae.threshold, width)
        return publish(cache / "saes" / key, lambda out: _generate_scope(sae, width, out)) / "params.npz"
    if sae.repo is None:
        path = local_path(sae.path, SaeError)
        path = path if path.is_absolute() else FIXTURES / path
        if not path.exists():
            raise SaeError(f"SAE file {path} does not exist")
        return path
    from candle_mi_parity.models.hub import fetch_sae

    return fetch_sae(sae)[0]


def sae_files(path: Path) -> list[Path]:
    """The files of an SAE."""
    return saelens_files(path) if path.is_dir() else [path]


def _generate(sae: SaelensDirectory, width: int, out: Path) -> None:
    """Weights that show a fault in any field: decoder rows of different norms, no bias or threshold at zero."""
    encoder = tensor_values("sae.W_enc", (sae.d_sae, width), 0)
    decoder = 0.2 * encoder + 0.1 * tensor_values("sae.W_dec", (sae.d_sae, width), 0)
    arrays = {
        "W_enc": encoder.T,
        "W_dec": decoder * np.linspace(0.5, 2.0, sae.d_sae)[:, None],
        "b_enc": tensor_values("sae.b_enc.bias", (sae.d_sae,), 0),
        "b_dec": 3 * tensor_values("sae.b_dec.bias", (width,), 0),
    }
    for statistic in sae.statistics:
        _vary(arrays, statistic)
    if sae.cfg.get("architecture") == "gated":
        bias = arrays.pop("b_enc")
        arrays |= {"b_gate": bias, "b_mag": bias + 0.1, "r_mag": tensor_values("sae.r_mag.bias", (sae.d_sae,), 0)}
    if sae.cfg.get("architecture") == "batchtopk":
        arrays["topk_threshold"] = np.array(0.25)
    if sae.threshold is not None:
        arrays["threshold"] = np.abs(tensor_values("sae.threshold", (sae.d_sae,), 1)) + np.float32(sae.threshold)
    if sae.scaling_factor:
        arrays["scaling_factor"] = np.ones(sae.d_sae)
    import torch
    from safetensors.torch import save_file  # numpy has no bfloat16

    dtype: torch.dtype = getattr(torch, sae.weights)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(dtype) for name, array in arrays.items()}
    save_file(tensors, out / WEIGHTS[0])
    (out / CONFIG).write_text(json.dumps({"d_in": width, "d_sae": sae.d_sae, **sae.cfg}, indent=2) + "\n")


def _vary(arrays: dict[str, np.ndarray], statistic: SaeStatistic) -> None:
    """Give the weights an unusual statistic, in place."""
    if statistic is SaeStatistic.DEAD:
        arrays["W_enc"] = np.where(np.arange(arrays["W_enc"].shape[1]) % 2, 0, arrays["W_enc"])
        arrays["b_enc"] = np.where(np.arange(arrays["b_enc"].size) % 2, -1, arrays["b_enc"])
    elif statistic is SaeStatistic.TWINS:
        arrays["W_enc"] = np.repeat(arrays["W_enc"][:, ::2], 2, axis=1)[:, : arrays["W_enc"].shape[1]]
        arrays["b_enc"] = np.repeat(arrays["b_enc"][::2], 2)[: arrays["b_enc"].size]
    elif statistic is SaeStatistic.DECODER_LARGE:
        arrays["W_dec"] = 32 * arrays["W_dec"]
    else:
        arrays |= {"b_enc": 32 * arrays["b_enc"], "b_dec": 32 * arrays["b_dec"]}


def _generate_scope(sae: ScopeSae, width: int, out: Path) -> None:
    """``params.npz``: decoder rows close to the encoder's columns, as in a trained SAE, and distinct thresholds."""
    encoder = tensor_values("sae.W_enc", (sae.d_sae, width), 0)
    np.savez(
        out / "params.npz",
        W_enc=np.ascontiguousarray(encoder.T),
        W_dec=np.float32(0.2) * encoder + np.float32(0.1) * tensor_values("sae.W_dec", (sae.d_sae, width), 0),
        b_enc=tensor_values("sae.b_enc.bias", (sae.d_sae,), 0),
        b_dec=tensor_values("sae.b_dec.bias", (width,), 0),
        threshold=np.abs(tensor_values("sae.threshold", (sae.d_sae,), 1)) + np.float32(sae.threshold),
    )


def load_sae(path: Path, change: Counterfactual = PLAIN) -> Sae:
    """Read and check an NPZ or a SAELens directory.

    :param change: a counterfactual, which may change ``cfg.json`` or the arithmetic.
    :raises SaeError: one line on what is wrong.
    """
    if not path.is_dir():
        return load_npz(path)
    config, arrays = read_directory(path, change)
    jump = config.architecture == "jumprelu"
    _check_arrays(path, arrays, {*_REQUIRED, "threshold"} if jump else {*_REQUIRED})
    if jump != ("threshold" in arrays):
        raise SaeError(
            f"{path}: the architecture is {config.architecture}, and the threshold {'missing' if jump else 'given'}; "
            "expected a threshold with jumprelu alone"
        )
    weights = _as_float32(path, arrays)
    if weights["W_enc"].shape != (config.d_in, config.d_sae):
        shape = weights["W_enc"].shape
        raise SaeError(f"{path}: W_enc has shape {shape}, cfg.json says {(config.d_in, config.d_sae)}")
    # SAELens fires where pre > θ and then takes ReLU, so a negative θ is one at zero.
    floored = jump and not change.has(Variant.NEGATIVE_THRESHOLD_KEPT)
    threshold = np.maximum(weights["threshold"], 0) if floored else weights.get("threshold")
    return Sae(
        weights["W_enc"],
        weights["W_dec"],
        weights["b_enc"],
        weights["b_dec"],
        threshold=threshold,
        k=None if config.k is None else min(config.k, config.d_sae),
        relu=not change.has(Variant.TOPK_WITHOUT_RELU),
        centred=config.apply_b_dec_to_input,
        normalize=config.normalize_activations,
        by_decoder_norm=config.rescale_acts_by_decoder_norm,
    )


def load_npz(path: Path) -> Sae:
    """Read and check an NPZ.

    :raises SaeError: it is not an NPZ, holds pickles, or an array is missing, unknown, of a wrong shape or dtype, or
        not finite.
    """
    arrays = read_npz(path, SaeError)
    _check_arrays(path, arrays, {*_REQUIRED, "threshold"})
    weights = _as_float32(path, arrays)
    return Sae(
        weights["W_enc"], weights["W_dec"], weights["b_enc"], weights["b_dec"], threshold=weights.get("threshold")
    )


def _check_arrays(path: Path, arrays: dict[str, np.ndarray], known: set[str]) -> None:
    if missing := [name for name in _REQUIRED if name not in arrays]:
        raise SaeError(f"{path}: lacks {', '.join(missing)}; it holds {one_line(', '.join(arrays)) or 'nothing'}")
    if unknown := sorted(set(arrays) - known):
        said = one_line(", ".join(unknown))
        raise SaeError(f"{path}: unknown arrays {said}; expected {', '.join(_REQUIRED)}, threshold")
    for name, array in arrays.items():
        if array.dtype not in (np.float32, np.float64):
            raise SaeError(f"{path}: {name} is {array.dtype}, expected float32 or float64")
    if arrays["W_enc"].ndim != 2:
        raise SaeError(f"{path}: W_enc has shape {arrays['W_enc'].shape}, expected [d_in, d_sae]")
    d_in, d_sae = arrays["W_enc"].shape
    shapes = {"W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,)}
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise SaeError(f"{path}: {name} has shape {arrays[name].shape}, expected {shape}")


def _as_float32(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # candle-mi computes its SAE in float32 whatever the file holds.
    with np.errstate(over="ignore"):
        weights = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise SaeError(f"{path}: {name} holds NaN or Inf, or a value too large for float32")
    return weights
