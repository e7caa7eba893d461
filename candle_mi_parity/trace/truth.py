"""Truths: named float64 tensors, each with the noise that float32 rounding alone causes.

This module uses numpy only, so that the comparison needs neither torch nor a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from candle_mi_parity.errors import OracleError
from candle_mi_parity.files.tensor_file import TensorFile


class Expected(Protocol):
    """A tensor of the truth, in memory or on disk; see :class:`TruthTensor`."""

    @property
    def value(self) -> np.ndarray: ...

    @property
    def noise(self) -> np.ndarray: ...

    @property
    def allowed(self) -> np.ndarray | None: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, rows: slice) -> Expected:
        """Positions (axis −2) of the tensor."""
        ...


@dataclass(frozen=True)
class TruthTensor:
    """One tensor of the truth.

    :ivar value: float64, in the candidate's shape.
    :ivar noise: s_i, root mean square over the samples of (sample − value), same shape, absolute units.
    :ivar allowed: the attention mask, boolean [T, T], for ``attn.hook_scores`` and ``attn.hook_pattern``, else None.
    """

    value: np.ndarray
    noise: np.ndarray
    allowed: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def rows(self, rows: slice) -> TruthTensor:
        allowed = None if self.allowed is None else self.allowed[..., rows, :]
        return TruthTensor(self.value[..., rows, :], self.noise[..., rows, :], allowed)


@dataclass(frozen=True)
class FiledTensor:
    """A :class:`TruthTensor` of a cache file, read at first use and kept as long as this object."""

    file: TensorFile
    name: str
    shape: tuple[int, ...]
    masked: bool

    @property
    def value(self) -> np.ndarray:
        return self._whole.value

    @property
    def noise(self) -> np.ndarray:
        return self._whole.noise

    @property
    def allowed(self) -> np.ndarray | None:
        return self._whole.allowed

    @cached_property
    def _whole(self) -> TruthTensor:
        return self._read(self.file.tensor)

    def rows(self, rows: slice) -> TruthTensor:
        """Read from the file, without caching."""

        def read(key: str) -> np.ndarray:
            _, shape = self.file.kind(key)
            return self.file.box(key, (*[slice(None)] * (len(shape) - 2), rows, slice(None)))

        return self._read(read)

    def _read(self, read: Callable[[str], np.ndarray]) -> TruthTensor:
        """:raises OracleError: the file was removed or changed."""
        try:
            value, noise = read(f"{self.name}|value"), read(f"{self.name}|noise")
            return TruthTensor(value, noise, read(f"{self.name}|allowed").astype(bool) if self.masked else None)
        except (SafetensorError, OSError) as error:
            raise OracleError(f"cached truth: cannot read {self.name}: {error}") from error


class FiledTensors(Mapping[str, Expected]):
    """The tensors of a cache file in execution order, without caching."""

    def __init__(self, tensors: Mapping[str, FiledTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> FiledTensor:
        return replace(self._tensors[name])  # a copy, whose arrays are freed with it

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class SaeTruth:
    """The data with which features that flipped are judged.

    :ivar pre: pre-activations with their noise, [B, T, d_sae].
    :ivar threshold: θ, [d_sae]; zeros for ReLU and TopK.
    :ivar residual: the encoded residual stream, float64 [B, T, d_in].
    :ivar k: number of features that TopK keeps; 0 for other architectures.
    :ivar scale: the factor on each position's decoded features, [B, T, 1]; 1 without normalisation.
    :ivar relu: whether only positive ones of the k largest fire; False in a counterfactual.
    """

    pre: TruthTensor
    threshold: np.ndarray
    residual: np.ndarray
    k: int
    scale: np.ndarray
    relu: bool = True


@dataclass(frozen=True)
class Truth:
    """The oracle's answer to one case.

    :ivar tensors: in execution order.
    :ivar sae: keyed ``sae`` (the whole chain) and ``sae_on_truth`` (the SAE alone, fed the truth's residual).
    :ivar meta: digests and library versions.
    :ivar ignored: tensors of the model's files that transformers does not use.
    :ivar constant: tensors whose entries are all equal, and their value; a fault in what leads to them may not show.
    :ivar beyond: tensors with values outside the range of the model's dtype, and the largest of them.
    """

    tokens: list[list[int]]
    tensors: Mapping[str, Expected]
    sae: dict[str, SaeTruth] = field(default_factory=dict)
    scalars: dict[str, tuple[float, float]] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    constant: dict[str, float] = field(default_factory=dict)
    beyond: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors); values float64, noise float32, masks uint8."""
        arrays: dict[str, np.ndarray] = {}
        for name, tensor in self.tensors.items():
            _flatten(arrays, name, tensor)
        for name, sae in self.sae.items():
            _flatten(arrays, f"{name}.pre", sae.pre)
            arrays[f"{name}.pre|threshold"] = sae.threshold
            arrays[f"{name}.pre|residual"] = sae.residual
            arrays[f"{name}.pre|k"] = np.array([sae.k, int(sae.relu)])
            arrays[f"{name}.pre|scale"] = sae.scale
        header = {
            "tokens": self.tokens,
            "order": list(self.tensors),
            "sae": list(self.sae),
            "scalars": self.scalars,
            "meta": self.meta,
            "ignored": self.ignored,
            "constant": self.constant,
            "beyond": self.beyond,
        }
        save_file(
            {key: np.ascontiguousarray(array) for key, array in arrays.items()},
            path,
            metadata={"truth": json.dumps(header)},
        )

    @staticmethod
    def load(path: Path) -> Truth:
        """Read a file of :meth:`save`.

        :raises OracleError: the file is damaged; if it is deleted, it is computed again.
        """
        try:
            file = TensorFile(path)
            header, keys = json.loads(file.metadata()["truth"]), file.keys()
            if missing := {f"{name}|{kind}" for name in header["order"] for kind in ("value", "noise")} - keys:
                raise OracleError(f"no {min(missing)}")
            shapes = {name: tuple(file.kind(f"{name}|value")[1]) for name in header["order"]}
            tensors = {name: FiledTensor(file, name, shapes[name], f"{name}|allowed" in keys) for name in shapes}
            sae = {name: _sae(file, f"{name}.pre") for name in header["sae"]}
            scalars = {name: (float(value), float(noise)) for name, (value, noise) in header["scalars"].items()}
            remarks = [header[key] for key in ("meta", "ignored", "constant", "beyond")]
            return Truth(header["tokens"], FiledTensors(tensors), sae, scalars, *remarks)
        except Exception as error:  # a damaged file raises many kinds
            raise OracleError(f"cached truth {path} is unreadable ({error}); delete it") from error


def _sae(file: TensorFile, pre: str) -> SaeTruth:
    return SaeTruth(
        TruthTensor(file.tensor(f"{pre}|value"), file.tensor(f"{pre}|noise")),
        file.tensor(f"{pre}|threshold"),
        file.tensor(f"{pre}|residual"),
        int(file.tensor(f"{pre}|k")[0]),
        file.tensor(f"{pre}|scale"),
        bool(file.tensor(f"{pre}|k")[1]),
    )


def _flatten(arrays: dict[str, np.ndarray], name: str, tensor: Expected) -> None:
    arrays[f"{name}|value"] = tensor.value
    arrays[f"{name}|noise"] = tensor.noise.astype(np.float32)
    if tensor.allowed is not None:
        arrays[f"{name}|allowed"] = tensor.allowed.astype(np.uint8)
