"""Stored traces read back unchanged, parts are compared as parts, and equal files are shared."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import StoredSource
from candle_mi_parity.candidate.spelling import CandidateError
from candle_mi_parity.candidate.store import Storing, StoringSource, remove_unnamed, stored_selection, write_named
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.run_result import RunResult, Section
from candle_mi_parity.compare.verdict import CaseResult, Status, TensorResult
from candle_mi_parity.errors import Stopped, TraceError
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.spec.paths import OUTPUTS
from candle_mi_parity.trace.release import StoredCase, StoredRelease
from candle_mi_parity.trace.trace import Trace
from tests.support.command import command
from tests.support.planting import RELEASE, Arrays, Giving, Real, failures, real, write
from tests.support.stored import write_index


def emitting(path: Path, error: EmitterError | None = None) -> Giving:
    """A source with one trace or a refusal."""

    def give(*_: object) -> Trace:
        if error is not None:
            raise error
        return Trace(path)

    return Giving(give)


def in_part(there: Real) -> Real:
    case = there.subject.case.model_copy(update={"stored": "part"})
    return replace(there, subject=replace(there.subject, case=case))


def stored(
    directory: Path,
    there: Real,
    arrays: Arrays | None = None,
    error: EmitterError | None = None,
    whole: bool = True,
    version: str = "0.2.2",
) -> Path:
    """Store one case; returns the index of the release."""
    index = directory / "outputs" / f"{version}.json"
    with Storing(index, whole) as keep:
        source = StoringSource(emitting(write(directory / "emitted", there, arrays), error), keep)
        with contextlib.suppress(EmitterError):
            source.trace(there.subject, "free", there.truth, there.inputs)
    return index


def reopened(index: Path, there: Real) -> Trace:
    return StoredSource(index).trace(there.subject, "free", there.truth, there.inputs)


def files(index: Path) -> set[str]:
    """The files in the directory of an index, without the index and the lock."""
    names = {str(path.relative_to(index.parent)) for path in index.parent.rglob("*") if path.is_file()}
    return names - {index.name, ".lock"}


def results(trace: Trace, there: Real) -> list[TensorResult]:
    part = any(entry.part for entry in trace.entries.values())
    selection = stored_selection(list(there.truth.tensors)) if part else None
    return compare(there.truth, trace, there.decoder, selection)


@pytest.mark.parametrize("case_id", ["llama/hub", "gemma2/hub"])
def test_a_whole_trace_reads_back_bit_for_bit(tmp_path: Path, case_id: str) -> None:
    there, index = real(case_id), stored(tmp_path, real(case_id))
    with pytest.raises(TraceError, match=r"nothing is stored for llama/v5 \(free\)"):
        reopened(index, real("llama/v5"))
    trace = reopened(index, there)
    assert list(trace.entries) == list(there.arrays)
    for name, array in there.arrays.items():
        np.testing.assert_array_equal(trace.tensor(name), array, err_msg=name)
    assert not failures(results(trace, there))


def test_a_trace_of_a_lane_keeps_the_features_of_its_build(tmp_path: Path) -> None:
    there = real("llama/hub")
    case = there.subject.case.model_copy(update={"features": ["mmap"]})
    lane = replace(there, subject=replace(there.subject, case=case))
    emitted = json.loads(write(tmp_path / "emitted", there).read_text())
    emitted["header"]["features"] = ["mmap", "sae", "transformer"]
    index = stored(tmp_path, there)
    with Storing(index, False) as keep:
        path = tmp_path / "emitted" / "lane.json"
        path.write_text(json.dumps(emitted))
        StoringSource(emitting(path), keep).trace(lane.subject, "free", there.truth, there.inputs)
    assert StoredRelease(index).release.features == ["sae", "transformer"]
    assert reopened(index, there).header.features == ["mmap", "sae", "transformer"]


def test_the_stored_part_of_a_deep_model() -> None:
    names = ["hook_embed", *(f"blocks.{i}.{p}" for i in range(30) for p in ("a", "b")), "logits", "sae.recon"]
    kept = stored_selection(names)
    assert {name.split(".")[1] for name in kept if name.startswith("blocks.")} == {"0", "15", "29"}
    assert {"hook_embed", "logits", "sae.recon", "blocks.15.b"} <= kept and len(kept) == 9


def test_a_part_reads_back_and_only_the_part_is_compared(tmp_path: Path) -> None:
    there = in_part(real("gemma2/hub"))
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
def test_a_fault_in_the_stored_part_is_detected(tmp_path: Path, name: str) -> None:
    there = in_part(real("gemma2/hub"))
    arrays = there.arrays
    arrays[name][0, 23, int(arrays[name][0, 23].argmax())] *= np.float32(1.01)
    assert failures(results(reopened(stored(tmp_path, there, arrays), there), there)) == [name]


def test_a_tensor_missing_from_a_part_fails(tmp_path: Path) -> None:
    there = in_part(real("llama/hub"))
    path = tmp_path / "outputs" / sorted(name for name in files(stored(tmp_path, there)) if name.endswith(".json"))[0]
    document = json.loads(path.read_text())
    document["tensors"].pop(5)
    release = StoredRelease(tmp_path / "outputs" / "0.2.2.json").release
    digest = write_named(path.parent / "hub", json.dumps(document))
    changed = release.model_copy(update={"cases": {"llama/hub": StoredCase(free=digest)}})
    (name,) = failures(results(reopened(write_index(tmp_path / "outputs", changed), there), there))
    assert name == list(there.arrays)[5]


def test_a_refusal_is_stored_and_comes_back_as_a_refusal(tmp_path: Path) -> None:
    there, error = real("llama/hub"), EmitterError("model", "unsupported rope_type")
    index = stored(tmp_path, there, error=error)
    assert files(index) == set(), "a refusal is a line of the index"
    with pytest.raises(EmitterError, match="model: unsupported rope_type"):
        reopened(index, there)
    text = index.read_text()
    index.write_text(text.replace(there.subject.digest, "0" * 64))
    with pytest.raises(TraceError, match="the refusal of llama/hub is of another case"):
        reopened(index, there)
    index.write_text(text.replace('"kind"', '"extra": 1, "kind"'))
    with pytest.raises(TraceError, match=r"0\.2\.2\.json: cases\.llama/hub\.free"):
        reopened(index, there)


# --- shared files ---------------------------------------------------------------------------------


def test_a_release_of_equal_numbers_adds_only_its_index(tmp_path: Path) -> None:
    index = stored(tmp_path, real("gemma2/hub"))
    before = files(index)
    other = stored(tmp_path, real("gemma2/hub"), version="9.9.9")
    assert files(index) == before | {"9.9.9.json"} and len(before) == 2
    assert index.read_text() == other.read_text()


def test_of_a_changed_trace_only_the_changed_tensor_is_stored(tmp_path: Path) -> None:
    there = real("llama/hub")
    index = stored(tmp_path, there)
    before = files(index)
    arrays = there.arrays
    arrays["logits"][0, 3, 5] += 1
    later = stored(tmp_path, there, arrays, version="0.3.0")
    new = files(index) - before - {"0.3.0.json"}
    assert {Path(name).suffix for name in new} == {".json", ".safetensors"} and len(new) == 2
    (file,) = (index.parent / name for name in new if name.endswith(".safetensors"))
    assert list(load_file(file)) == ["logits"]
    trace = reopened(later, there)
    for name, array in arrays.items():
        np.testing.assert_array_equal(trace.tensor(name), array, err_msg=name)
    np.testing.assert_array_equal(reopened(index, there).tensor("logits"), there.arrays["logits"])
    # Tensors that the later release shares remain when the earlier one is removed.
    index.unlink()
    remove_unnamed(index.parent)
    assert len(files(index)) == 4
    reopened(later, there).tensor("hook_embed")


def test_storing_some_cases_leaves_the_others(tmp_path: Path) -> None:
    index = stored(tmp_path, real("llama/hub"))
    before, line = files(index), index.read_text().splitlines()
    stored(tmp_path, real("gemma2/hub"), whole=False)
    assert before < files(index)
    assert {text.rstrip(",") for text in line} <= {text.rstrip(",") for text in index.read_text().splitlines()}
    stored(tmp_path, real("gemma2/hub"), error=EmitterError("model", "no"), whole=False)
    assert files(index) == before, "files that no index names are removed"
    other = RELEASE.model_copy(update={"checksum": "b" * 64})
    with pytest.raises(CandidateError, match="of another candle-mi"), Storing(index, whole=False) as keep:
        keep.of(other)


def test_an_equal_trace_keeps_its_teacher_forced_run(tmp_path: Path) -> None:
    there = real("llama/hub")
    index = stored(tmp_path, there)
    release = StoredRelease(index).release
    with_forced = release.cases["llama/hub"].model_copy(update={"forced": "0" * 12})
    forced = index.parent / "traces" / "llama" / f"hub.forced.{'0' * 12}.json"
    for arrays, kept in ((there.arrays, True), (there.arrays | {"logits": 2 * there.arrays["logits"]}, False)):
        index.write_text(release.model_copy(update={"cases": {"llama/hub": with_forced}}).text())
        forced.write_text("{}")
        stored(tmp_path, there, arrays)
        assert (StoredRelease(index).release.cases["llama/hub"].forced is not None) == kept == forced.is_file()


@pytest.mark.parametrize("whole", [True, False])
def test_a_store_that_is_stopped_leaves_the_earlier_release(tmp_path: Path, whole: bool) -> None:
    index = stored(tmp_path, real("llama/hub"))
    before, text = files(index), index.read_text()

    there = real("gemma2/hub")
    with pytest.raises(Stopped), Storing(index, whole) as keep:  # noqa: PT012
        emitted = emitting(write(tmp_path / "other", there))
        StoringSource(emitted, keep).trace(there.subject, "free", there.truth, there.inputs)
        assert files(index) > before
        raise Stopped("SIGINT")
    assert files(index) == before and index.read_text() == text
    (index.parent / "traces" / "left.json").touch()  # as a killed store leaves it
    stored(tmp_path, real("llama/hub"), whole=whole)
    assert files(index) == before and index.read_text() == text


def test_one_store_at_a_time_and_only_of_what_candle_mi_emits(tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match="only what candle-mi emits"), Storing(tmp_path / "x.json", True) as keep:
        StoringSource(TorchSource(), keep)
    assert not (tmp_path / "x.json").exists()
    second = Storing(tmp_path / "0.1.6.json", whole=True)
    with Storing(tmp_path / "0.2.2.json", whole=True) as first:
        first.of(RELEASE)
        with pytest.raises(CandidateError, match="another `maint store`"):
            second.__enter__()


def test_a_damaged_index_removes_nothing(tmp_path: Path) -> None:
    index = stored(tmp_path, real("llama/hub"))
    before = files(index)
    index.write_text("{}")
    with pytest.raises(TraceError, match=r"0\.2\.2\.json"):
        remove_unnamed(index.parent)
    assert files(index) == before


def stores_calls(monkeypatch: pytest.MonkeyPatch, directory: Path, status: Status | None) -> Path:
    """Store the calls of a release that had others; returns the index. The run is imagined if there is a status."""
    index = directory / "0.2.2.json"
    text = (OUTPUTS / index.name).read_text(encoding="utf-8")
    release = json.loads(text) | {"calls": None, "tokens": None, "cases": {}}
    index.write_text(json.dumps(release), encoding="utf-8")
    monkeypatch.setattr("candle_mi_parity.spec.paths.OUTPUTS", directory)
    if status is not None:
        call = CaseResult("calls/kl/1d", "calls", "", status, "", error="planted")
        ran = RunResult("0.2.2", {}, {}, [], {}, sections={"calls": Section("direct call", [call])})
        monkeypatch.setattr("candle_mi_parity.cli.run.run_with_progress", lambda options: ran)
    done = command("maint", "store", "0.2.2", "--only", "calls", "--out", str(directory / "out"))
    assert done.returncode == (2 if status is Status.ERROR else 0), done.stderr
    assert status is not Status.ERROR or "nothing is stored of 0.2.2: calls/kl/1d: planted" in done.stderr
    return index


@pytest.mark.parametrize("status", [Status.ERROR, Status.FAIL])
def test_calls_that_cannot_be_judged_are_not_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: Status
) -> None:
    stores_calls(monkeypatch, tmp_path, status)


@pytest.mark.thorough
@pytest.mark.rust
def test_calls_are_stored_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stored = StoredRelease(stores_calls(monkeypatch, tmp_path, None)).release
    assert stored.tokens is None and not stored.cases
    [answers] = (tmp_path / "traces").iterdir()
    assert answers.name == f"calls.{stored.calls}.json" and len(json.loads(answers.read_text())["calls"]) > 100


@pytest.mark.parametrize("absent", [True, False])
def test_a_case_that_a_release_does_not_offer_is_stored_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, absent: bool
) -> None:
    index, refusal = tmp_path / "0.2.2.json", {"kind": "absent", "error": "no feature", "case": "0" * 64}
    release = json.loads((OUTPUTS / index.name).read_text(encoding="utf-8")) | {"calls": None, "tokens": None}
    index.write_text(json.dumps(release | {"cases": {}}), encoding="utf-8")
    monkeypatch.setattr("candle_mi_parity.spec.paths.OUTPUTS", tmp_path)

    def ran(options: RunOptions) -> RunResult:
        assert options.keep is not None
        if absent:
            options.keep.case("llama/gptq")["free"] = refusal
        return RunResult("0.2.2", {}, {}, [], {"llama/gptq": "no feature"})

    monkeypatch.setattr("candle_mi_parity.cli.run.run_with_progress", ran)
    done = command("maint", "store", "0.2.2", "--cases", "llama/gptq", "--out", str(tmp_path / "out"))
    assert done.returncode == (0 if absent else 2), done.stderr
    assert absent or "nothing is stored of 0.2.2: nothing ran that is stored" in done.stderr
    assert json.loads(index.read_text())["cases"] == ({"llama/gptq": {"free": refusal}} if absent else {})
