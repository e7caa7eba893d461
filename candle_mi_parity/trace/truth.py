"""Truth: named float64 tensors, each with the noise that float32 rounding alone would put on it.

Plain numpy, so that the comparison needs neither torch nor a model.
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
    """A tensor of the truth, in memory or on disk; the names are those of :class:`TruthTensor`."""

    @property
    def value(self) -> np.ndarray: ...

    @property
    def noise(self) -> np.ndarray: ...

    @property
    def allowed(self) -> np.ndarray | None: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, rows: slice) -> Expected:
        """Some of its positions (axis −2)."""
        ...


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

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def rows(self, rows: slice) -> TruthTensor:
        allowed = None if self.allowed is None else self.allowed[..., rows, :]
        return TruthTensor(self.value[..., rows, :], self.noise[..., rows, :], allowed)


@dataclass(frozen=True)
class FiledTensor:
    """A :class:`TruthTensor` of a cache file, read when it is asked for and kept as long as this object is."""

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
        """Read anew."""

        def read(key: str) -> np.ndarray:
            _, shape = self.file.kind(key)
            return self.file.box(key, (*[slice(None)] * (len(shape) - 2), rows, slice(None)))

        return self._read(read)

    def _read(self, read: Callable[[str], np.ndarray]) -> TruthTensor:
        """:raises OracleError: the file went away, or is another by now."""
        try:
            value, noise = read(f"{self.name}|value"), read(f"{self.name}|noise")
            return TruthTensor(value, noise, read(f"{self.name}|allowed").astype(bool) if self.masked else None)
        except (SafetensorError, OSError) as error:
            raise OracleError(f"cached truth: cannot read {self.name}: {error}") from error


class FiledTensors(Mapping[str, Expected]):
    """The tensors of a cache file in execution order; none is kept."""

    def __init__(self, tensors: Mapping[str, FiledTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> FiledTensor:
        return replace(self._tensors[name])  # a fresh one, whose numbers go when it goes

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class SaeTruth:
    """What judging a feature that flipped needs beside the tensors.

    :ivar pre: pre-activations with their noise, [B, T, d_sae].
    :ivar threshold: θ, [d_sae]; zeros for ReLU and TopK.
    :ivar residual: the residual stream that was encoded, float64 [B, T, d_in].
    :ivar k: number of features that TopK keeps; 0 where a feature fires by its threshold alone.
    :ivar scale: by how much a position's decoded features are multiplied, [B, T, 1]; 1 without normalisation.
    :ivar relu: whether of the k largest only positive ones fire; a counterfactual may keep negative ones too.
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
    :ivar meta: digests and library versions it was made with.
    :ivar ignored: tensors of the model's files that transformers does not take.
    :ivar constant: tensors whose entries are all one number, and that number; what leads to them was not exercised.
    :ivar beyond: tensors of values that the model's format cannot hold, and the largest of those.
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
        """Read what :meth:`save` wrote.

        :raises OracleError: when the file is not a truth; delete it and it is computed again.
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
        except Exception as error:  # a truncated cache file fails in as many ways as there are bytes
            raise OracleError(f"cached truth {path} is unreadable ({error}); delete it") from error


def _sae(file: TensorFile, pre: str) -> SaeTruth:
    """Judging one feature needs all of this, so it is read whole."""
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
