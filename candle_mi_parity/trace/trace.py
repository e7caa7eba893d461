"""Trace: what a candidate emitted; a JSON header and tensors, inline or in a safetensors file beside it.

Every byte is untrusted: the document is checked against its schema before anything else reads it, a file may
only be named, not located, and each tensor's digest is computed again from its bytes.
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
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError

from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.chunks import positions, row_major
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.files.untrusted import read_json as read_any_json

FORMAT = "candle-mi-parity/trace/1"
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "float64": np.dtype("<f8"),
}
_FILED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8")}
"""The same as safetensors spells them."""


MAX_TEXT = 1000


def _printable(text: str) -> str:
    """Texts go to terminals, reports and file names: no line break, escape sequence or lone surrogate, no novel."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"a text of {len(text)} characters, more than {MAX_TEXT}")
    if not text.isprintable():
        raise ValueError(f"{one_line(ascii(text[:300]))} holds unprintable characters")
    return text


Text = Annotated[str, AfterValidator(_printable)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=1 << 63)]
Shape = Annotated[list[Size], Field(max_length=8)]
"""The product of a long list of large sizes would itself take for ever."""
TOP_FEATURES, TOP_LOGITS = 10, 100
"""How many features of the last position a trace lists, and how many logits are kept of one stored in part."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CandleMi(Part):
    """Which candle-mi: a release with its registry checksum, or a path's tree digest, or a git revision."""

    version: Text
    source: Literal["registry", "path", "git"]
    checksum: Digest | None
    revision: Text | None
    tree_digest: Digest | None


class CaseRef(Part):
    id: Text
    digest: Digest


class MadeBy(Part):
    """What all traces of a release have in common; stored traces leave it to the index of their release."""

    emitter: Text
    candle_mi: CandleMi
    candle: Text
    features: list[Text]


class Header(MadeBy):
    """All that decides the numbers; digests are the emitter's own, of the bytes that it read."""

    device: Text
    dtype: Literal["float32", "bfloat16", "float16"]
    case: CaseRef
    model_digest: Digest
    sae_digest: Digest | None
    inputs_digest: Digest | None


class Run(Part):
    """What differs between two runs of the same case; outside every digest."""

    started: Text
    seconds: dict[Text, float]
    threads: int
    peak_rss_bytes: int | None


class Selection(Part):
    """A stored trace may keep a part of a tensor.

    :ivar shape: the whole tensor's shape.
    :ivar rows: positions kept on axis −2.
    :ivar columns: entries kept on the last axis; None keeps all.
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
    """

    format: Literal["candle-mi-parity/trace/1"]
    header: Header
    run: Run | None = None
    tokens: list[list[Size]]
    tensors: list[TensorEntry]
    scalars: dict[Text, float]
    top_features_last_pos: list[Feature]

    @model_validator(mode="after")
    def _unique(self) -> Document:
        counts = Counter(tensor.name for tensor in self.tensors)
        if doubled := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"tensors given twice: {', '.join(doubled)}")
        return self

    @model_validator(mode="after")
    def _all_listed(self) -> Document:
        """A shorter list of features would be less to compare."""
        active = self.scalars.get("sae.n_active_last_pos")
        if active is None or any(tensor.nonfinite for tensor in self.tensors):
            return self
        if len(self.top_features_last_pos) != min(TOP_FEATURES, active):
            raise ValueError(f"{len(self.top_features_last_pos)} top features, and {active:g} are active")
        return self


class Emitted(Protocol):
    """What the comparison reads, whether from disk or from memory.

    :ivar asked: the tensors that it is to hold; None for all that the truth has.
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
        """Positions (axis −2) of a tensor that is whole."""
        ...


def chunks(entry: TensorEntry) -> list[slice]:
    """The positions of a tensor, cut so that a long one need not be in memory as a whole."""
    # numpy has no bfloat16 to read a part of, inline values are there already, and what is not finite is counted
    # over the whole.
    together = entry.part is not None or entry.values is not None or entry.dtype == "bfloat16" or entry.nonfinite
    return [slice(None)] if together else positions(entry.shape)


@dataclass
class InMemory:
    """Tensors that never were a file: torch's own, or those of a reference JSON.

    :param arrays: name → array and, where only a part of the tensor is there, which.
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
                dtype=self.dtype if not name.startswith("sae") else "float32",  # type: ignore[arg-type]
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


class Trace:
    """A trace on disk; tensors are read and verified when they are asked for.

    :param path: the JSON file.
    :param made_by: those fields of :class:`MadeBy` that the file's header may leave out.
    :raises TraceError: unreadable, unknown format, or not what the schema says; names the first place.
    """

    def __init__(self, path: Path, made_by: Mapping[str, object] | None = None) -> None:
        self.path = path
        self.asked: set[str] | None = None
        self._files: dict[str, TensorFile] = {}
        self._verified: set[str] = set()
        raw = read_json(path)
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            shown = one_line(repr(found)) if isinstance(found, str | int | None) else type(found).__name__
            raise TraceError(f"{path}: format is {shown}, expected {FORMAT!r}")
        if made_by is not None and isinstance(raw.get("header"), dict):
            raw["header"] = {**made_by, **raw["header"]}
        try:
            self.document = Document.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = one_line(".".join(str(part) for part in first["loc"]))
            raise TraceError(f"{path}: {where or 'document'}: {one_line(first['msg'])}") from error

    @property
    def header(self) -> Header:
        return self.document.header

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        return {entry.name: entry for entry in self.document.tensors}

    @property
    def dtype(self) -> str:
        return self.header.dtype

    @property
    def scalars(self) -> dict[str, float]:
        return self.document.scalars

    @property
    def top_features(self) -> list[Feature]:
        return self.document.top_features_last_pos

    def tensor(self, name: str) -> np.ndarray:
        """The tensor in its own dtype (a bfloat16 one as float32), after its bytes were verified.

        :raises TraceError: absent, of another shape or dtype than declared, or bytes that differ from the
            digest.
        """
        entry = self.entries[name]
        if entry.dtype == "bfloat16":
            return self._bfloat16(entry)
        dtype = _DTYPES[entry.dtype]
        if entry.values is not None:
            with np.errstate(over="ignore"):  # too large becomes Inf, which is judged as such
                array: np.ndarray = np.array(entry.values, dtype=dtype).reshape(entry.shape)
        else:
            array = self._from_file(entry, None)
        self._check_digest(entry, hashlib.sha256(_bytes(array)).hexdigest())
        self._check_finite(entry, int(np.count_nonzero(~np.isfinite(array))))
        return array

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Positions (axis −2) of a tensor; the whole of it is verified before its first are given.

        :raises TraceError: as :meth:`tensor`.
        """
        entry = self.entries[name]
        if rows == slice(None):
            return self.tensor(name)
        if name not in self._verified:
            self._verify_in_part(entry)
            self._verified.add(name)
        return self._from_file(entry, (*[slice(None)] * (len(entry.shape) - 2), rows, slice(None)))

    def _verify_in_part(self, entry: TensorEntry) -> None:
        """What :meth:`tensor` checks, with a chunk in memory at a time."""
        digest, nonfinite = hashlib.sha256(), 0
        for box in row_major(entry.shape):
            array = self._from_file(entry, box)
            digest.update(_bytes(array))
            nonfinite += int(np.count_nonzero(~np.isfinite(array)))
        self._check_digest(entry, digest.hexdigest())
        self._check_finite(entry, nonfinite)

    def _check_kind(self, entry: TensorEntry, shape: list[int], dtype: np.dtype[Any]) -> None:
        if shape != entry.shape or dtype != _DTYPES[entry.dtype]:
            raise TraceError(
                f"{self.path}: {entry.name} is {dtype}{shape} in {entry.file}, declared {entry.dtype}{entry.shape}"
            )

    def _check_digest(self, entry: TensorEntry, digest: str) -> None:
        if digest != entry.sha256:
            raise TraceError(
                f"{self.path}: bytes of {entry.name} have sha256 {digest[:12]}…, declared {entry.sha256[:12]}…"
            )

    def _check_finite(self, entry: TensorEntry, found: int) -> None:
        if found != entry.nonfinite:
            raise TraceError(f"{self.path}: {entry.name} holds {found} non-finite values, declared {entry.nonfinite}")

    def _beside(self, entry: TensorEntry) -> Path:
        file = self.path.parent / str(entry.file)
        if file.is_symlink() or not file.is_file():
            raise TraceError(f"{self.path}: {entry.file} is not beside it, but {entry.name} is said to be there")
        return file

    def _bfloat16(self, entry: TensorEntry) -> np.ndarray:
        """numpy has no bfloat16: its 16 bits are the upper half of a float32's."""
        if entry.values is not None:
            bits = (np.array(entry.values, "<f4").view("<u4") >> 16).astype("<u2")
        else:
            path = self._beside(entry)
            tensors = self._files.setdefault(path.name, TensorFile(path))
            try:
                dtype, shape = tensors.kind(str(entry.key))
                if dtype != "BF16" or shape != entry.shape:
                    raise TraceError(f"{path}: {entry.key} is {dtype}{shape}, declared bfloat16{entry.shape}")
                bits = np.frombuffer(tensors.raw(str(entry.key)), "<u2")
            except (SafetensorError, OSError, ValueError) as error:
                raise TraceError(f"{path}: cannot read {entry.key}: {one_line(str(error))}") from error
        self._check_digest(entry, hashlib.sha256(_bytes(bits)).hexdigest())
        return (bits.astype("<u4") << 16).view("<f4").reshape(entry.shape)

    def _from_file(self, entry: TensorEntry, box: tuple[slice, ...] | None) -> np.ndarray:
        """A tensor, or a box of one."""
        file = self._beside(entry)
        tensors = self._files.setdefault(file.name, TensorFile(file))
        try:
            # Before it is read: what a file claims to hold may be more than there is memory.
            dtype, shape = tensors.kind(str(entry.key))
            self._check_kind(entry, shape, _FILED.get(dtype, np.dtype(bool)))
            return tensors.tensor(str(entry.key)) if box is None else tensors.box(str(entry.key), box)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise TraceError(f"{file}: cannot read {entry.key}: {one_line(str(error))}") from error


def _bytes(array: np.ndarray) -> memoryview:
    """Row-major, little-endian as all dtypes here are; a copy only where the memory's order is another."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def read_json(path: Path) -> Any:
    """JSON with nothing forgiven, see :func:`untrusted.read_json`.

    :raises TraceError: naming the file and the reason.
    """
    return read_any_json(path, TraceError)
