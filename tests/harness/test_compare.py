"""The comparison: what is refused before any number, what a message says, and what a mean over all would hide.

Truths with a large vocabulary or a massive activation, which the tiny models do not have, are synthetic.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status, TensorResult
from candle_mi_parity.errors import TraceError
from candle_mi_parity.trace.trace import InMemory
from candle_mi_parity.trace.truth import Truth, TruthTensor
from tests.support.planting import Arrays, Edit, compare_trace, failures, first, planted, real, write

SCORES, PATTERN = "blocks.0.attn.hook_scores", "blocks.0.attn.hook_pattern"


def header(**change: object) -> Edit:
    return lambda document: document["header"].update(change)


def other_case(document: dict[str, Any]) -> None:
    document["header"]["case"]["digest"] = "0" * 64


HEADERS: dict[str, tuple[Edit, str]] = {
    "another case": (other_case, "case digest"),
    "other weights": (header(model_digest="0" * 64), "model digest"),
    "an SAE where there is none": (header(sae_digest="0" * 64), "SAE digest"),
    "inputs where there are none": (header(inputs_digest="0" * 64), "inputs digest"),
    "another dtype": (header(dtype="float16"), "dtype is float16, expected float32"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_trace_of_something_else_is_refused_before_any_number(tmp_path: Path, name: str) -> None:
    edit, text = HEADERS[name]
    there = real("llama/hub")
    with pytest.raises(TraceError, match=f"{text}.*this trace is of something else"):
        compare_trace(there, write(tmp_path / "planted", there, edit=edit))
    assert not failures(compare_trace(there, write(tmp_path / "twin", there)))


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda ids: ids[1:], "token ids differ: the reference has BOS at 0, the candidate does not"),
        (lambda ids: [1, *ids], "token ids differ: the candidate's BOS is doubled"),
        (lambda ids: [*ids[:-1], 9], "token ids differ; expected"),
        (lambda ids: ids[:-1], "token ids differ; expected"),
        (lambda ids: [], "token ids differ; expected"),
    ],
)
def test_other_tokens_are_refused_with_both_lists(
    tmp_path: Path, change: Callable[[list[int]], list[int]], text: str
) -> None:
    there = real("llama/hub")
    (ids,) = there.subject.tokens
    path = write(tmp_path, there, edit=lambda document: document.update(tokens=[change(ids)]))
    with pytest.raises(TraceError) as caught:
        compare_trace(there, path)
    message = str(caught.value)
    assert text in message and "\n" not in message
    assert str(ids) in message and str(change(ids)) in message
    with pytest.raises(TraceError, match="token ids differ"):
        compare_trace(there, write(tmp_path, there, edit=lambda document: document.update(tokens=[])))


def run_of(results: list[TensorResult]) -> RunResult:
    bad = any(result.status is Status.FAIL for result in results)
    case = CaseResult("a/b", "a", "0" * 64, Status.FAIL if bad else Status.PASS, "command", results)
    case.expected = len(results)
    return RunResult("x", {}, {}, [case], {}, [])


NOTHING: dict[str, Callable[[Arrays], Arrays]] = {
    "no tensor": lambda arrays: {},
    "all names in capitals": lambda arrays: {name.upper(): array for name, array in arrays.items()},
    "all without an element": lambda arrays: {name: array[..., :0] for name, array in arrays.items()},
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_compared_fails_and_is_counted(tmp_path: Path, name: str) -> None:
    there = real("llama/hub")
    results = compare_trace(there, write(tmp_path, there, NOTHING[name](there.arrays)))
    run = run_of(results)
    assert run.verdict is Verdict.FAIL and run.verdict.exit_code != 0
    assert "0 tensors compared" in run.line()
    assert all(result.status is Status.FAIL and not result.compared for result in results)


def test_no_case_and_no_tensor_is_inconclusive() -> None:
    assert RunResult("x", {}, {}, [], {}, []).verdict is Verdict.INCONCLUSIVE
    assert run_of([]).verdict is Verdict.INCONCLUSIVE
    assert Verdict.INCONCLUSIVE.exit_code == 3


def test_the_number_of_compared_tensors_is_reported(tmp_path: Path) -> None:
    results = compare_trace(real("llama/hub"), write(tmp_path, real("llama/hub")))
    truth = list(real("llama/hub").truth.tensors)
    assert [result.name for result in results][: len(truth)] == truth and len(truth) >= 39
    run = run_of(results)
    assert run.verdict is Verdict.PASS and f"{len(results)} tensors compared" in run.line()


@pytest.mark.parametrize("garbage", [-1e5, float(np.finfo(np.float32).min), 3.0])
def test_masked_scores_are_left_out_and_counted(tmp_path: Path, garbage: float) -> None:
    there = real("llama/hub")
    scores = there.arrays[SCORES]
    scores[..., np.triu(np.ones((24, 24), bool), 1)] = garbage
    results = planted(tmp_path, there, **{SCORES: scores})
    assert not failures(results)
    (result,) = [result for result in results if result.name == SCORES]
    assert (result.compared, result.left_out) == (4 * 300, 4 * 276)


def test_a_pattern_that_sees_the_future_fails(tmp_path: Path) -> None:
    there = real("llama/hub")
    pattern = there.arrays[PATTERN]
    pattern[0, 1, 2] = 1 / 24
    found = first(planted(tmp_path, there, **{PATTERN: pattern}))
    assert (found.name, found.reason) == (PATTERN, "masked")
    assert found.worst is not None and found.worst.index == [0, 1, 2, 3] and found.past == 21


def test_a_message_has_index_values_and_errors(tmp_path: Path) -> None:
    there, name = real("llama/hub"), "blocks.1.mlp.hook_post"
    array = there.arrays[name]
    array[0, 5, 7] += 1e-3
    found = first(planted(tmp_path, there, **{name: array}))
    assert found.worst is not None and found.worst.index == [0, 5, 7] and found.past == 1
    assert found.worst.got == array[0, 5, 7]
    assert found.worst.expected == pytest.approx(there.truth.tensors[name].value[0, 5, 7], rel=1e-12)
    for part in (
        name,
        "batch 0, position 5, entry 7 got",
        "expected",
        "absolute",
        "relative",
        "ULP",
        "noise",
        "(gate 32)",
        "(gate 8)",
    ):
        assert part in found.message(), part
    assert "1 of 1536 past the gate" in found.message() and "inputs agreed" in found.message()


def test_a_divergence_that_may_be_inherited_says_that_its_inputs_differ(tmp_path: Path) -> None:
    there = real("llama/hub")
    arrays = {
        name: there.arrays[name] * np.float32(1.01) for name in ("blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post")
    }
    results = {result.name: result for result in planted(tmp_path, there, **arrays)}
    assert results["blocks.1.mlp.hook_pre"].inputs_agreed is True
    assert results["blocks.1.mlp.hook_post"].inputs_agreed is False
    assert "inputs DIFFER" in results["blocks.1.mlp.hook_post"].message()


def synthetic(name: str, value: np.ndarray) -> tuple[Truth, np.ndarray]:
    """A truth of one tensor with noise 3e-7 of each position's size, and an honest candidate."""
    size = np.sqrt(np.square(value).mean(-1, keepdims=True))
    noise = np.broadcast_to(3e-7 * size, value.shape)
    honest = value + noise * np.random.default_rng(1).standard_normal(value.shape)
    return Truth([[1]], {name: TruthTensor(value, noise)}, meta={"mode": "free"}), honest.astype(np.float32)


def judge_one(truth: Truth, array: np.ndarray) -> TensorResult:
    name = next(iter(truth.tensors))
    results = compare(truth, InMemory({name: (array, None)}, "float32", {}, []), None, None)
    assert results[0].name == name
    return results[0]


@pytest.mark.parametrize("index", [0, 31000, 49151])
def test_one_of_49152_logits_1_percent_off_is_caught(index: int) -> None:
    truth, array = synthetic("logits", np.random.default_rng(0).standard_normal((1, 4, 49152)) + 2)
    assert judge_one(truth, array).status is Status.PASS
    array[0, 3, index] *= 1.01
    result = judge_one(truth, array)
    assert result.status is Status.FAIL and result.past == 1
    assert result.worst is not None and result.worst.index == [0, 3, index]


@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_ten_likeliest_tokens_of_every_row_are_judged(row: int) -> None:
    """The tenth and the twentieth token of one row are exchanged at the last position."""
    truth, array = synthetic("logits", np.random.default_rng(0).standard_normal((3, 4, 64)))
    order = np.argsort(-array[row, -1])
    array[row, -1, order[[9, 19]]] = array[row, -1, order[[19, 9]]]
    results = compare(truth, InMemory({"logits": (array, None)}, "float32", {}, []), None, None)
    found = {result.name: result for result in results}["logits.top10_last_pos"]
    assert (found.status, found.past, found.compared) == (Status.FAIL, 1, 30), found.message()


def test_a_position_beside_a_massive_activation_is_judged_by_its_own_size() -> None:
    value = np.random.default_rng(0).standard_normal((1, 24, 64))
    value[0, 1] *= 500
    truth, array = synthetic("blocks.0.hook_resid_post", value)
    assert judge_one(truth, array).status is Status.PASS
    array[0, 7] *= np.float32(1 + 1e-4)
    result = judge_one(truth, array)
    assert result.status is Status.FAIL, result.message()
    assert result.rms_ratio < 8, "a mean over all positions would have seen it too: the case excites nothing"


@pytest.mark.parametrize(("gap", "status"), [(1e-8, Status.PASS), (1e-3, Status.FAIL)])
def test_a_next_token_may_differ_only_at_a_tie(gap: float, status: Status) -> None:
    value = np.random.default_rng(0).standard_normal((1, 3, 50))
    value[0, 2, 7], value[0, 2, 9] = 5.0, 5.0 - gap
    truth, array = synthetic("logits", value)
    array[0, 2, 7], array[0, 2, 9] = 5.0, np.nextafter(np.float32(5), np.float32(6))
    results = compare(truth, InMemory({"logits": (array, None)}, "float32", {}, []), None, None)
    found = {result.name: result for result in results}
    assert found["logits.next_token"].status is status, found["logits.next_token"].message()
    assert found["logits.next_token"].past == (status is Status.FAIL)
