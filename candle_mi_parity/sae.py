"""Sparse autoencoders: weights in Gemma Scope's NPZ layout, and their maths in torch.

``pre = x·W_enc + b_enc``; JumpReLU ``f = pre·(pre > θ)`` where the file has a ``threshold``, ReLU where it has
none; ``recon = f·W_dec + b_dec`` (Rajamanoharan et al. 2024, arXiv 2407.14435).
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from candle_mi_parity.cases import FIXTURES, SaeFile
from candle_mi_parity.errors import SaeError

_REQUIRED = ("W_enc", "W_dec", "b_enc", "b_dec")


@dataclass(frozen=True)
class Sae:
    """SAE weights as stored, float32: ``W_enc`` [d_in, d_sae], ``W_dec`` [d_sae, d_in], biases, θ or None."""

    W_enc: np.ndarray
    W_dec: np.ndarray
    b_enc: np.ndarray
    b_dec: np.ndarray
    threshold: np.ndarray | None

    @property
    def d_in(self) -> int:
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        return int(self.W_enc.shape[1])

    @property
    def architecture(self) -> str:
        return "ReLU" if self.threshold is None else "JumpReLU"


def sae_path(file: SaeFile) -> Path:
    """Where the NPZ is on this machine, downloading it when it lives on the hub.

    :raises SaeError: when it is not there or cannot be fetched.
    """
    if file.repo is None:
        path = Path(file.path).expanduser()
        path = path if path.is_absolute() else FIXTURES / path
        if not path.is_file():
            raise SaeError(f"SAE file {path} does not exist")
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(file.repo, file.path, revision=file.revision))
    except Exception as error:  # the hub client's own errors, one line of which says it all
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SaeError(f"cannot get {file.repo}:{file.path} from the hub: {reason}") from error


def load_npz(path: Path) -> Sae:
    """Read and check an NPZ.

    :raises SaeError: not an NPZ, pickled content, an array missing, unknown, of the wrong shape or dtype, or
        not finite.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise SaeError(f"{path}: not a readable NPZ: {error}") from error
    if missing := [name for name in _REQUIRED if name not in arrays]:
        raise SaeError(f"{path}: lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
    if unknown := sorted(set(arrays) - {*_REQUIRED, "threshold"}):
        raise SaeError(f"{path}: unknown arrays {', '.join(unknown)}; expected {', '.join(_REQUIRED)}, threshold")
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
    # candle-mi computes its SAE in float32 whatever the file holds.
    with np.errstate(over="ignore"):
        weights = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise SaeError(f"{path}: {name} holds NaN or Inf, or a value too large for float32")
    return Sae(
        W_enc=weights["W_enc"],
        W_dec=weights["W_dec"],
        b_enc=weights["b_enc"],
        b_dec=weights["b_dec"],
        threshold=weights.get("threshold"),
    )


class TorchSae:
    """The same weights as torch tensors on a device, in the dtype in which the maths is to run."""

    def __init__(self, sae: Sae, device: str = "cpu", dtype: torch.dtype = torch.float64) -> None:
        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device=device, dtype=dtype)

        self.W_enc, self.W_dec = tensor(sae.W_enc), tensor(sae.W_dec)
        self.b_enc, self.b_dec = tensor(sae.b_enc), tensor(sae.b_dec)
        self.threshold = None if sae.threshold is None else tensor(sae.threshold)

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., d_in] → [..., d_sae], before the activation."""
        return x @ self.W_enc + self.b_enc

    def active(self, pre: torch.Tensor) -> torch.Tensor:
        """Which features fire, boolean [..., d_sae]: strictly above θ, or above 0 for ReLU."""
        return pre > (0.0 if self.threshold is None else self.threshold)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., d_in] → features [..., d_sae]."""
        pre = self.pre_activations(x)
        return torch.where(self.active(pre), pre, 0.0)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Features [..., d_sae] → reconstruction [..., d_in]."""
        return features @ self.W_dec + self.b_dec
