"""Judge candle-mi's generic config reader, ``from_hf_config_auto``, on the classes that it loads.

The census (:mod:`census`) asks about every class of transformers and takes minutes. This asks again about those that
the recorded census of a release found loading, from cached truths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from candle_mi_parity.candidate.process import EmitterProcess
from candle_mi_parity.candidate.requests import request
from candle_mi_parity.candidate.sources import LiveSource, same_candidate
from candle_mi_parity.compare.compare import check_header, compare
from candle_mi_parity.compare.verdict import CaseResult, Explained, Status, TensorResult
from candle_mi_parity.coverage.census_record import STORED, Entry, Reader, read_census
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.files.versions import version
from candle_mi_parity.judge.case import taking_errors
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle.provenance import library_versions, rules_digest
from candle_mi_parity.spec.cases import Case, LocalModel
from candle_mi_parity.spec.families import MAPPED
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.trace.trace import CandleMi, Emitted, Trace
from candle_mi_parity.trace.truth import Truth

SECONDS = 60.0
"""Time limit for one class."""
SUBJECT, TRUTH = "subject.json", "truth.safetensors"
DIGITS = 4
"""Significant digits of a recorded error. Rounding moves it by less, since it is large beside the noise."""


@dataclass(frozen=True)
class LoadedClass:
    """The tiny model of a class, and its truth."""

    subject: PreparedCase
    truth: Truth


def recorded(release: str) -> list[Entry]:
    """What a release's census found of each class that the generic reader loaded and that has a truth.

    :raises ParityError: there is no census of this release, or it is malformed.
    """
    classes = read_census(STORED / f"{release}.json").classes
    return [entry for entry in classes if entry.reader == "auto" and entry.outcome in ("same", "different")]


def other_transformers(release: str) -> str:
    """Why a release's census does not hold here; empty if it does: another transformers has other tiny models."""
    taken, found = read_census(STORED / f"{release}.json").transformers, version("transformers")
    if taken == found:
        return ""
    says = f"the census of candle-mi {release} was taken with transformers {taken}, and {found} is installed"
    return f"{says}; install transformers {taken}"


def loaded_class(model_type: str, cache: Path) -> LoadedClass:
    """A class from the cache, without torch; made if it is not there."""
    made_from = [file_digest(FIXTURES / "census.toml"), rules_digest(), library_versions()]
    key = content_key("auto-config", model_type, made_from)
    made = publish(cache / "auto-config" / f"{model_type}-{key}", lambda out: _make(model_type, cache, out))
    held = json.loads((made / SUBJECT).read_text(encoding="utf-8"))
    truth = Truth.load(made / TRUTH)
    case = Case(
        id=f"auto-config/{model_type}",
        model=LocalModel(source="local", path=held["model_dir"]),
        tokens=held["tokens"][0],
    )
    subject = PreparedCase(
        case=case,
        model_dir=Path(held["model_dir"]),
        model_type=model_type,
        tokens=held["tokens"],
        captures=[name for name in truth.tensors if name != "logits"],
        sae_file=None,
        model_digest=held["model_digest"],
        sae_digest=None,
        digest=held["digest"],
    )
    return LoadedClass(subject, truth)


def _make(model_type: str, cache: Path, out: Path) -> None:
    from candle_mi_parity.coverage.census import subject_of
    from candle_mi_parity.coverage.census_models import tiny_model
    from candle_mi_parity.coverage.census_truth import truth_of

    subject = subject_of(model_type, tiny_model(model_type, cache), cache)
    truth_of(subject, cache).save(out / TRUTH)
    held = {"model_dir": str(subject.model_dir), "tokens": subject.tokens}
    held |= {"model_digest": subject.model_digest, "digest": subject.digest}
    (out / SUBJECT).write_text(json.dumps(held), encoding="utf-8")


def emit_class(
    emitter: EmitterProcess,
    identity: CandleMi,
    subject: PreparedCase,
    loader: Reader | Literal["pretrained"],
    out: Path,
    device: str = "cpu",
    seconds: float = SECONDS,
) -> Trace:
    """The hooks of a subject's captures, and the logits, of a model that is loaded in one of candle-mi's ways.

    :param seconds: time limit for the answer.
    :raises EmitterError: candle-mi refuses, or gives no clear answer.
    :raises TraceError: the trace is invalid or of another candle-mi.
    """
    asked = request(subject, "free", Path(), out, device) | {"loader": loader, "project": [], "inputs": None}
    return same_candidate(Trace(emitter.emit(asked, seconds)), identity)


def judge_class(record: Entry, source: LiveSource, cache: Path, out: Path, again: str) -> CaseResult:
    """One class: it agrees, or computes just what the release's census recorded, or fails.

    It fails too where ``MIModel::from_pretrained``, which guesses in the same way, gives other bits.

    :param again: the command that repeats it.
    """
    result = CaseResult(f"auto-config/{record.model_type}", "auto-config", "", Status.ERROR, again)
    with taking_errors(result):
        there = loaded_class(record.model_type, cache)
        subject, result.digest = there.subject, there.subject.digest
        path = out / f"{record.model_type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        trace = emit_class(source.emitter, source.identity, subject, "auto", path, source.device)
        check_header(there.truth, trace, None)
        tensors = compare(there.truth, trace, None, None)
        now = judged(
            record.model_copy(update={"outcome": "not-asked", "first": None, "error": None}),
            tensors,
            there.truth,
            trace,
        )
        _conclude(result, record, now, tensors)
        if source.reads_directories:
            path = out / f"{record.model_type}.pretrained.json"
            own = emit_class(source.emitter, source.identity, subject, "pretrained", path, source.device)
            if other := [
                name for name in trace.entries if own.tensor(name).tobytes() != trace.tensor(name).tobytes()
            ]:
                result.status, result.explained = Status.FAIL, None
                result.error = f"{other[0]} has other bits where MIModel::from_pretrained loads the model"
    return result


def _conclude(result: CaseResult, record: Entry, now: Entry, tensors: list[TensorResult]) -> None:
    """The status from the two entries, the recorded one and that of now."""
    result.tensors, result.expected = tensors, len(tensors)
    if now.outcome == "same":
        # Tensors that the class computes elsewhere than the census looks for them are no divergence.
        result.tensors = [tensor for tensor in tensors if tensor.status is not Status.FAIL]
        result.expected = len(result.tensors)
        result.status = Status.PASS
        return
    if now.outcome != "different":
        result.status, result.error = Status.UNMEASURED, now.reason
        return
    result.status = Status.FAIL
    measures = [(entry.first, entry.error, entry.logits_error) for entry in (record, now)]
    if record.outcome == "different" and measures[0] == measures[1] and now.error is not None:
        says = f"first at {now.first}, {now.error:.4g} of its size away; logits {now.logits_error:.4g}"
        result.explained = Explained(["census"], f"As the recorded census of the release says: {says}.")
        result.status = Status.KNOWN
    elif record.outcome == "different":
        result.unexplained = (
            f"the recorded census has {measures[0]}, this is {measures[1]} (tensor, error, of logits)"
        )
    else:
        result.unexplained = "the recorded census of the release found that it agrees"


def judged(entry: Entry, results: Sequence[TensorResult], truth: Truth, trace: Emitted) -> Entry:
    """``same`` or ``different``; by the logits alone if the hook points were guessed from module names."""
    failed = [result for result in results if result.status is Status.FAIL]
    tensors = [result for result in results if not result.name.startswith("logits.")]  # those are its next tokens
    logits = next(result for result in results if result.name == "logits")
    facts: dict[str, object] = {"compared": len(tensors), "logits_ratio": rounded(logits.ratio, 3)}
    if failed and (logits in failed or entry.model_type in MAPPED):
        facts |= {"outcome": "different", "first": failed[0].name, "ratio": rounded(failed[0].ratio, 3)}
        facts |= {"error": error_of(failed[0].name, truth, trace), "logits_error": error_of("logits", truth, trace)}
        return entry.model_copy(update=facts | {"reason": failed[0].reason})
    if logits.status is Status.UNMEASURED:
        return entry.model_copy(update={"reason": "candle-mi computes it, unjudged: the logits are too noisy"})
    remark = f"logits agree; {failed[0].name} is elsewhere than this census looks for it" if failed else ""
    return entry.model_copy(update=facts | {"outcome": "same", "reason": remark})


def error_of(name: str, truth: Truth, trace: Emitted) -> float | None:
    """‖candle-mi − truth‖ / ‖truth‖ over a tensor's allowed entries; None where there are not two of one shape."""
    if name not in truth.tensors or name not in trace.entries:
        return None
    got, expected = trace.tensor(name).astype(np.float64), truth.tensors[name]
    if got.shape != expected.value.shape:
        return None
    allowed = True if expected.allowed is None else np.broadcast_to(expected.allowed, got.shape)
    difference = np.where(allowed, got - expected.value, 0.0)
    size = np.where(allowed, expected.value, 0.0)
    return rounded(float(np.linalg.norm(difference) / np.linalg.norm(size)), DIGITS)


def rounded(value: float, digits: int) -> float | None:
    return float(f"{value:.{digits}g}") if value < float("inf") else None
