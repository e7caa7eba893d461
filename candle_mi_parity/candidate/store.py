"""Storing the traces of a release, see :mod:`trace.release`.

Traces of tiny models are stored in full. Of a large model, the first, middle and last layer at the last position are
stored, with the hundred largest logits.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout

from candle_mi_parity.candidate.parts import LANES
from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import Source, StatelessSource
from candle_mi_parity.candidate.spelling import CandidateError
from candle_mi_parity.candidate.tokens import TextIds, TextTokens
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files import atomic
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.release import (
    Refusal,
    Release,
    StoredRelease,
    readable,
    short_digest,
    text_name,
    trace_name,
)
from candle_mi_parity.trace.trace import TOP_LOGITS, CandleMi, Emitted, MadeBy, Trace
from candle_mi_parity.trace.truth import Truth

Place = tuple[str, str]
"""A safetensors file and a key in it."""


class Storing:
    """A release that is being stored, with a lock on its directory.

    New files are added to ``traces/``; the index is written when the block ends. A block that raises leaves the
    earlier index and its files. In either case files that no index names are removed.

    :param index: ``rust_outputs/<version>.json``.
    :param whole: whether the earlier index is replaced completely, or only the cases that are stored now.
    :raises CandidateError: another process stores in the directory.
    """

    def __init__(self, index: Path, whole: bool) -> None:
        self.index, self._whole = index, whole
        self._earlier: dict[str, Any] = {}
        self._fields: dict[str, Any] = {}
        self._cases: dict[str, dict[str, object]] = {}
        self._lock = FileLock(index.parent / ".lock", timeout=0)

    def __enter__(self) -> Self:
        self.index.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise CandidateError(
                f"another `maint store` writes to {self.index.parent}; wait until it ends"
            ) from error
        if self.index.is_file():
            self._earlier = StoredRelease(self.index).release.model_dump()
        self._fields = {} if self._whole else self._earlier.copy()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                cases = self._fields.get("cases", {}) | self._cases
                atomic.write_text(Release.model_validate({**self._fields, "cases": cases}).text(), self.index)
            remove_unnamed(self.index.parent)
        finally:
            self._lock.release()

    def of(self, identity: CandleMi) -> None:
        """Set the candle-mi of the release.

        :raises CandidateError: the cases that remain are of another candle-mi.
        """
        if self._fields.setdefault("candle_mi", identity.model_dump()) != identity.model_dump():
            raise CandidateError(f"{self.index} is of another candle-mi; store the whole release")

    @property
    def has_cases(self) -> bool:
        """Whether there is an outcome of a case, also that a release does not offer what it needs."""
        return bool(self._cases)

    def case(self, case_id: str) -> dict[str, object]:
        """The outcomes of a case, see :class:`StoredCase`, without those of an earlier index."""
        return self._cases.setdefault(case_id, {})

    def trace(self, trace: Trace, case: Case, mode: Mode) -> None:
        """Store a trace, in full or in part as its case says."""
        made_by = trace.header.model_dump(include=set(MadeBy.model_fields))
        if set(case.features) & set(LANES):  # of another build, whose features are in the trace
            made_by.pop("features")
        self._fields |= made_by
        outcome, earlier = self.case(case.id), self._earlier.get("cases", {}).get(case.id, {})
        outcome[mode] = store_trace(trace, case, trace_name(case.id, mode), self.index.parent / "traces")
        # A known divergence is not run teacher-forced again, but its teacher-forced run is needed later.
        if mode == "free" and earlier.get("free") == outcome["free"]:
            outcome["forced"] = earlier["forced"]

    def file(self, name: str, document: dict[str, Any]) -> str:
        """Store a JSON document without the fields of the index; returns its digest."""
        kept = {key: value for key, value in document.items() if key not in MadeBy.model_fields}
        return write_named(self.index.parent / "traces" / name, readable(kept))

    def whole_file(self, name: str, path: Path) -> None:
        """Store a document on the whole release: ``calls`` or ``tokens``."""
        self._fields[name] = self.file(name, json.loads(path.read_text(encoding="utf-8")))


class StoringSource(StatelessSource):
    """Wraps a source and stores its traces and refusals.

    :raises CandidateError: the source has no identity.
    """

    def __init__(self, source: Source, store: Storing) -> None:
        if source.identity is None:
            raise CandidateError("only what candle-mi emits is stored")
        self._source, self._store = source, store
        self.identity: CandleMi = source.identity
        self.device = source.device
        store.of(self.identity)

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Emitted:
        """The trace of the wrapped source, after it was stored."""
        try:
            trace = self._source.trace(subject, mode, truth, inputs)
        except EmitterError as error:
            self._refused(subject, mode, error)
            raise
        assert isinstance(trace, Trace)
        self._store.trace(trace, subject.case, mode)
        return trace

    def text_ids(self, subject: PreparedCase) -> TextIds:
        """The ids of the wrapped source, after they were stored; a refusal is stored as the outcome of the case."""
        try:
            asked = self._source.text_ids(subject)
        except EmitterError as error:
            self._refused(subject, "free", error)
            raise
        if asked.ids is not None and subject.case.text is not None:
            tokens = TextTokens(
                case=subject.case.id,
                text=subject.case.text,
                tokenizer_digest=file_digest(subject.model_dir / "tokenizer.json"),
                ids=asked.ids,
            )
            self._store.case(tokens.case)["text"] = self._store.file(text_name(tokens.case), tokens.model_dump())
        return asked

    def _refused(self, subject: PreparedCase, mode: Mode, error: EmitterError) -> None:
        refusal = Refusal(kind=error.kind, error=error.message, case=subject.digest)
        self._store.case(subject.case.id)[mode] = refusal.model_dump()


def write_named(path: Path, text: str) -> str:
    """Write ``<path>.<digest>.json`` if it is absent; returns the digest."""
    digest = short_digest(text.encode())
    if not (target := path.with_name(f"{path.name}.{digest}.json")).is_file():
        atomic.write_text(text, target)
    return digest


def remove_unnamed(outputs: Path) -> None:
    """Remove files from ``traces/`` that no index of the directory names.

    :raises TraceError: an index or a trace cannot be read; then nothing is removed.
    """
    traces, kept = outputs / "traces", set()
    for index in outputs.glob("*.json"):
        for name in StoredRelease(index).release.files():
            kept.add(traces / name)
            kept.update(_files_of(traces / name))
    for path in list(traces.rglob("*")):
        if path.is_file() and path not in kept:
            path.unlink()


def _files_of(trace: Path) -> list[Path]:
    """The safetensors files of a trace."""
    try:
        entries = json.loads(trace.read_text(encoding="utf-8")).get("tensors", [])
    except (OSError, ValueError) as error:
        raise TraceError(f"{trace}: {error}") from error
    return [trace.with_name(entry["file"]) for entry in entries]


def stored_selection(names: list[str]) -> set[str]:
    """The tensors that are stored of a large model."""
    layer_of = {name: int(found[1]) for name in names if (found := re.match(r"(?:lens\.)?blocks\.(\d+)\.", name))}
    layers = sorted(set(layer_of.values()))
    kept = {layers[0], layers[len(layers) // 2], layers[-1]} if layers else set()
    return {name for name in names if name not in layer_of or layer_of[name] in kept}


def store_trace(trace: Trace, case: Case, name: str, traces: Path) -> str:
    """Write a trace without the fields of the index, and those tensors that no other stored trace of the case holds.

    :param name: ``<family>/<case>``, or ``<family>/<case>.forced``.
    :returns: the digest of its JSON.
    :raises TraceError: the files do not read back as the same numbers.
    """
    import torch  # numpy has no bfloat16

    names = list(trace.entries)
    selection = set(names) if case.stored == "whole" else stored_selection(names)
    arrays: dict[str, np.ndarray] = {}
    new: dict[str, torch.Tensor] = {}
    places = stored_places(traces / name)
    entries: list[dict[str, Any]] = []
    for entry in trace.entries.values():
        if entry.name not in selection:
            continue
        array, part = trace.tensor(entry.name), None
        if case.stored == "part":
            array, part = _part(entry.name, array)
        arrays[entry.name] = array = np.ascontiguousarray(array)
        tensor = torch.from_numpy(array).to(getattr(torch, entry.dtype))
        digest = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        content = digest, entry.dtype, array.shape
        if content not in places:
            places[content] = ("", entry.name)
            new[entry.name] = tensor
        entries.append(
            {
                "name": entry.name,
                "shape": list(array.shape),
                "dtype": entry.dtype,
                "sha256": digest,
                "nonfinite": int(np.count_nonzero(~np.isfinite(array))),
                "file": places[content][0],
                "key": places[content][1],
                **({"part": part} if part else {}),
            }
        )
    file = _write_tensors(new, traces / name) if new else ""
    for item in entries:
        item["file"] = item["file"] or file
    document = trace.document.model_dump()
    made_by = {key: document["header"].pop(key) for key in MadeBy.model_fields}
    if set(case.features) & set(LANES):
        document["header"]["features"] = made_by["features"]
    del document["run"]
    digest = write_named(traces / name, readable(document | {"tensors": entries}))
    _read_back(traces / f"{name}.{digest}.json", made_by, arrays)
    return digest


def stored_places(path: Path) -> dict[tuple[str, str, tuple[int, ...]], Place]:
    """The places of the stored tensors of a case and mode, by sha256, dtype and shape.

    :param path: the path of the traces without their digests.
    """
    found: dict[tuple[str, str, tuple[int, ...]], Place] = {}
    own = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{12}}\.json")
    for trace in sorted(each for each in path.parent.glob("*.json") if own.fullmatch(each.name)):
        for entry in json.loads(trace.read_text(encoding="utf-8"))["tensors"]:
            content = entry["sha256"], entry["dtype"], tuple(entry["shape"])
            found.setdefault(content, (entry["file"], entry["key"]))
    return found


def _write_tensors(tensors: dict[str, Any], path: Path) -> str:
    """Write ``<path>.<digest>.safetensors``, and return its name."""
    from safetensors.torch import save

    content = save(tensors)
    target = path.with_name(f"{path.name}.{short_digest(content)}.safetensors")
    atomic.write_bytes(content, target)
    return target.name


def _part(name: str, array: np.ndarray) -> tuple[np.ndarray, dict[str, object]]:
    """The last position, of logits the hundred largest, with their :class:`Selection`."""
    shape, row = list(array.shape), array.shape[-2] - 1
    columns = None
    if name == "logits" or name.startswith("lens"):
        columns = sorted(int(i) for i in np.argsort(array[0, row])[::-1][:TOP_LOGITS])
    kept = array[..., [row], :]
    selection: dict[str, object] = {"shape": shape, "rows": [row], "columns": columns}
    return kept if columns is None else kept[..., columns], selection


def _read_back(target: Path, made_by: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Verify the files: writers of tensors have confused memory order with logical order."""
    again = Trace(target, made_by)
    for name, array in arrays.items():
        if not np.array_equal(again.tensor(name), array, equal_nan=True):
            raise TraceError(f"{target}: {name} did not read back as it was written")
    if set(again.entries) != set(arrays):
        raise TraceError(f"{target}: tensors appeared or vanished while writing")
