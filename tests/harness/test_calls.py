"""The comparison of direct calls fails on each planted fault."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest

from candle_mi_parity.coverage.calls import Answer, Answered, Calls, load_calls, read_calls
from candle_mi_parity.coverage.calls_compare import KnownCall, KnownCalls, fault, judge_calls, load_known_calls
from candle_mi_parity.coverage.calls_truth import CallTruth, truth_of
from candle_mi_parity.errors import ExplanationError, TraceError
from candle_mi_parity.spec.paths import ROOT, cache_root

TABLE = load_calls()
ROWS = {row.id: row for row in TABLE.call}
ARRAYS = {name: array.astype(np.float64) for name, array in TABLE.arrays().items()}
STORED = read_calls(ROOT / "rust_outputs" / "0.2.2" / "calls.json")
Values = dict[str, np.ndarray]


@functools.cache
def truth(call: str) -> CallTruth:
    return truth_of(ROWS[call], TABLE, cache_root())


def answered(call: str, values: Values) -> Answered:
    words = {math.inf: "inf", -math.inf: "-inf"}
    results = []
    for name, value in values.items():
        flat = [float(one) for one in np.ravel(value)]
        told = ["nan" if math.isnan(one) else words.get(one, one) for one in flat]
        results.append(Answer.model_validate({"name": name, "shape": list(np.shape(value)), "values": told}))
    return Answered(id=call, outcome="results", results=results, error=None)


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
    return {
        "components": -rows[:2],
        "eigenvalues": scales[:2] ** 2,
        "explained": scales[:2] ** 2 / (scales**2).sum(),
    }


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
    "mask transposed": lambda: ("causal/4", {"value": truth("causal/4").values["value"].swapaxes(-1, -2)}),
    "knockout transposed": lambda: (
        "knockout/all-heads",
        {"value": truth("knockout/all-heads").values["value"].swapaxes(-1, -2)},
    ),
    "PCA not centred": lambda: ("pca/2", pca(ARRAYS["matrix"])),
    "ties kept beyond k": lambda: ("topk-cpu/ties", {"value": ARRAYS["tied4"]}),
    "≥ for > at θ": lambda: ("jump/theta", {"value": np.where(X >= THETA, X, 0)}),
    "NaN": lambda: ("kl/1d", {"value": np.array(math.nan)}),
    "NaN in an exact result": lambda: ("relu/zeros", {"value": np.full((1, 8), math.nan)}),
    "infinity": lambda: ("kl/1d", {"value": np.array(math.inf)}),
    "another shape": lambda: ("kl/1d", {"value": np.asarray([kl(P, Q)])}),
    "empty list": lambda: ("topk/sparse", {"indices": np.zeros(0), "values": np.zeros(0)}),
    "sparse in ascending order": lambda: (
        "topk/sparse",
        {"indices": np.array([0, 1]), "values": np.array([1.0, 2.0])},
    ),
    "no results": lambda: ("kl/1d", {}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_numpy_passes(name: str) -> None:
    call, values = RIGHT[name]()
    assert fault(ROWS[call], answered(call, values), truth(call)) == ""


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_fails(name: str) -> None:
    call, values = PLANTED[name]()
    assert fault(ROWS[call], answered(call, values), truth(call)) != ""


def judged(calls: list[Answered], known: KnownCalls | None = None) -> dict[str, str]:
    document = Calls(**(dict(STORED) | {"calls": calls}))
    found = judge_calls(TABLE, document, lambda row: truth(row.id), known or load_known_calls())
    return {verdict.id: verdict.status for verdict in found}


@pytest.mark.parametrize("calls", [STORED.calls[1:], [*STORED.calls, STORED.calls[0]], []])
def test_missing_or_doubled_call(calls: list[Answered]) -> None:
    with pytest.raises(TraceError, match=r"calls (missing|answered twice)"):
        judged(calls)


def test_unknown_call() -> None:
    extra = STORED.calls[0].model_copy(update={"id": "kl/unheard-of"})
    with pytest.raises(TraceError, match="unknown: kl/unheard-of"):
        judged([*STORED.calls, extra])


def test_a_refusal_or_absence_that_is_not_listed_fails() -> None:
    for outcome in ("error", "absent"):
        spoilt = STORED.calls[0].model_copy(update={"outcome": outcome, "results": [], "error": "no"})
        assert judged([spoilt, *STORED.calls[1:]])[spoilt.id] == "FAIL"


def test_unlisted_divergence_fails_and_stale_entry_fails() -> None:
    known = load_known_calls()
    assert judged(STORED.calls, KnownCalls(absent=known.absent))["sample/tie"] == "FAIL"
    stale = KnownCall(call="kl/1d", versions=["0.2.2"], kind="wrong number", fault="none", why="planted")
    assert judged(STORED.calls, KnownCalls(known=[*known.known, stale]))["kl/1d"] == "STALE"
    with pytest.raises(ExplanationError, match="lacks"):
        judged(STORED.calls, KnownCalls(known=[stale.model_copy(update={"call": "nowhere"})]))


@pytest.mark.parametrize("value, status", [(0.0, "KNOWN"), (1e-7, "FAIL"), (29.0, "FAIL"), (math.nan, "FAIL")])
def test_a_known_call_may_be_wrong_by_what_is_known_only(value: float, status: str) -> None:
    spoilt = answered("kl/far", {"value": np.array(value)})
    calls = [spoilt if answer.id == "kl/far" else answer for answer in STORED.calls]
    assert judged(calls)["kl/far"] == status


def test_another_table_is_refused() -> None:
    other = STORED.model_copy(update={"case": STORED.case.model_copy(update={"digest": "0" * 64})})
    with pytest.raises(TraceError, match="another table"):
        judge_calls(TABLE, other, lambda row: truth(row.id), load_known_calls())


def test_answers_on_other_inputs_are_refused() -> None:
    other = STORED.model_copy(update={"inputs_digest": "0" * 64})
    with pytest.raises(TraceError, match="other inputs"):
        judge_calls(TABLE, other, lambda row: truth(row.id), load_known_calls())
