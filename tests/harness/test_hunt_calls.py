"""The hunt in direct calls finds planted faults in their smallest form, also behind known ones, and nothing else."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.candidate.sources import LiveSource, open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.hunt_result import Cause, Tally
from candle_mi_parity.coverage.calls import Answered, CallRow, CallTable, InputTensor, SaeRow, TranscoderRow
from candle_mi_parity.coverage.calls_truth import computation
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.hunt.call_caches import GENERATED
from candle_mi_parity.hunt.call_truth import Expected, expected
from candle_mi_parity.hunt.callees import Emitted, TorchCallee, answered, refused, write_inputs
from candle_mi_parity.hunt.calls import Judged, KnownOf, hunt_calls, judge
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.truth import TruthTensor

KNOWN = KnownOf.release("0.2.2")
NOTHING = KnownOf()


class Fake(TorchCallee):
    """PyTorch with a planted fault: a function of a call and its right answer."""

    def __init__(self, fault: Callable[[CallTable, Path, Answered], Answered]) -> None:
        super().__init__()
        self._fault = fault

    def answer(self, table: CallTable, directory: Path) -> Answered:
        return self._fault(table, directory, super().answer(table, directory))


def by_formula(formula: Formula) -> Callable[[CallTable, Path, Answered], Answered]:
    def fault(table: CallTable, directory: Path, right: Answered) -> Answered:
        finite = all(np.isfinite(array).all() for array in table.arrays().values())
        if right.outcome != "results" or not finite:
            return right
        values = computation(table.call[0], table.arrays(), directory, (formula,), table=table)()
        return answered({name: value.float().double().numpy() for name, value in values.items()})

    return fault


def hunt(
    callee: TorchCallee, functions: str, tmp_path: Path, known: KnownOf = NOTHING, examples: int = 60
) -> tuple[Tally, list[Cause]]:
    return hunt_calls(callee, "", 7, examples, tmp_path, known=known, functions=functions)


def test_pytorch_in_float32_agrees_with_itself(tmp_path: Path) -> None:
    tally, causes = hunt(TorchCallee(), "*", tmp_path, examples=60)
    assert not causes
    assert tally.agree > 30


@pytest.mark.thorough
def test_pytorch_in_float32_agrees_with_itself_in_many_calls(tmp_path: Path) -> None:
    tally, causes = hunt(TorchCallee(), "*", tmp_path, examples=5000)
    assert not causes
    assert tally.unmeasured < 50


@pytest.mark.rust
@pytest.mark.thorough
def test_nothing_new_is_found_in_the_newest_release(tmp_path: Path) -> None:
    source = open_source(parse_candidate("0.2.2"), cache_root(), tmp_path, print)
    assert isinstance(source, LiveSource)
    with source:
        tally, causes = hunt_calls(Emitted(source, tmp_path / "calls.json"), "0.2.2", 1, 2000, tmp_path)
    assert not causes
    assert {"CMI101", "CMI104", "CMI112", "CMI113", "CMI117", "CMI119"} <= set(tally.known)


def test_the_last_of_equal_logits_is_found(tmp_path: Path) -> None:
    _, [cause] = hunt(Fake(by_formula(Formula.LAST_OF_EQUAL)), "sample_token", tmp_path)
    assert (cause.what, cause.first, cause.reason) == ("sample_token", "token", "values")
    assert cause.smallest["tensors"] == {"a": {"values": [0.0, 0.0]}}
    assert cause.detail == "token is 1.0, PyTorch gives 0.0"


def test_a_known_formula_is_subtracted_and_a_fault_behind_it_is_found(tmp_path: Path) -> None:
    def behind(table: CallTable, directory: Path, right: Answered) -> Answered:
        if np.array_equal(table.arrays()["a"], [2.0]):
            return answered({"token": np.array(3.0)})
        return by_formula(Formula.LAST_OF_EQUAL)(table, directory, right)

    tally, causes = hunt(Fake(by_formula(Formula.LAST_OF_EQUAL)), "sample_token", tmp_path, KNOWN)
    assert not causes
    assert tally.known["CMI104"] > 5
    _, [cause] = hunt(Fake(behind), "sample_token", tmp_path, KNOWN, examples=300)
    assert cause.smallest["tensors"] == {"a": {"values": [2.0]}}


@pytest.mark.thorough
def test_terms_left_out_of_a_divergence_are_found(tmp_path: Path) -> None:
    def kl(table: CallTable, directory: Path, right: Answered) -> Answered:
        a, b = (table.arrays()[name].astype(np.float64) for name in "ab")
        if right.outcome != "results" or not (np.isfinite(a).all() and np.isfinite(b).all()) or a.ndim > 1:
            return right
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (a, b))
        with np.errstate(all="ignore"):
            return answered({"value": np.where(q > 0.05, p * np.log(p / q), 0.0).sum(keepdims=True)[0]})

    _, causes = hunt(Fake(kl), "kl_divergence", tmp_path, KNOWN, examples=100)
    assert causes[0].reason == "values"
    assert all(len(values["values"]) == 2 for values in causes[0].smallest["tensors"].values())


def test_a_number_where_pytorch_raises_a_refusal_and_a_panic_are_found(tmp_path: Path) -> None:
    def fault(_table: CallTable, _directory: Path, right: Answered) -> Answered:
        return answered({"value": np.array(0.0)}) if right.outcome == "error" else right

    _, [cause] = hunt(Fake(fault), "extract_token_prob", tmp_path)
    assert cause.reason == "not refused"
    assert cause.smallest["call"][0]["args"] == {"logits": "a", "token": 1}
    for message, reason in [("no 12", "refused: no N"), ("panicked", "panic")]:
        _, causes = hunt(Fake(lambda *_, said=message: refused(said)), "create_causal_mask", tmp_path, examples=10)
        assert [cause.reason for cause in causes] == [reason]


def judged(tmp_path: Path, fn: str, sae: SaeRow, x: Any, known: KnownOf, **results: Any) -> Judged:
    """The judgement of an SAE's answer; of PyTorch's own in float32 without results."""
    row = CallRow(
        id="generated", fn=fn, args={"x": "x"}, sae="sae", exact=fn in ("encode_sparse", "encode_with_strategy")
    )
    table = CallTable(tensors={"x": InputTensor(values=x)}, saes={"sae": sae}, call=[row])
    directory = write_inputs(table, tmp_path)
    given = answered({name: np.array(values, dtype=np.float64) for name, values in results.items()})
    return judge(table, given if results else TorchCallee().answer(table, directory), directory, known)


def no_value(wanted: Expected) -> Expected:
    return Expected(wanted.row, unknown="planted")


def infinitely_noisy(wanted: Expected) -> Expected:
    values = {name: TruthTensor(each.value, each.noise + np.inf) for name, each in wanted.values.items()}
    return replace(wanted, values=values)


@pytest.mark.parametrize("under", [no_value, infinitely_noisy])
def test_a_known_formula_that_has_no_value_explains_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, under: Callable[[Expected], Expected]
) -> None:
    def planted(
        table: CallTable, directory: Path, formulas: Collection[Formula] = (), noisy: bool = True
    ) -> Expected:
        found = expected(table, directory, formulas, noisy)
        return under(found) if formulas and noisy else found

    monkeypatch.setattr("candle_mi_parity.hunt.calls.expected", planted)
    top1 = SaeRow(architecture="topk", width=2, features=2, k=1)
    wrong = judged(tmp_path, "encode", top1, [[1.0, 2.0]], KNOWN, value=[[0.0, 2.5]])
    assert (wrong.what, wrong.first, wrong.reason) == ("cause", "value", "values")


def test_a_formula_of_features_that_rounding_orders_explains_nothing(tmp_path: Path) -> None:
    """Of two negative features ReLU keeps neither; without it, which of the equal ones is kept is not specified."""
    top1 = SaeRow(architecture="topk", width=1, features=2, k=1, tensors={"W_enc": [[0.1, 0.1]]})
    assert judged(tmp_path, "encode", top1, [[-3.0]], KNOWN).what == "agree"
    assert judged(tmp_path, "encode", top1, [[-3.0]], KNOWN, value=[[5.0, 5.0]]).what == "cause"


def test_a_feature_that_is_epsilon_away_from_the_kth_is_not_tied_with_it(tmp_path: Path) -> None:
    """Of four equal features and their negative, which is 0: a hunt found that the formula took it for tied."""
    top1 = SaeRow(architecture="topk", width=1, features=5, k=1, tensors={"W_enc": [[1.0, 1.0, 1.0, 1.0, -1.0]]})
    x = [[2.0**-23], [2.0**-149]]
    rows = {count: [[each] * count + [0.0] * (5 - count) for (each,) in x] for count in (1, 2)}

    def of(first: int, second: int) -> str:
        value = [rows[first][0], rows[second][1]]
        return judged(tmp_path, "encode_with_strategy", top1, x, KNOWN, value=value).what

    assert [of(1, 1), of(1, 2), of(2, 2)] == ["agree", "known", "cause"]


def test_what_a_formula_gives_beyond_the_range_of_float32_is_known_if_it_is_the_same(tmp_path: Path) -> None:
    """The square of twice the input overflows, and that of the input, without the negative feature, does not."""
    top1 = SaeRow(architecture="topk", width=1, features=1, k=1, tensors={"W_enc": [[-1.0]], "W_dec": [[1.0]]})

    def of(value: float) -> str:
        return judged(tmp_path, "reconstruction_error", top1, [[1e19]], KNOWN, value=value).what

    assert [of(np.inf), of(-np.inf), of(np.nan), of(3e38)] == ["known", "cause", "cause", "cause"]
    assert of(float(np.float32(1e19) ** 2)) == "agree"


def test_a_mean_whose_sum_is_beyond_the_range_of_float32_has_no_truth(tmp_path: Path) -> None:
    """The squares are 1e38 and 3.06e38, and half of their sum is a float32 number; the sum is none."""
    tensors = {"W_enc": [[1.0, 0.5], [0.0, 0.0]], "W_dec": [[0.0, 0.0], [0.0, 3.5]]}
    jumprelu = SaeRow(architecture="jumprelu", width=2, features=2, threshold=[0.0, 0.0], tensors=tensors)

    def of(x: list[float], value: float) -> str:
        return judged(tmp_path, "reconstruction_error", jumprelu, [x], NOTHING, value=value).what

    assert of([1e19, 0.0], np.inf) == "no_truth"
    assert [of([1e18, 0.0], value) for value in (np.inf, 2.03125e36)] == ["cause", "agree"]


def test_a_function_that_a_release_lacks_is_counted_and_no_cause(tmp_path: Path) -> None:
    absent = Answered(id="generated", outcome="absent", results=[], error=None)
    tally, causes = hunt(Fake(lambda *_: absent), "create_causal_mask", tmp_path, examples=10)
    assert not causes
    assert tally.refused == {"there is no create_causal_mask": 10}


@pytest.mark.parametrize(
    ("indices", "values"),
    [
        ([0, 3], [np.inf, np.inf]),
        ([0, 3, 2], [np.inf, np.inf, np.nan]),
        ([0, 3, 1, 2], [np.inf, np.inf, np.nan, np.nan]),
        ([0, 1], [np.inf, np.nan]),
        ([0, 3, 1], [np.inf, 3e38, np.nan]),
        ([0, 3, 2, 1], [np.inf, np.inf, 1.0, np.nan]),
    ],
    ids=["no NaN", "NaN elsewhere", "one NaN more", "one lost", "another value", "one more fires"],
)
def test_a_sparse_encoding_with_nan_is_compared(tmp_path: Path, indices: list[int], values: list[float]) -> None:
    """Of the pre-activations inf, NaN, -inf and inf; the second weight times an infinite input is NaN."""
    sae = SaeRow(architecture="standard", width=1, features=4, tensors={"W_enc": [[1.0, 0.0, -1.0, 2.0]]})

    def of(**results: list[Any]) -> Judged:
        return judged(tmp_path, "encode_sparse", sae, ["inf"], NOTHING, **results)

    assert of().what == of(indices=[3, 1, 0], values=[np.inf, np.nan, np.inf]).what == "agree"
    assert of(indices=indices, values=values).what == "cause"


def test_what_is_already_known_is_only_counted(tmp_path: Path) -> None:
    callee = Fake(by_formula(Formula.LAST_OF_EQUAL))
    _, found = hunt(callee, "sample_token", tmp_path)
    before = found[0].count
    _, causes = hunt_calls(callee, "", 8, 60, tmp_path, found, NOTHING, "sample_token")
    assert not causes
    assert found[0].count > before


def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    one, other = (hunt(Fake(by_formula(Formula.LAST_OF_EQUAL)), "sample_token", tmp_path) for _ in range(2))
    assert one == other


def test_every_function_of_the_table_is_generated() -> None:
    from candle_mi_parity.coverage.calls import load_calls

    """But for those that run a model, and a sampler, which draws random numbers unless it is given one step."""
    asked = {row.fn for row in load_calls().call if row.model is None} - {"diffusion_sample"}
    assert asked == {what.split(" of ")[0] for what in GENERATED}


def clt_call(fn: str, row: TranscoderRow, values: list[float], **args: Any) -> CallTable:
    call = CallRow(id="generated", fn=fn, args=args, transcoder="clt")
    return CallTable(tensors={"x": InputTensor(values=values)}, transcoders={"clt": row}, call=[call])


CLT = TranscoderRow(layout="clt", layers=1, width=2, features=3, seed=1)


def test_a_transcoders_features_within_rounding_of_a_decision_have_no_truth(tmp_path: Path) -> None:
    weights = CLT.weights()[0]
    bias, column = weights["b_enc"].astype(np.float64), weights["W_enc"][:, 0].astype(np.float64)
    zero = [float(-bias[0] / column[0]), 0.0]  # the first feature is about 0
    scoring: dict[str, Any] = {"target": 0, "k": 1, "cosine": False}
    tied = {"direction": "x", "scoring": scoring}
    undecided = {
        "a feature lies": clt_call("clt_encode", CLT, zero, x="x", layer=0),
        "the k-th and the next score": clt_call("clt_score_features", CLT, [0.0, 0.0], **tied),
        "a score lies": clt_call(
            "clt_attribution_graph", CLT, [1.0, 0.0], **tied, least=abs(float(weights["W_dec"][:, 0, 0].max()))
        ),
    }
    for why, table in undecided.items():
        found = expected(table, write_inputs(table, tmp_path))
        assert found.unknown.startswith(why)
    for table in (clt_call("clt_encode", CLT, [3.0, 1.0], x="x", layer=0), clt_call("clt_config", CLT, [0.0])):
        assert not expected(table, write_inputs(table, tmp_path)).unknown


@pytest.mark.parametrize("formula", [Formula.THRESHOLD_UNREAD, Formula.NEGATIVE_LEFT_OUT])
@pytest.mark.every(2)
def test_a_transcoders_wrong_activation_is_found_and_known(formula: Formula, tmp_path: Path) -> None:
    _, causes = hunt(Fake(by_formula(formula)), "clt_encode", tmp_path, examples=200)
    assert {(cause.what, cause.first, cause.reason) for cause in causes} == {("clt_encode", "value", "values")}
    tally, causes = hunt(Fake(by_formula(formula)), "clt_encode", tmp_path, KNOWN, examples=200)
    assert tally.known and not causes
