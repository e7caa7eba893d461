"""Keeping traces: ``rust_outputs/<candle-mi version>/<case>.json`` with a safetensors beside each.

Tiny cases are kept whole. Of a large model a part is kept: the first, middle and last layer at the last
position, and the hundred largest logits there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
from safetensors import safe_open

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import REFUSAL_FORMAT, NothingOpen, Source, text_path, trace_path
from candle_mi_parity.candidate.spelling import CandidateError
from candle_mi_parity.candidate.tokens import TextIds, TextTokens
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files import atomic as durable
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.models.prepared_case import Subject
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import TOP_LOGITS, CandleMi, Emitted, Trace
from candle_mi_parity.trace.truth import Truth


class StoringSource(NothingOpen):
    """A source whose every outcome is kept: traces, and refusals as refusals.

    :param directory: ``rust_outputs/<version>``; emptied first.
    :raises CandidateError: the source is not a candle-mi that can be named.
    """

    def __init__(self, source: Source, directory: Path) -> None:
        if source.identity is None:
            raise CandidateError("only what candle-mi emits is stored")
        self._source, self._directory = source, directory
        self.identity: CandleMi = source.identity
        self.device = source.device
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write_json(directory / "candidate.json", self.identity.model_dump())

    def trace(self, subject: Subject, mode: Mode, truth: Truth, inputs: Path) -> Emitted:
        """Pass on what the source yields, after it was stored."""
        target = trace_path(self._directory, subject.case.id, mode)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            trace = self._source.trace(subject, mode, truth, inputs)
        except EmitterError as error:
            write_json(target, refusal(subject, self.identity, error))
            raise
        assert isinstance(trace, Trace)
        store_trace(trace, subject.case, target)
        return trace

    def text_ids(self, subject: Subject) -> TextIds:
        """Pass on the ids of the text, after they were stored; of a refusal, as the outcome of the case."""
        target = trace_path(self._directory, subject.case.id, "free")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            asked = self._source.text_ids(subject)
        except EmitterError as error:
            write_json(target, refusal(subject, self.identity, error))
            raise
        if asked.ids is not None and subject.case.text is not None:
            store_text_ids(self._directory, subject, self.identity, asked.ids)
        return asked


def store_text_ids(directory: Path, subject: Subject, identity: CandleMi, ids: list[int]) -> None:
    """Keep what a candidate's tokenizer made of a case's text."""
    stored = TextTokens(
        candle_mi=identity,
        case=subject.case.id,
        text=str(subject.case.text),
        tokenizer_digest=file_digest(subject.model_dir / "tokenizer.json"),
        ids=ids,
    )
    write_json(text_path(directory, subject.case.id), stored.model_dump())


def refusal(subject: Subject, identity: CandleMi, error: EmitterError) -> dict[str, object]:
    """What stands in place of a trace when a candidate refused the case."""
    return {
        "format": REFUSAL_FORMAT,
        "candle_mi": identity.model_dump(),
        "case": subject.case.id,
        "digest": subject.digest,
        "kind": error.kind,
        "error": error.message,
    }


def write_json(path: Path, document: object) -> None:
    durable.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", path)


def stored_selection(names: list[str]) -> set[str]:
    """The tensors of a case that is stored in part."""
    layer_of = {name: int(found[1]) for name in names if (found := re.match(r"(?:lens\.)?blocks\.(\d+)\.", name))}
    layers = sorted(set(layer_of.values()))
    kept = {layers[0], layers[len(layers) // 2], layers[-1]} if layers else set()
    return {name for name in names if name not in layer_of or layer_of[name] in kept}


def store_trace(trace: Trace, case: Case, target: Path) -> None:
    """Copy a trace, whole or in part as its case says.

    :param target: the JSON file to write; its safetensors is named after it.
    :raises TraceError: when what was written does not read back as the same numbers.
    """
    import torch
    from safetensors.torch import save_file  # numpy has no bfloat16

    target.parent.mkdir(parents=True, exist_ok=True)
    tensors_file = target.with_suffix(".safetensors")
    document = trace.document.model_dump(exclude_none=False)
    names = list(trace.entries)
    selection = set(names) if case.stored == "whole" else stored_selection(names)
    arrays: dict[str, np.ndarray] = {}
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for entry in document["tensors"]:
        if entry["name"] not in selection:
            continue
        array, part = trace.tensor(entry["name"]), None
        if case.stored == "part":
            array, part = _part(entry["name"], array)
        array = np.ascontiguousarray(array)
        arrays[entry["name"]] = array
        tensor = torch.from_numpy(array).to(getattr(torch, entry["dtype"]))
        tensors[entry["name"]] = tensor
        entries.append(
            {
                "name": entry["name"],
                "shape": list(array.shape),
                "dtype": entry["dtype"],
                "sha256": hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest(),
                "nonfinite": int(np.count_nonzero(~np.isfinite(array))),
                "file": tensors_file.name,
                "key": entry["name"],
                **({"part": part} if part else {}),
            }
        )
    partial = tensors_file.with_name(f".{tensors_file.name}.partial")
    try:
        save_file(tensors, partial)
        durable.put(partial, tensors_file)
    finally:
        partial.unlink(missing_ok=True)
    document["tensors"] = entries
    write_json(target, document)
    _read_back(target, arrays)


def _part(name: str, array: np.ndarray) -> tuple[np.ndarray, dict[str, object]]:
    """The last position, of logits its hundred largest, with the record of what was kept."""
    shape, row = list(array.shape), array.shape[-2] - 1
    columns = None
    if name == "logits" or name.startswith("lens"):
        columns = sorted(int(i) for i in np.argsort(array[0, row])[::-1][:TOP_LOGITS])
    kept = array[..., [row], :]
    return kept if columns is None else kept[..., columns], {
        "shape": shape,
        "rows": [row],
        "columns": columns,
    }


def _read_back(target: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writers of tensors have stored memory order for logical order; what is on disk is what counts."""
    again = Trace(target)
    for name, array in arrays.items():
        if not np.array_equal(again.tensor(name), array, equal_nan=True):
            raise TraceError(f"{target}: {name} did not read back as it was written")
    with safe_open(target.with_suffix(".safetensors"), framework="pt") as file:
        if set(file.keys()) != set(arrays):
            raise TraceError(f"{target}: tensors appeared or vanished while writing")
