"""Two runs of a case give the same bytes, apart from dates and times."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.candidate.sources import LiveSource, Source
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.run import repeat as repeating
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.repeat import repeat
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import InMemory, Trace
from tests.support.planting import CASES, Giving

KINDS = ["llama/hub", "gemma2/batch", "llama/bf16"]


def files(trace: Trace) -> dict[str, bytes]:
    """Every file of a trace, without the dates and times in ``run``."""
    document: dict[str, Any] = json.loads(trace.path.read_text())
    run = document.pop("run")
    beside = {entry.file for entry in trace.entries.values() if entry.file is not None}
    found = {name: (trace.path.parent / name).read_bytes() for name in beside}
    assert found
    return found | {"trace.json": json.dumps([document, run["threads"]]).encode()}


@pytest.mark.rust
@pytest.mark.parametrize("name", KINDS)
def test_the_emitter_writes_the_same_bytes_twice(live: Source, name: str) -> None:
    assert isinstance(live, LiveSource)
    subject = prepare(CASES[name], cache_root())
    oracle = Oracle(subject, cache_root())
    one, other = (files(live.trace(subject, "free", oracle.truth(), oracle.inputs("free"))) for _ in range(2))
    assert one == other


def changing() -> Giving:
    """torch, but every run after the first differs by one rounding in one tensor."""
    source, runs = TorchSource(), itertools.count()

    def give(*asked: Any) -> InMemory:
        trace = source.trace(*asked)
        if next(runs):
            array, part = trace.arrays["logits"]
            trace.arrays["logits"] = np.nextafter(array, np.float32(np.inf)), part
        return trace

    return Giving(give, None)


def test_repeat_counts_the_tensors_whose_bytes_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = RunOptions("torch", ("llama/hub",), tmp_path, search=0)
    same = repeat(options, 3, lambda _: Progress())
    assert same.cases[0].status == "PASS" and same.cases[0].differing == [] and same.cases[0].tensors > 20
    assert same.line == "1 of 1 cases gave the same bytes 3 times on cpu"
    monkeypatch.setattr(repeating, "open_source", lambda *_: changing())
    other = repeat(options, 3, lambda _: Progress())
    assert other.cases[0].differing == ["logits"] and other.cases[0].status == "other bytes"
    assert other.line.startswith("0 of 1 cases")
