"""The generic config reader: a class agrees, computes just what the release's census recorded, or fails."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.coverage import auto_config
from candle_mi_parity.coverage.auto_config import LoadedClass, error_of, judge_class, other_transformers, recorded
from candle_mi_parity.coverage.census_record import Entry
from candle_mi_parity.errors import TraceError
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.run import run_cases
from candle_mi_parity.spec.cases import Case, LocalModel
from candle_mi_parity.trace.trace import InMemory
from candle_mi_parity.trace.truth import Truth, TruthTensor
from tests.support.planting import RELEASE, Real, real

SAME = Entry(model_type="x", class_name="X", outcome="same", reader="auto")


def there() -> Real:
    return real("llama/hub")


def ask(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    got: InMemory | Exception,
    record: Entry,
    own: InMemory | None = None,
) -> CaseResult:
    """Judge a made-up candidate that answers ``got`` on the tiny llama, and ``own`` through from_pretrained."""
    answers = iter([got, own])
    subject, truth = there().subject, there().truth
    case = Case(id="auto-config/x", model=LocalModel(source="local", path="x"), tokens=subject.tokens[0])
    held = replace(subject, case=case)
    without_sae = replace(truth, tensors={n: t for n, t in truth.tensors.items() if not n.startswith("lens")})
    monkeypatch.setattr(auto_config, "loaded_class", lambda *_: LoadedClass(held, without_sae))

    def emit(*_: object) -> Path:
        if isinstance(got, Exception):
            raise got
        return tmp_path

    monkeypatch.setattr(auto_config, "same_candidate", lambda *_: next(answers))
    monkeypatch.setattr(auto_config, "Trace", lambda _: None)
    monkeypatch.setattr(auto_config, "check_header", lambda *_: None)
    asked = {"emitter": SimpleNamespace(emit=emit), "reads_directories": own is not None}
    source: Any = SimpleNamespace(identity=RELEASE, device="cpu", **asked)
    return judge_class(record, source, tmp_path, tmp_path / "out", "again")


def emitted(scale: float = 1.0) -> InMemory:
    arrays = {name: array for name, array in there().arrays.items() if not name.startswith("lens")}
    arrays["logits"] = arrays["logits"] * np.float32(scale)
    return InMemory({name: (array, None) for name, array in arrays.items()}, "float32", {}, [])


def different(scale: float) -> Entry:
    error = round(scale - 1, 4)
    return SAME.model_copy(update={"outcome": "different", "first": "logits", "error": error, "logits_error": error})


@pytest.mark.parametrize(
    ("got", "record", "status", "told"),
    [
        (1.0, SAME, Status.PASS, ""),
        (1.0, different(1.5), Status.PASS, ""),
        (1.5, SAME, Status.FAIL, "found that it agrees"),
        (1.5, different(1.5), Status.KNOWN, "As the recorded census"),
        (1.51, different(1.5), Status.FAIL, "the recorded census has ('logits', 0.5, 0.5), this is ('logits', 0.51"),
        (EmitterError("model", "no such class"), SAME, Status.FAIL, "no such class"),
        (EmitterError("crash", "killed"), SAME, Status.ERROR, "killed"),
        (TraceError("torn"), SAME, Status.ERROR, "torn"),
    ],
)
def test_a_class_is_held_to_what_was_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, got: Any, record: Entry, status: Status, told: str
) -> None:
    answer = emitted(got) if isinstance(got, float) else got
    found = ask(monkeypatch, tmp_path, answer, record)
    assert found.status is status and told in found.message(), found.message()


def test_a_class_has_the_same_bits_through_from_pretrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    same, other = (ask(monkeypatch, tmp_path, emitted(), SAME, emitted(scale)) for scale in (1.0, 1 + 2**-22))
    assert same.status is Status.PASS
    assert (other.status, other.error) == (
        Status.FAIL,
        "logits has other bits where MIModel::from_pretrained loads the model",
    )


def test_the_recorded_error_depends_on_no_noise_and_on_allowed_entries_only() -> None:
    value = np.array([[[3.0, 4.0], [1.0, -np.inf]]])
    allowed = np.isfinite(value)
    truth = Truth(
        [[1, 2]], {"logits": TruthTensor(np.where(allowed, value, 0), np.ones_like(value), allowed)}, meta={}
    )
    got = InMemory({"logits": (np.array([[[3.0, 4.0], [2.0, 9.0]]], np.float32), None)}, "float32", {}, [])
    assert error_of("logits", truth, got) == round(1 / 26**0.5, 4)
    assert error_of("hook_embed", truth, got) is None


@pytest.mark.parametrize("release", ["0.1.6", "0.2.2"])
def test_every_recorded_divergence_has_its_errors(release: str) -> None:
    entries = recorded(release)
    assert len(entries) > 15
    for entry in entries:
        assert (entry.error is not None and entry.logits_error is not None) == (entry.outcome == "different"), entry


@pytest.mark.rust
@pytest.mark.thorough
def test_the_newest_release_does_what_was_recorded(tmp_path: Path) -> None:
    if other := other_transformers("0.2.2"):
        pytest.skip(other)
    result = run_cases(RunOptions("0.2.2", out=tmp_path, only=("auto-config",)), [], {}, Progress())
    part = result.sections["auto-config"]
    assert len(part.results) == len(recorded("0.2.2")) and not part.new, part.line()
