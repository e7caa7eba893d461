"""The comparison: what is refused before any number, what is counted, and what a message says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.diagnose import diagnose
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status, TensorResult
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files import chunks
from candle_mi_parity.spec.cases import RandomTokens
from candle_mi_parity.spec.hook_points import place
from candle_mi_parity.trace.trace import InMemory
from candle_mi_parity.trace.truth import Truth, TruthTensor
from tests.support.planting import (
    Arrays,
    Edit,
    Real,
    changed_model,
    compare_trace,
    failures,
    first,
    planted,
    real,
    real_of,
    rerun,
    write,
)

SCORES = "blocks.0.attn.hook_scores"


def header(**change: object) -> Edit:
    return lambda document: document["header"].update(change)


HEADERS: dict[str, tuple[Edit, str]] = {
    "another case": (lambda document: document["header"]["case"].update(digest="0" * 64), "case digest"),
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


def test_the_number_of_compared_tensors_is_reported(tmp_path: Path) -> None:
    results = compare_trace(real("llama/hub"), write(tmp_path, real("llama/hub")))
    truth = list(real("llama/hub").truth.tensors)
    assert [result.name for result in results][: len(truth)] == truth and len(truth) >= 39
    run = run_of(results)
    assert run.verdict is Verdict.PASS and f"{len(results)} tensors compared" in run.line()
    assert RunResult("x", {}, {}, [], {}, []).verdict is run_of([]).verdict is Verdict.INCONCLUSIVE
    assert Verdict.INCONCLUSIVE.exit_code == 3


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


def judged_alone(name: str, value: np.ndarray, noise: float, got: np.ndarray) -> dict[str, TensorResult]:
    """Judge one tensor by a truth with the same noise everywhere."""
    truth = Truth([[1]], {name: TruthTensor(value, np.full_like(value, noise))}, meta={"mode": "free"})
    dump = InMemory({name: (got.astype(np.float32), None)}, "float32", {}, [])
    return {result.name: result for result in compare(truth, dump, None, None)}


def judged_logits(value: np.ndarray, got: np.ndarray) -> dict[str, TensorResult]:
    """Judge logits by a truth with a noise of 3e-7."""
    return judged_alone("logits", value, 3e-7, got)


@pytest.mark.parametrize(
    ("value", "got", "exact", "status"),
    [
        (5.02e-45, 2.0**-147, False, Status.PASS),  # float32's nearest: the noise was too small to be kept
        (5.02e-45, 2.0**-143, False, Status.FAIL),
        (2.0**-147, 2.0**-147, True, Status.PASS),
        (2.0**-147, 2.0**-148, True, Status.FAIL),
        (0.5, np.nextafter(np.float32(0.5), np.float32(1)), True, Status.FAIL),
    ],
)
def test_without_noise_only_what_float32_holds_must_be_equal_to_the_bit(
    value: float, got: float, exact: bool, status: Status
) -> None:
    shape = 1, 4, 8
    found = judged_alone("hook_embed", np.full(shape, value), 0.0, np.full(shape, got))["hook_embed"]
    assert (found.exact, found.status) == (exact, status)


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


# --- effects of a planted fault beside its first tensor; most faults are in validation/faults.toml


def square() -> Real:
    """Llama with as many positions as heads, where two axes of q have the same length."""
    case = real("llama/hub").subject.case
    return real_of(case.model_copy(update={"tokens": RandomTokens(random=4)}))


def test_equal_axes_swapped_are_caught_by_their_values(tmp_path: Path) -> None:
    there, name = square(), "blocks.0.attn.hook_q"
    found = there.arrays[name]
    assert found.shape == (1, 4, 4, 20)
    results = planted(tmp_path / "planted", there, **{name: np.ascontiguousarray(found.swapaxes(1, 2))})
    assert (first(results).name, first(results).reason) == (name, "values")
    assert not failures(planted(tmp_path / "twin", there))


def test_a_forced_run_leaves_a_fault_in_its_own_half_layer(tmp_path: Path) -> None:
    there = real("llama/hub", "forced")
    assert not failures(compare_trace(there, write(tmp_path / "twin", there)))
    model = changed_model(tmp_path / "model", there.subject.model_dir, rope_theta=500500.0)
    failed = failures(compare_trace(there, write(tmp_path / "planted", there, rerun(there, model))))
    scores, rest = "attn.hook_scores", {"attn.hook_pattern", "hook_attn_out", "hook_resid_mid"}
    assert [name for name in failed if name.endswith(scores)] == [f"blocks.{i}.{scores}" for i in range(3)]
    own = {name.partition(".")[2].partition(".")[2] for name in failed if name.startswith("blocks.")}
    assert own <= {scores} | rest, "a fault in attention was carried into the MLP or the next layer"


# --- a tensor in pieces gets the same result as the whole -----------------------------------------


WHOLE = 1 << 40
PIECES = {
    "blocks of a position": (1, WHOLE, WHOLE),
    "blocks of some positions": (500, WHOLE, WHOLE),
    "one chunk a position": (WHOLE, 1, 1),
    "chunks of some positions, in blocks of others": (300, 1000, 1),
}
"""Elements of a block, of a chunk of a file, and of a tensor that is read in chunks."""


def honest(arrays: Arrays) -> None:
    pass


def faulty(arrays: Arrays) -> None:
    """One wrong element at every tensor's last position, a weight that the mask forbids, NaN, and a wrong factor."""
    for array in arrays.values():
        array[..., -1, -1] += np.float32(0.01)
    arrays["blocks.1.attn.hook_pattern"][0, -1, 0, -1] = 1e-3
    arrays["blocks.1.hook_resid_mid"][0, 17, 3] = np.nan
    arrays["blocks.0.hook_attn_out"] *= np.float32(1.001)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("fault", [honest, faulty])
@pytest.mark.every(2)
def test_pieces_give_the_result_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: str, fault: Callable[[Arrays], None]
) -> None:
    there = real("gemma2/hub")
    arrays = there.arrays
    fault(arrays)
    path = write(tmp_path, there, arrays)
    results = [judged(there, path, monkeypatch, *sizes) for sizes in ((WHOLE,) * 3, PIECES[pieces])]
    assert _without_means(results[0]) == _without_means(results[1])
    for one, other in zip(*results, strict=True):
        assert one.rms_ratio == pytest.approx(other.rms_ratio, rel=1e-9)
        assert one.position_ratio == pytest.approx(other.position_ratio, rel=1e-9)


def judged(there: Real, path: Path, patch: pytest.MonkeyPatch, *sizes: int) -> list[TensorResult]:
    for name, size in zip(("BLOCK", "CHUNK", "LONG"), sizes, strict=True):
        patch.setattr(chunks, name, size)
    return compare_trace(there, path)


def _without_means(results: list[TensorResult]) -> list[str]:
    """Sums in another order differ in their last bit; as text, NaN equals NaN."""
    return [repr(replace(result, rms_ratio=0.0, position_ratio=0.0)) for result in results]


@pytest.mark.parametrize("size", [1, 7, 100, WHOLE])
@pytest.mark.parametrize("shape", [(1, 3), (5, 4), (2, 60, 3), (2, 3, 17, 5)], ids=str)
def test_blocks_cover_each_position_once(monkeypatch: pytest.MonkeyPatch, size: int, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(chunks, "BLOCK", size)
    positions = [*range(shape[-2])]
    assert [position for block in chunks.blocks(shape) for position in positions[block]] == positions


# --- the shape of an error is named if the data shows one -----------------------------------------


RNG = np.random.default_rng(0)
TRUTH = RNG.standard_normal((1, 4, 12, 8))
NOISE = np.full(TRUTH.shape, 1e-7)


WRONG = RNG.standard_normal(TRUTH.shape)
ONE, NAN = np.zeros(TRUTH.shape), np.zeros(TRUTH.shape)
ONE[0, 1, 2, 3], NAN[0, 1, 2, 3] = 1.0, np.nan


def within(*index: slice | list[int]) -> np.ndarray:
    """The truth, with errors at an index only."""
    got = TRUTH.copy()
    got[index] += WRONG[index]
    return got


ALL = slice(None)
SHAPES = {
    "non-finite": TRUTH + NAN,
    "one element": TRUTH + ONE,
    "heads permuted": TRUTH[:, [1, 0, 2, 3]],
    "constant factor": TRUTH * 1.001,
    "reduced precision: float16": TRUTH.astype(np.float16).astype(np.float64),
    "one head (2)": within(ALL, slice(2, 3)),
    "one position (5)": within(ALL, ALL, slice(5, 6)),
    "from position 8 on": within(ALL, ALL, slice(8, None)),
    "2 of 4 heads (0, 3)": within(ALL, [0, 3]),
    "2 of 4 heads (1, 2)": within(ALL, slice(1, 3)),
    "positions 2 to 7 of 12": within(ALL, ALL, slice(2, 8)),
    "6 of 12 positions (0, 2, 4, 6, 8, 10)": within(ALL, ALL, slice(0, None, 2)),
    "entries 0 to 3 of 8": within(ALL, ALL, ALL, slice(0, 4)),
    "2 of 4 heads (0, 1), from position 8 on, entries 2 to 5 of 8": within(
        ALL, slice(0, 2), slice(8, None), slice(2, 6)
    ),
    "spread": TRUTH + WRONG,
}


@pytest.mark.parametrize("kind", SHAPES)
def test_each_shape_is_named(kind: str) -> None:
    found = diagnose("blocks.0.attn.hook_q", SHAPES[kind], TRUTH, NOISE, None)
    assert found.shape.startswith(kind)
    assert (len(found.picture), len(found.picture[0]), found.column) == (12, 4, "head")


@pytest.mark.parametrize(
    ("rows", "phrase"),
    [([2], "batch row 2 of 3: one head (1)"), ([1, 2], "from batch row 1 on: one head (1)"), ([0, 1, 2], "one head")],
)
def test_every_row_of_a_batch_is_looked_at(rows: list[int], phrase: str) -> None:
    truth = np.concatenate([TRUTH, 2 * TRUTH, TRUTH - 1])
    got = truth.copy()
    got[rows, 1] += WRONG[0, 1]
    found = diagnose("blocks.0.attn.hook_q", got, truth, np.full(truth.shape, 1e-7), None)
    assert found.shape.startswith(phrase)
    assert max(max(row) for row in found.picture) > 2, "the picture is of a row that is wrong"


def test_the_axes_of_scores_are_queries_and_keys() -> None:
    truth = RNG.standard_normal((1, 4, 12, 12))
    got = truth.copy()
    got[:, 1:3, 8:, :4] += 1.0 + RNG.random((1, 2, 4, 4))
    found = diagnose("blocks.0.attn.hook_scores", got, truth, np.full(truth.shape, 1e-7), None)
    assert found.shape == "2 of 4 heads (1, 2), from query 8 on, keys 0 to 3 of 12"
    assert place("blocks.0.attn.hook_scores", [0, 1, 17, 4]) == "batch 0, head 1, query 17, key 4"
    assert place("blocks.1.hook_resid_post", [0, 1]) == "axis 0 at 0, axis 1 at 1"
