"""Stored traces: what is kept reads back as it was, a part is compared as a part, and tampering shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import NothingOpen, StoredSource
from candle_mi_parity.candidate.spelling import CandidateError
from candle_mi_parity.candidate.store import StoringSource, store_trace, stored_selection
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.errors import TraceError
from candle_mi_parity.models.prepared_case import Subject
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import Trace
from candle_mi_parity.trace.truth import Truth
from tests.support.planting import RELEASE, Real, failures, real, write


class Emitting(NothingOpen):
    """A source that has one trace, or refuses."""

    identity = RELEASE

    def __init__(self, path: Path, error: EmitterError | None = None) -> None:
        self._path, self._error = path, error

    def trace(self, subject: Subject, mode: Mode, truth: Truth, inputs: Path) -> Trace:
        if self._error is not None:
            raise self._error
        return Trace(self._path)


def in_part(there: Real) -> Real:
    case = there.subject.case.model_copy(update={"stored": "part"})
    return replace(there, subject=replace(there.subject, case=case))


def stored(tmp_path: Path, there: Real, error: EmitterError | None = None) -> Path:
    """``rust_outputs/<version>`` with one case in it."""
    source = StoringSource(Emitting(write(tmp_path / "emitted", there), error), tmp_path / "kept")
    try:
        source.trace(there.subject, "free", there.truth, there.inputs)
    except EmitterError:
        assert error is not None
    return tmp_path / "kept"


def reopened(directory: Path, there: Real) -> Trace:
    return StoredSource(directory).trace(there.subject, "free", there.truth, there.inputs)


def results(trace: Trace, there: Real) -> list[TensorResult]:
    part = any(entry.part for entry in trace.entries.values())
    selection = stored_selection(list(there.truth.tensors)) if part else None
    return compare(there.truth, trace, there.decoder, selection)


@pytest.mark.parametrize("case_id", ["llama/hub", "gemma2/hub"])
def test_a_whole_trace_reads_back_bit_for_bit(tmp_path: Path, case_id: str) -> None:
    there = real(case_id)
    trace = reopened(stored(tmp_path, there), there)
    assert list(trace.entries) == list(there.arrays)
    for name, array in there.arrays.items():
        np.testing.assert_array_equal(trace.tensor(name), array, err_msg=name)
    assert not failures(results(trace, there))


def test_what_is_kept_of_a_deep_model() -> None:
    names = ["hook_embed", *(f"blocks.{i}.{p}" for i in range(30) for p in ("a", "b")), "logits", "sae.recon"]
    kept = stored_selection(names)
    assert {name.split(".")[1] for name in kept if name.startswith("blocks.")} == {"0", "15", "29"}
    assert {"hook_embed", "logits", "sae.recon", "blocks.15.b"} <= kept and len(kept) == 9


@pytest.mark.parametrize("case_id", ["llama/hub", "gemma2/hub"])
def test_a_part_reads_back_and_only_the_part_is_compared(tmp_path: Path, case_id: str) -> None:
    there = in_part(real(case_id))
    trace = reopened(stored(tmp_path, there), there)
    logits = trace.entries["logits"]
    assert logits.part is not None and logits.part.shape == [1, 24, 211] and logits.shape == [1, 1, 100]
    columns = logits.part.columns
    assert columns is not None and columns == sorted(columns)
    whole = there.arrays["logits"][0, 23]
    assert set(columns) == set(np.argsort(whole)[-100:].tolist())
    np.testing.assert_array_equal(trace.tensor("logits")[0, 0], whole[columns])
    np.testing.assert_array_equal(trace.tensor("hook_embed")[0, 0], there.arrays["hook_embed"][0, 23])
    found = {result.name: result for result in results(trace, there)}
    assert not failures(list(found.values()))
    assert found["logits"].compared == 100 and found["blocks.1.hook_resid_mid"].compared == 64


@pytest.mark.parametrize("name", ["logits", "blocks.1.mlp.hook_post", "sae.recon"])
def test_a_fault_in_the_kept_part_is_caught(tmp_path: Path, name: str) -> None:
    there = in_part(real("gemma2/hub"))
    arrays = there.arrays
    arrays[name][0, 23, int(arrays[name][0, 23].argmax())] *= np.float32(1.01)
    emitted = write(tmp_path / "emitted", there, arrays)
    store_trace(Trace(emitted), there.subject.case, tmp_path / "kept.json")
    assert failures(results(Trace(tmp_path / "kept.json"), there)) == [name]


def test_a_tensor_missing_from_a_part_is_missed(tmp_path: Path) -> None:
    there = in_part(real("llama/hub"))
    path = stored(tmp_path, there) / "llama" / "hub.json"
    edit(path, lambda document: document["tensors"].pop(5))
    (name,) = failures(results(Trace(path), there))
    assert name == list(there.arrays)[5]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_refusal_is_stored_and_comes_back_as_a_refusal(tmp_path: Path) -> None:
    there, error = real("llama/hub"), EmitterError("model", "unsupported rope_type")
    directory = stored(tmp_path, there, error)
    with pytest.raises(EmitterError, match="model: unsupported rope_type"):
        reopened(directory, there)
    edit(directory / "llama" / "hub.json", lambda d: d.update(digest="0" * 64))
    with pytest.raises(TraceError, match="a refusal of another case"):
        reopened(directory, there)
    edit(directory / "llama" / "hub.json", lambda d: d.update(extra=1))
    with pytest.raises(TraceError, match="keys"):
        reopened(directory, there)


def test_what_is_not_stored_is_one_line(tmp_path: Path) -> None:
    directory = stored(tmp_path, real("llama/hub"))
    with pytest.raises(TraceError, match=r"nothing is stored for gemma2/hub \(free\)"):
        reopened(directory, real("gemma2/hub"))
    (directory / "candidate.json").write_text('{"version": "0.2.2"}')
    with pytest.raises(TraceError, match=r"candidate\.json"):
        StoredSource(directory)


def test_only_what_candle_mi_emits_is_stored(tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match="only what candle-mi emits"):
        StoringSource(TorchSource(), tmp_path / "kept")
