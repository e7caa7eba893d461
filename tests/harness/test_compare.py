"""The comparison: what is refused before any number, what is counted, and what a message says."""

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

SCORES = "blocks.0.attn.hook_scores"


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


def test_a_message_has_index_values_and_errors(tmp_path: Path) -> None:
    there, name = real("llama/hub"), "blocks.1.mlp.hook_post"
    array = there.arrays[name]
    array[0, 5, 7] += 1e-3
    found = first(planted(tmp_path, there, **{name: array}))
    assert found.worst is not None and found.worst.index == [0, 5, 7] and found.past == 1
    assert found.worst.got == array[0, 5, 7]
    assert found.worst.expected == pytest.approx(there.truth.tensors[name].value[0, 5, 7], rel=1e-12)
    parts = "batch 0, position 5, entry 7 got|expected|absolute|relative|ULP|noise|(gate 32)|(gate 8)|inputs agreed"
    for part in (name, *parts.split("|"), "1 of 1536 past the gate"):
        assert part in found.message(), part


def test_a_divergence_that_may_be_inherited_says_that_its_inputs_differ(tmp_path: Path) -> None:
    there = real("llama/hub")
    arrays = {
        name: there.arrays[name] * np.float32(1.01) for name in ("blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post")
    }
    results = {result.name: result for result in planted(tmp_path, there, **arrays)}
    assert results["blocks.1.mlp.hook_pre"].inputs_agreed is True
    assert results["blocks.1.mlp.hook_post"].inputs_agreed is False
    assert "inputs DIFFER" in results["blocks.1.mlp.hook_post"].message()


def judged_logits(value: np.ndarray, got: np.ndarray) -> dict[str, TensorResult]:
    """Judge logits by a truth with a noise of 3e-7."""
    truth = Truth([[1]], {"logits": TruthTensor(value, np.full_like(value, 3e-7))}, meta={"mode": "free"})
    dump = InMemory({"logits": (got.astype(np.float32), None)}, "float32", {}, [])
    return {result.name: result for result in compare(truth, dump, None, None)}


@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_ten_likeliest_tokens_of_every_row_are_judged(row: int) -> None:
    """The tenth and the twentieth token of one row are exchanged at the last position."""
    value = np.random.default_rng(0).standard_normal((3, 4, 64))
    got, order = value.copy(), np.argsort(-value[row, -1])
    got[row, -1, order[[9, 19]]] = value[row, -1, order[[19, 9]]]
    found = judged_logits(value, got)["logits.top10_last_pos"]
    assert (found.status, found.past, found.compared) == (Status.FAIL, 1, 30), found.message()


@pytest.mark.parametrize(("gap", "status"), [(1e-8, Status.PASS), (1e-3, Status.FAIL)])
def test_a_next_token_may_differ_only_at_a_tie(gap: float, status: Status) -> None:
    value = np.random.default_rng(0).standard_normal((1, 3, 50))
    value[0, 2, 7], value[0, 2, 9] = 5.0, 5.0 - gap
    got = value.copy()
    got[0, 2, 7], got[0, 2, 9] = 5.0, np.nextafter(np.float32(5), np.float32(6))
    found = judged_logits(value, got)["logits.next_token"]
    assert found.status is status and found.past == (status is Status.FAIL), found.message()
