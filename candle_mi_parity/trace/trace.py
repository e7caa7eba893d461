"""Traces: what a candidate emitted, a JSON header with tensors, inline or in a safetensors file beside it.

A trace is untrusted: the document is validated against its schema, it may name only files in its own directory, and
each tensor is verified against its digest.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError

from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.chunks import positions, row_major
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.files.untrusted import read_json, validated
from candle_mi_parity.spec.hook_points import format_of

FORMAT = "candle-mi-parity/trace/1"
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "float64": np.dtype("<f8"),
}
_SAFETENSORS = {"float32": "F32", "float16": "F16", "float64": "F64", "bfloat16": "BF16"}
"""The same formats by the names that safetensors uses."""
MAX_TEXT = 1000


def _printable(text: str) -> str:
    """Texts are shown in terminals and reports: they hold no line break, escape sequence or lone surrogate."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"a text of {len(text)} characters, more than {MAX_TEXT}")
    if not text.isprintable():
        raise ValueError(f"{one_line(ascii(text[:300]))} holds unprintable characters")
    return text


Text = Annotated[str, AfterValidator(_printable)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=1 << 63)]
Shape = Annotated[list[Size], Field(max_length=8)]
TOP_FEATURES, TOP_LOGITS = 10, 100
"""The number of features of the last position in a trace, and of logits in a trace that is stored in part."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CandleMi(Part):
    """Which candle-mi: a release with its registry checksum, a directory's tree digest, or a git revision. Of another
    program it is its name and version."""

    version: Text
    source: Literal["registry", "path", "git", "program"]
    checksum: Digest | None = None
    revision: Text | None = None
    tree_digest: Digest | None = None

    @property
    def title(self) -> str:
        """``candle-mi 0.2.2``, or the name and version of another program."""
        return self.version if self.source == "program" else f"candle-mi {self.version}"


class CaseRef(Part):
    id: Text
    digest: Digest


class MadeBy(Part):
    """Fields that all traces of a release share; a stored release has them in its index."""

    emitter: Text
    candle_mi: CandleMi
    candle: Text
    features: list[Text]


class Header(MadeBy):
    """Everything that decides the numbers; the emitter computes the digests of the files that it reads."""

    device: Text
    dtype: Literal["float32", "bfloat16", "float16"]
    case: CaseRef
    model_digest: Digest
    sae_digest: Digest | None
    inputs_digest: Digest | None


class Run(Part):
    """Fields that differ between two runs of the same case."""

    started: Text
    seconds: dict[Text, float]
    threads: int
    peak_rss_bytes: int | None


class Selection(Part):
    """The part of a tensor that a stored trace holds.

    :ivar shape: the shape of the full tensor.
    :ivar rows: indices on axis −2.
    :ivar columns: indices on the last axis; None for all.
    """

    shape: Shape
    rows: list[Size]
    columns: list[Size] | None


class TensorEntry(Part):
    """One tensor; exactly one of ``values`` (row-major) and ``file`` with ``key``."""

    name: Text
    shape: Shape
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    sha256: Digest
    nonfinite: Size
    values: list[float] | None = None
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=200)] | None = None
    key: Text | None = None
    part: Selection | None = None

    @model_validator(mode="after")
    def _one_place(self) -> TensorEntry:
        if (self.values is None) == (self.file is None) or (self.file is None) != (self.key is None):
            raise ValueError("give exactly one of `values` and `file` with `key`")
        if self.values is not None and len(self.values) != math.prod(self.shape):
            raise ValueError(f"{len(self.values)} values for shape {self.shape}")
        return self


class Feature(Part):
    index: Size
    value: float


class Document(Part):
    """The JSON file.

    :ivar run: None in a stored trace.
    :ivar absent: hook points that a program does not have → why. They are not compared; candle-mi has all of them.
    """

    format: Literal["candle-mi-parity/trace/1"]
    header: Header
    run: Run | None = None
    tokens: list[list[Size]]
    tensors: list[TensorEntry]
    scalars: dict[Text, float]
    top_features_last_pos: list[Feature]
    absent: dict[Text, Text] = Field(default={}, exclude_if=lambda absent: not absent)

    @model_validator(mode="after")
    def _unique(self) -> Document:
        counts = Counter(tensor.name for tensor in self.tensors)
        if doubled := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"tensors given twice: {', '.join(doubled)}")
        if both := sorted(set(counts) & set(self.absent)):
            raise ValueError(f"tensors given and absent: {', '.join(both)}")
        return self

    @model_validator(mode="after")
    def _all_listed(self) -> Document:
        """A shorter list of features would leave some of them unchecked."""
        active = self.scalars.get("sae.n_active_last_pos")
        if active is None or any(tensor.nonfinite for tensor in self.tensors):
            return self
        if len(self.top_features_last_pos) != min(TOP_FEATURES, active):
            raise ValueError(f"{len(self.top_features_last_pos)} top features, and {active:g} are active")
        return self


class Emitted(Protocol):
    """A trace on disk or in memory, as the comparison reads it.

    :ivar asked: the tensors that were requested; None for all tensors of the truth.
    """

    asked: set[str] | None

    @property
    def entries(self) -> dict[str, TensorEntry]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def scalars(self) -> dict[str, float]: ...

    @property
    def top_features(self) -> list[Feature]: ...

    def tensor(self, name: str) -> np.ndarray: ...

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Positions (axis −2) of a tensor."""
        ...


def chunks(entry: TensorEntry) -> list[slice]:
    """The positions of a tensor in chunks, so that a long tensor is not in memory as a whole."""
    # bfloat16 cannot be read in parts, inline values are in memory, and non-finite values need all of it.
    together = entry.part is not None or entry.values is not None or entry.dtype == "bfloat16" or entry.nonfinite
    return [slice(None)] if together else positions(entry.shape)


@dataclass
class InMemory:
    """Tensors in memory: torch's own, or those of a reference JSON.

    :param arrays: name → array, with its :class:`Selection` if it is a part of a tensor.
    :param asked: see :class:`Emitted`.
    """

    arrays: dict[str, tuple[np.ndarray, Selection | None]]
    dtype: str
    scalars: dict[str, float]
    top_features: list[Feature]
    asked: set[str] | None = None

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        return {
            name: TensorEntry(
                name=name,
                shape=list(array.shape),
                dtype=format_of(name, self.dtype),  # type: ignore[arg-type]
                sha256="0" * 64,
                nonfinite=int(np.count_nonzero(~np.isfinite(array))),
                file="memory",
                key=name,
                part=part,
            )
            for name, (array, part) in self.arrays.items()
        }

    def tensor(self, name: str) -> np.ndarray:
        return self.arrays[name][0]

    def rows(self, name: str, rows: slice) -> np.ndarray:
        return self.arrays[name][0][..., rows, :]


class Tensors:
    """The tensors that a JSON file holds or that lie beside it, read and verified at each access.

    :param path: the JSON file.
    """

    def __init__(self, path: Path, entries: list[TensorEntry]) -> None:
        self.path = path
        self.entries = {entry.name: entry for entry in entries}
        self._files: dict[str, TensorFile] = {}
        self._verified: set[str] = set()

    def tensor(self, name: str) -> np.ndarray:
        """The tensor in its own dtype (bfloat16 as float32), verified against its digest.

        :raises TraceError: the tensor is absent, of another shape or dtype than declared, or its bytes do not match.
        """
        entry = self.entries[name]
        half = entry.dtype == "bfloat16"  # numpy has no such type: its 16 bits are the upper half of a float32's
        if entry.values is None:
            array = self._from_file(entry, None)
        else:
            with np.errstate(over="ignore"):  # a value that is too large becomes Inf
                array = np.array(entry.values, _DTYPES["float32" if half else entry.dtype]).reshape(entry.shape)
            if half:
                array = (array.view("<u4") >> 16).astype("<u2")
        digest = hashlib.sha256(_bytes(array)).hexdigest()
        if half:
            array = (array.astype("<u4") << 16).view("<f4")
        self._check(entry, digest, int(np.count_nonzero(~np.isfinite(array))))
        return array

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Positions (axis −2) of a tensor; the full tensor is verified at the first access.

        :raises TraceError: see :meth:`tensor`.
        """
        entry = self.entries[name]
        if rows == slice(None):
            return self.tensor(name)
        if name not in self._verified:
            self._verify_in_chunks(entry)
            self._verified.add(name)
        return self._from_file(entry, (*[slice(None)] * (len(entry.shape) - 2), rows, slice(None)))

    def _verify_in_chunks(self, entry: TensorEntry) -> None:
        digest, nonfinite = hashlib.sha256(), 0
        for box in row_major(entry.shape):
            array = self._from_file(entry, box)
            digest.update(_bytes(array))
            nonfinite += int(np.count_nonzero(~np.isfinite(array)))
        self._check(entry, digest.hexdigest(), nonfinite)

    def _check(self, entry: TensorEntry, digest: str, nonfinite: int) -> None:
        if digest != entry.sha256:
            raise TraceError(
                f"{self.path}: bytes of {entry.name} have sha256 {digest[:12]}…, declared {entry.sha256[:12]}…"
            )
        if nonfinite != entry.nonfinite:
            raise TraceError(
                f"{self.path}: {entry.name} holds {nonfinite} non-finite values, declared {entry.nonfinite}"
            )

    def _from_file(self, entry: TensorEntry, box: tuple[slice, ...] | None) -> np.ndarray:
        """A tensor, or a box of one; bfloat16 as its 16 bits."""
        file, key = self.path.parent / str(entry.file), str(entry.key)
        if file.is_symlink() or not file.is_file():
            raise TraceError(f"{self.path}: {entry.file}, which holds {entry.name}, is not beside it")
        tensors = self._files.setdefault(file.name, TensorFile(file))
        try:
            dtype, shape = tensors.kind(key)  # before it is read, which may take more memory than there is
            if shape != entry.shape or dtype != _SAFETENSORS[entry.dtype]:
                raise TraceError(
                    f"{self.path}: {entry.name} is {dtype}{shape} in {file.name}, declared {entry.dtype}{entry.shape}"
                )
            if entry.dtype == "bfloat16":
                return np.frombuffer(tensors.raw(key), "<u2").reshape(shape)
            return tensors.tensor(key) if box is None else tensors.box(key, box)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise TraceError(f"{file}: cannot read {entry.key}: {one_line(str(error))}") from error


class Trace(Tensors):
    """A trace on disk.

    :param path: the JSON file.
    :param made_by: fields of :class:`MadeBy` for a header without them.
    :raises TraceError: the file is unreadable, of an unknown format, or violates the schema; names the first place.
    """

    def __init__(self, path: Path, made_by: Mapping[str, object] | None = None) -> None:
        self.asked: set[str] | None = None
        raw = read_json(path, TraceError)
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            shown = one_line(repr(found)) if isinstance(found, str | int | None) else type(found).__name__
            raise TraceError(f"{path}: format is {shown}, expected {FORMAT!r}")
        if made_by is not None and isinstance(raw.get("header"), dict):
            raw["header"] = {**made_by, **raw["header"]}
        self.document = validated(Document, raw, path, TraceError)
        super().__init__(path, self.document.tensors)

    @property
    def header(self) -> Header:
        return self.document.header

    @property
    def dtype(self) -> str:
        return self.header.dtype

    @property
    def scalars(self) -> dict[str, float]:
        return self.document.scalars

    @property
    def top_features(self) -> list[Feature]:
        return self.document.top_features_last_pos


def _bytes(array: np.ndarray) -> memoryview:
    """The row-major bytes of an array; a copy only if its memory has another order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
