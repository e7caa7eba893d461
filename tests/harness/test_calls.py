"""Direct calls: each planted fault fails, also on top of a known one, and a run and a diff report it."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.candidate.sources import StoredSource
from candle_mi_parity.candidate.store import write_named
from candle_mi_parity.compare.diff import Diff
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.coverage import calls_judge
from candle_mi_parity.coverage.calls import Answer, Answered, Calls, InputTensor, answers, load_calls
from candle_mi_parity.coverage.calls_compare import compare_call
from candle_mi_parity.coverage.calls_judge import (
    KnownCalls,
    diff_calls,
    expectations,
    judge_calls,
    load_known_calls,
    report_outdated,
)
from candle_mi_parity.errors import ExplanationError, TraceError
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.report import page, report_model, tables, views_ci
from candle_mi_parity.report.causes import grouped
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.run import run_cases
from candle_mi_parity.trace.release import StoredRelease
from tests.support.calls import ARRAYS, ROWS, TABLE, Values, held_to
from tests.support.results import case, run_of, shown
from tests.support.stored import INDEX, write_index

STORED = answers(StoredSource(INDEX), TABLE, Path(), Path())


def right(call: str) -> Values:
    return {name: tensor.value for name, tensor in held_to().truths[call, None].items()}


def answered(call: str, values: Values) -> Answered:
    results = []
    for name, value in values.items():
        flat = [number if math.isfinite(number) else str(number) for number in np.ravel(value).astype(float).tolist()]
        results.append(Answer.model_validate({"name": name, "shape": list(np.shape(value)), "values": flat}))
    return Answered(id=call, outcome="results", results=results, error=None)


def transposed(call: str) -> tuple[str, Values]:
    return call, {"value": right(call)["value"].swapaxes(-1, -2)}


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis, keepdims=True))
    return np.asarray(weights / weights.sum(axis, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.asarray((p * np.log(p / q)).sum())


def ranked(rank: np.ndarray, k: int = 2) -> Values:
    """A list of changed tokens in the order of ``rank``."""
    p, q = softmax(ARRAYS["down_a"]), softmax(ARRAYS["down_b"])
    at = np.argsort(-rank, kind="stable")[:k]
    return {"tokens": at, "baseline": p[at], "ablated": q[at], "change": np.abs(p - q)[at]}


def pca(matrix: np.ndarray) -> Values:
    _, scales, rows = np.linalg.svd(matrix, full_matrices=False)
    values = scales[:2] ** 2
    return {"components": -rows[:2], "eigenvalues": values, "explained": values / (scales**2).sum()}


def base(name: str) -> tuple[np.ndarray, np.ndarray]:
    return ARRAYS[f"base{name}"], ARRAYS[f"other{name}"]


P, Q = (softmax(logits) for logits in base("1d"))
DOWN = softmax(ARRAYS["down_a"]) - softmax(ARRAYS["down_b"])
CENTRED = ARRAYS["matrix"] - ARRAYS["matrix"].mean(0)
THETA = np.float64(np.asarray(TABLE.saes["jump"].threshold, np.float32))
X = ARRAYS["at_theta"]

RIGHT: dict[str, Callable[[], tuple[str, Values]]] = {
    "KL": lambda: ("kl/1d", {"value": kl(P, Q)}),
    "KL over positions": lambda: ("kl/2d", {"value": kl(*(softmax(logits) for logits in base("2d")))}),
    "top changed": lambda: ("top_changed/both-ways", ranked(np.abs(DOWN))),
    "PCA of either sign": lambda: ("pca/2", pca(CENTRED)),
    "above θ": lambda: ("jump/theta", {"value": np.where(X > THETA, X, 0)}),
    "either tie": lambda: ("topk-cpu/ties", {"value": np.array([[0.0, 2.0, 0.0, 1.0]])}),
}
PLANTED: dict[str, Callable[[], tuple[str, Values]]] = {
    "KL arguments swapped": lambda: ("kl/1d", {"value": kl(Q, P)}),
    "bits for nats": lambda: ("kl/1d", {"value": kl(P, Q) / np.log(2)}),
    "wrong axis": lambda: ("kl/2d", {"value": kl(*(softmax(logits, 0) for logits in base("2d")))}),
    "first position for last": lambda: ("token_prob/2d", {"value": softmax(base("2d")[0])[0, 5]}),
    "top-k by signed change": lambda: ("top_changed/both-ways", ranked(DOWN)),
    "a token twice": lambda: ("top_changed/both-ways", {name: v[[0, 0]] for name, v in ranked(np.abs(DOWN)).items()}),
    "one token short": lambda: ("top_changed/both-ways", ranked(np.abs(DOWN), 1)),
    "mask transposed": lambda: transposed("causal/4"),
    "knockout transposed": lambda: transposed("knockout/all-heads"),
    "PCA not centred": lambda: ("pca/2", pca(ARRAYS["matrix"])),
    "ties kept beyond k": lambda: ("topk-cpu/ties", {"value": ARRAYS["tied4"]}),
    "≥ for > at θ": lambda: ("jump/theta", {"value": np.where(X >= THETA, X, 0)}),
    "NaN": lambda: ("kl/1d", {"value": np.array(math.nan)}),
    "NaN in an exact result": lambda: ("relu/zeros", {"value": np.full((1, 8), math.nan)}),
    "infinity": lambda: ("kl/1d", {"value": np.array(math.inf)}),
    "another shape": lambda: ("kl/1d", {"value": np.asarray([kl(P, Q)])}),
    "empty list": lambda: ("topk/sparse", {"indices": np.zeros(0), "values": np.zeros(0)}),
    "sparse in ascending order": lambda: ("topk/sparse", {"indices": np.arange(2), "values": np.array([1.0, 2.0])}),
    "no results": lambda: ("kl/1d", {}),
}


@pytest.mark.parametrize("name", [*RIGHT, *PLANTED])
def test_numpy_passes_and_a_planted_fault_fails(name: str) -> None:
    call, values = (RIGHT | PLANTED)[name]()
    results = compare_call(ROWS[call], values, held_to().truths[call, None])
    assert all(result.status is Status.PASS for result in results) == (name in RIGHT)


def spoilt(*calls: Answered, of: Calls = STORED) -> Calls:
    """The release's answers, some of them others."""
    new = {call.id: call for call in calls}
    return of.model_copy(update={"calls": [new.get(call.id, call) for call in of.calls]})


def refused(call: str, message: str, outcome: str = "error") -> Answered:
    return Answered.model_validate({"id": call, "outcome": outcome, "results": [], "error": message})


def stored(call: str) -> Values:
    found = next(each for each in STORED.calls if each.id == call)
    return {result.name: result.array() for result in found.results}


def judged(calls: Calls) -> dict[str, CaseResult]:
    return {call.id.removeprefix("calls/"): call for call in judge_calls(calls, held_to()).results}


def times(call: str, factor: float) -> Answered:
    return answered(call, {name: value * factor for name, value in stored(call).items()})


WRONG_FILES: dict[str, dict[str, object]] = {
    "calls missing": {"calls": STORED.calls[1:]},
    "calls answered twice": {"calls": [*STORED.calls, STORED.calls[0]]},
    "unknown: kl/unheard-of": {"calls": [*STORED.calls, STORED.calls[0].model_copy(update={"id": "kl/unheard-of"})]},
    "another table": {"case": STORED.case.model_copy(update={"digest": "0" * 64})},
    "other inputs": {"inputs_digest": "0" * 64},
}


@pytest.mark.parametrize("message", WRONG_FILES)
def test_answers_to_something_else_are_refused(message: str) -> None:
    with pytest.raises(TraceError, match=message):
        judged(STORED.model_copy(update=WRONG_FILES[message]))


@pytest.mark.parametrize("outcome", ["error", "absent"])
def test_a_refusal_or_absence_that_is_not_listed_fails(outcome: str) -> None:
    found = judged(spoilt(refused("kl/1d", "no", outcome)))["kl/1d"]
    assert (found.status, found.unexplained) == (Status.FAIL, "this refusal is not known")


def test_where_pytorch_raises_a_refusal_is_right_and_a_number_or_a_panic_is_not() -> None:
    assert judged(spoilt(refused("token_prob/beyond", "out of range")))["token_prob/beyond"].status is Status.PASS
    number = spoilt(answered("token_prob/beyond", {"value": np.array(0.5)}))
    for calls in (number, spoilt(refused("token_prob/beyond", "panicked"))):
        assert judged(calls)["token_prob/beyond"].status is Status.FAIL
    ignored = judged(STORED)["attention/target-beyond"]
    assert ignored.explained and ignored.explained.ids == ["CMI112"]
    beyond = judged(spoilt(answered("attention/target-beyond", {"value": np.array(0.125)})))
    assert beyond["attention/target-beyond"].status is Status.FAIL


def test_nan_is_expected_where_pytorch_gives_nan_and_nowhere_else() -> None:
    truths = {call: truth for (call, formula), truth in held_to().truths.items() if formula is None}
    nan = {call for call, truth in truths.items() if any(np.isnan(each.value).any() for each in truth.values())}
    assert {call for call in nan if not call.endswith("nan")} == {
        *("attention/no-targets", "kl/infinite", "logit_diff/infinite", "token_prob/infinite"),
        *("pca/equal-rows", "steering/scale-to-nothing"),
        *(f"stoicheia-{of}/none" for of in ("neurons", "pairs", "accuracy", "surprise")),
    }
    row = np.full((1, 8), np.nan)
    assert judged(spoilt(answered("jump/nan", {"value": row})))["jump/nan"].status is Status.PASS
    row[0, 3] = 0.0
    found = judged(spoilt(answered("jump/nan", {"value": row})))["jump/nan"]
    assert (found.status, found.tensors[0].reason) == (Status.FAIL, "nonfinite")


KEPT, FLAT, TIES = (stored(call) for call in ("topk-auto/k-is-all", "top_changed/2d", "topk-cpu/small-ties"))
SECOND = ARRAYS["base2d"][1, 3] - ARRAYS["other2d"][1, 3]
SHAPES = "model error: shape mismatch in cmp, lhs: [1, 4], rhs: [1, 1]"
AS_KNOWN: dict[str, Answered] = {
    "terms left out": answered("kl/far", {"value": np.array(-0.0)}),
    "negative values kept": answered("topk-auto/k-is-all", KEPT),
    "flattened tokens": answered("top_changed/2d", FLAT),
    "refused": refused("topk-gpu/spread", SHAPES),
    "absent": refused("position_delta/0", "", "absent"),
}
ON_TOP: dict[str, Answered] = {
    "nearly what is known": answered("kl/far", {"value": np.array(1e-7)}),
    "NaN kept": answered("steering/set-nan", {"value": np.nan * stored("steering/set-nan")["value"]}),
    "weights in another order": answered("steering/set-nan", {"value": np.flip(stored("steering/set-nan")["value"])}),
    "another wrong number": answered("kl/far", {"value": np.array(29.0)}),
    "NaN": answered("kl/far", {"value": np.array(math.nan)}),
    "one negative value not kept": answered("topk-auto/k-is-all", {"value": np.maximum(KEPT["value"], -2.5)}),
    "another of the ties dropped": answered("topk-cpu/small-ties", {"value": np.flip(TIES["value"])}),
    "a probability of another token": answered("top_changed/2d", FLAT | {"ablated": np.flip(FLAT["ablated"])}),
    "the second position": answered("logit_diff/2d", {"value": SECOND}),
    "computed, not refused": answered("topk-gpu/spread", {"value": 2 * stored("topk-cpu/spread")["value"]}),
    "more words": refused("topk-gpu/spread", f"{SHAPES}!"),
    "other shapes": refused("topk-gpu/spread", SHAPES.replace("[1, 1]", "[2, 1]")),
    "refused, not computed": refused("kl/far", SHAPES),
}


@pytest.mark.parametrize("name", AS_KNOWN)
def test_what_is_known_is_known(name: str) -> None:
    answer = AS_KNOWN[name]
    older = STORED.candle_mi.model_copy(update={"version": "0.1.10"})
    calls = spoilt(answer).model_copy(update={"candle_mi": older})
    assert judged(calls)[answer.id].status is Status.KNOWN


@pytest.mark.parametrize("name", ON_TOP)
def test_a_fault_on_top_of_what_is_known_fails(name: str) -> None:
    found = judged(spoilt(ON_TOP[name]))[ON_TOP[name].id]
    assert found.status is Status.FAIL and found.unexplained.startswith("not CMI1")


def held(calls: Calls, source: str = "registry") -> RunResult:
    result = run_of(case("llama/hub"))
    identity = STORED.candle_mi.model_copy(update={"source": source})
    report_outdated(judge_calls(calls, held_to()), held_to(), identity, result)
    return result


@pytest.mark.thorough
def test_what_agrees_though_it_is_listed_is_stale_and_of_a_checkout_gone() -> None:
    fixed = spoilt(answered("kl/far", right("kl/far")), answered("logit_diff/2d", right("logit_diff/2d")))
    assert held(STORED).stale == [] and held(STORED, "path").gone == {}
    first, second = held(fixed).stale
    assert first.startswith("CMI101 is listed for candle-mi 0.2.2, but calls/logit_diff/2d agree")
    assert second.startswith("CMI103") and held(fixed).verdict is Verdict.FAIL
    assert held(fixed, "path").gone == {"CMI103": ["calls/kl/far"]}  # of CMI101 another call is left


def test_a_checkout_is_held_to_the_release_before_it() -> None:
    checkout = STORED.candle_mi.model_copy(update={"version": "0.2.3-dev", "source": "path"})
    assert judged(STORED.model_copy(update={"candle_mi": checkout}))["kl/far"].status is Status.KNOWN


BAD_ROWS: dict[str, dict[str, object]] = {
    "CMI103 explains nothing: terms-below-1e-10-left-out gives the right value of kl/1d": {"calls": ["kl/1d"]},
    "CMI103: there is no call kl/nowhere": {"calls": ["kl/nowhere"]},
    "CMI103 and CMI104 overlap: both explain sample/tie": {"calls": ["sample/tie"]},
    "CMI103: kl/far: kl_divergence has no formula last-of-equal": {"formula": "last-of-equal"},
    "CMI103: give `formula`": {"formula": None},
    "is not a regular expression": {"refuses": "("},
    "id given twice: CMI104": {"id": "CMI104"},
    "should match pattern": {"id": "CMI003"},
}


@pytest.mark.every(4)
@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_row_that_cannot_be_is_an_error_that_names_it(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the calls of two functions alone: the truths of all take minutes."""
    table = load_calls()
    few = [row for row in table.call if row.id.startswith(("kl/", "sample/"))]
    monkeypatch.setattr(calls_judge, "load_calls", lambda: table.model_copy(update={"call": few}))
    rows = [row.model_dump() for row in load_known_calls().known if row.id in ("CMI103", "CMI104")]
    spoilt_rows = [row | (BAD_ROWS[message] if row["id"] == "CMI103" else {}) for row in rows]
    with pytest.raises((ValueError, ExplanationError), match=re.escape(message)):
        expectations(tmp_path, KnownCalls.model_validate({"known": spoilt_rows}))


@pytest.mark.parametrize("given", [{"values": [0.1]}, {"shape": [1]}])
def test_a_half_precision_input_is_rounded(given: dict[str, Any]) -> None:
    whole, half = (InputTensor(**given, half=half).array() for half in (False, True))
    assert whole.dtype == np.float32 and half.dtype == np.float16
    assert half == whole.astype(np.float16) and half != whole


def test_truths_that_are_computed_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, said = load_calls(), list[str]()
    few = [row for row in table.call if row.id in ("kl/2d", "kl/3d")]
    monkeypatch.setattr(calls_judge, "load_calls", lambda: table.model_copy(update={"call": few}))
    monkeypatch.setattr("candle_mi_parity.coverage.calls_truth.truth_of", lambda *_: {})
    for _ in range(2):
        expectations(tmp_path, KnownCalls(), said.append)
    assert said == ["truth of direct call 1 of 2: kl/2d", "truth of direct call 2 of 2: kl/3d"], "once, then cached"


HALVED = [times(call, 0.5) for call in ("kl/1d", "kl/2d", "kl/3d")]


def test_a_run_judges_calls_and_fails_where_a_function_is_broken(tmp_path: Path) -> None:
    release = StoredRelease(INDEX).release

    def ran(calls: Calls | None, *cases: str) -> RunResult:
        document = {} if calls is None else calls.model_dump()
        digest = write_named(tmp_path / "traces" / "calls", json.dumps(document))
        write_index(tmp_path, release.model_copy(update={"calls": digest}))
        return run_cases(RunOptions(f"stored:{tmp_path}", cases), [], {}, Progress())

    honest, broken, torn = ran(STORED), ran(spoilt(*HALVED)), ran(None)
    assert honest.sections["calls"].line() == "950 of 1139 direct calls agree, 189 do not for 67 known causes"
    assert [call.id for call in broken.sections["calls"].new] == ["calls/kl/1d", "calls/kl/2d", "calls/kl/3d"]
    assert [call.status for call in torn.sections["calls"].results] == [Status.ERROR]
    assert "calls" not in ran(STORED, "llama/*").sections
    other = ran(STORED.model_copy(update={"candle_mi": STORED.candle_mi.model_copy(update={"version": "0.1.24"})}))
    assert "answered by candle-mi 0.1.24" in other.sections["calls"].results[0].error
    write_index(tmp_path, release.model_copy(update={"calls": None}))
    left_out = run_cases(RunOptions(f"stored:{tmp_path}"), [], {}, Progress())
    assert "no answers are stored" in left_out.sections["calls"].skipped


def reported(calls: Calls) -> RunResult:
    result = run_of(case("llama/hub"))
    result.sections["calls"] = judge_calls(calls, held_to()).direct
    return result


def test_the_verdict_counts_calls_and_every_view_names_a_broken_function() -> None:
    def views(result: RunResult) -> list[str]:
        pages = [views_ci.junit(result), views_ci.summary(result), page.render(result)]
        lines = [shown(partial(tables.run_tables, result)), "".join(views_ci.workflow_commands(result))]
        return [*pages, *lines, json.dumps(report_model.document(result))]

    honest, broken = reported(STORED), reported(spoilt(*HALVED))
    assert run_of(case("llama/hub")).verdict is Verdict.PASS
    assert (honest.verdict, broken.verdict) == (Verdict.KNOWN, Verdict.FAIL)
    assert "3 direct calls fail" in broken.line()
    assert ["calls/kl/1d" in view for view in views(honest)] == [True, False, False, False, False, True]
    assert all("calls/kl/1d" in view for view in views(broken))


def worse(a: Calls, b: Calls) -> list[str]:
    found = diff_calls(judge_calls(a, held_to()), judge_calls(b, held_to()), held_to())
    diff = Diff("A", "B", {}, {}, {}, found)
    assert diff.verdict is (Verdict.FAIL if diff.worse else Verdict.PASS)
    return [f"{call.id}: {'; '.join(call.worse)}" for call in diff.worse]


def test_failing_calls_of_two_functions_are_two_causes() -> None:
    """Their results have one name, value."""
    ids = ("calls/to/first", "calls/to/last", "calls/vectors/layers")
    found = grouped(case(id, Status.FAIL, "value") for id in ids)
    assert sorted(len(group) for group in found) == [1, 2]


@pytest.mark.thorough
def test_a_diff_compares_calls() -> None:
    halved = spoilt(*HALVED)
    assert worse(STORED, STORED) == worse(halved, STORED) == worse(halved, halved) == []
    assert [line.partition(" at ")[0] for line in worse(STORED, halved)] == [
        f"calls/{answer.id}: agrees → diverges" for answer in HALVED
    ]
    further = worse(spoilt(times("kl/1d", 0.9)), spoilt(times("kl/1d", 0.5)))
    assert len(further) == 1 and "value diverges by" in further[0]
    unexplained = worse(STORED, spoilt(answered("kl/far", {"value": np.array(29.0)})))
    assert len(unexplained) == 1 and "now it is not explained: not CMI103" in unexplained[0]
    absent = worse(STORED, spoilt(refused("position_delta/0", "", "absent")))
    assert absent == ["calls/position_delta/0: agrees → refused: candle-mi 0.2.2 has no position_delta"]
