"""The same case twice gives the same bytes, but for when it ran and how long it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_mi_parity.candidate.sources import LiveSource, Source, StatelessSource
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.run import repeat as repeating
from candle_mi_parity.run.repeat import digests, repeat
from candle_mi_parity.run.run import RunOptions
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import InMemory, Trace

CASES = {case.id: case for case in load_cases()}
KINDS = ["llama/hub", "gemma2/batch", "llama/bf16"]


def files(trace: Trace) -> dict[str, bytes]:
    """Every file of a trace; ``run`` is outside, but for the number of threads."""
    document: dict[str, Any] = json.loads(trace.path.read_text())
    run = document.pop("run")
    beside = {entry.file for entry in trace.entries.values() if entry.file is not None}
    found = {name: (trace.path.parent / name).read_bytes() for name in beside}
    assert found, "the tensors are in files"
    return found | {"trace.json": json.dumps([document, run["threads"]]).encode()}


@pytest.mark.rust
@pytest.mark.parametrize("name", KINDS)
def test_the_emitter_writes_the_same_bytes_twice(live: Source, name: str) -> None:
    assert isinstance(live, LiveSource)
    subject = prepare(CASES[name], cache_root())
    oracle = Oracle(subject, cache_root())
    one, other = (files(live.trace(subject, "free", oracle.truth(), oracle.inputs("free"))) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("name", KINDS)
def test_torch_gives_the_same_bytes_twice_from_a_model_loaded_twice(name: str) -> None:
    subject = prepare(CASES[name], cache_root())
    oracle = Oracle(subject, cache_root())
    threads, runs = torch.get_num_threads(), []
    for _ in range(2):
        with TorchSource() as source:
            runs.append(digests(source.trace(subject, "free", oracle.truth(), oracle.inputs("free"))))
    assert runs[0] == runs[1] and len(runs[0]) > 10
    assert torch.get_num_threads() == threads


class Restless(StatelessSource):
    """Adds one rounding to one tensor at every run but the first."""

    identity = None

    def __init__(self) -> None:
        self._source, self._runs = TorchSource(), 0

    def trace(self, *arguments: Any) -> InMemory:
        trace = self._source.trace(*arguments)
        if self._runs:
            array, part = trace.arrays["logits"]
            trace.arrays["logits"] = np.nextafter(array, np.float32(np.inf)), part
        self._runs += 1
        return trace


def test_repeat_counts_the_tensors_whose_bytes_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = RunOptions("torch", ("llama/hub",), tmp_path, search=0)
    same = repeat(options, 3, lambda _: Progress())
    assert same.cases[0].status == "PASS" and same.cases[0].differing == [] and same.cases[0].tensors > 20
    assert same.line == "1 of 1 cases gave the same bytes 3 times on cpu"
    monkeypatch.setattr(repeating, "open_source", lambda *_: Restless())
    other = repeat(options, 3, lambda _: Progress())
    assert other.cases[0].differing == ["logits"] and other.cases[0].status == "other bytes"
    assert other.line.startswith("0 of 1 cases")
