"""Truth: named float64 tensors, each with the noise that float32 rounding alone would put on it.

Plain numpy, so that the comparison needs neither torch nor a model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from candle_mi_parity.errors import OracleError


@dataclass(frozen=True)
class TruthTensor:
    """One tensor of the truth.

    :ivar value: float64, in the candidate's shape.
    :ivar noise: s_i, root mean square over the samples of (sample − value), same shape, absolute units.
    :ivar allowed: for ``attn.hook_scores`` and ``attn.hook_pattern``, boolean [T, T]: what the mask lets
        through; None elsewhere.
    """

    value: np.ndarray
    noise: np.ndarray
    allowed: np.ndarray | None = None


@dataclass(frozen=True)
class SaeTruth:
    """What judging a feature that flipped needs beside the tensors.

    :ivar pre: pre-activations with their noise, [B, T, d_sae].
    :ivar threshold: θ, [d_sae]; zeros for ReLU and TopK.
    :ivar residual: the residual stream that was encoded, float64 [B, T, d_in].
    :ivar k: number of features that TopK keeps; 0 where a feature fires by its threshold alone.
    :ivar scale: by how much a position's decoded features are multiplied, [B, T, 1]; 1 without normalisation.
    """

    pre: TruthTensor
    threshold: np.ndarray
    residual: np.ndarray
    k: int
    scale: np.ndarray


@dataclass(frozen=True)
class Truth:
    """The oracle's answer to one case.

    :ivar tensors: in execution order.
    :ivar sae: keyed ``sae`` (the whole chain) and ``sae_on_truth`` (the SAE alone, fed the truth's residual).
    :ivar meta: digests and library versions it was made with.
    """

    tokens: list[list[int]]
    tensors: dict[str, TruthTensor]
    sae: dict[str, SaeTruth] = field(default_factory=dict)
    scalars: dict[str, tuple[float, float]] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors); values float64, noise float32, masks uint8."""
        arrays: dict[str, np.ndarray] = {}
        for name, tensor in self.tensors.items():
            _flatten(arrays, name, tensor)
        for name, sae in self.sae.items():
            _flatten(arrays, f"{name}.pre", sae.pre)
            arrays[f"{name}.pre|threshold"] = sae.threshold
            arrays[f"{name}.pre|residual"] = sae.residual
            arrays[f"{name}.pre|k"] = np.array([sae.k])
            arrays[f"{name}.pre|scale"] = sae.scale
        header = {
            "tokens": self.tokens,
            "order": list(self.tensors),
            "sae": list(self.sae),
            "scalars": self.scalars,
            "meta": self.meta,
        }
        save_file(
            {key: np.ascontiguousarray(array) for key, array in arrays.items()},
            path,
            metadata={"truth": json.dumps(header)},
        )

    @staticmethod
    def load(path: Path) -> Truth:
        """Read what :meth:`save` wrote.

        :raises OracleError: when the file is not a truth; delete it and it is computed again.
        """
        try:
            arrays = load_file(path)
            header = json.loads(_metadata(path)["truth"])
            tensors = {name: _unflatten(arrays, name) for name in header["order"]}
            sae = {
                name: SaeTruth(
                    _unflatten(arrays, f"{name}.pre"),
                    arrays[f"{name}.pre|threshold"],
                    arrays[f"{name}.pre|residual"],
                    int(arrays[f"{name}.pre|k"][0]),
                    arrays[f"{name}.pre|scale"],
                )
                for name in header["sae"]
            }
            scalars = {name: (float(value), float(noise)) for name, (value, noise) in header["scalars"].items()}
            return Truth(header["tokens"], tensors, sae, scalars, header["meta"])
        except Exception as error:  # a truncated cache file fails in as many ways as there are bytes
            raise OracleError(f"cached truth {path} is unreadable ({error}); delete it") from error


def _flatten(arrays: dict[str, np.ndarray], name: str, tensor: TruthTensor) -> None:
    arrays[f"{name}|value"] = tensor.value
    arrays[f"{name}|noise"] = tensor.noise.astype(np.float32)
    if tensor.allowed is not None:
        arrays[f"{name}|allowed"] = tensor.allowed.astype(np.uint8)


def _unflatten(arrays: dict[str, np.ndarray], name: str) -> TruthTensor:
    allowed = arrays.get(f"{name}|allowed")
    return TruthTensor(
        arrays[f"{name}|value"],
        arrays[f"{name}|noise"],
        None if allowed is None else allowed.astype(bool),
    )


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})
