"""The hunt in direct calls finds planted faults in their smallest form, also behind known ones, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from candle_mi_parity.candidate.sources import LiveSource, open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.hunt_result import Cause, Tally
from candle_mi_parity.coverage.calls import Answered, CallTable, Formula
from candle_mi_parity.coverage.calls_truth import computation
from candle_mi_parity.hunt.call_inputs import GENERATED
from candle_mi_parity.hunt.callees import Emitted, TorchCallee, answered, refused
from candle_mi_parity.hunt.calls import KnownOf, hunt_calls
from candle_mi_parity.spec.paths import cache_root

KNOWN = KnownOf.release("0.2.2")
NOTHING = KnownOf()


class Fake(TorchCallee):
    """PyTorch with a planted fault: a function of a call and its right answer."""

    def __init__(self, fault: Callable[[CallTable, Path, Answered], Answered]) -> None:
        self._fault = fault

    def answer(self, table: CallTable, directory: Path) -> Answered:
        return self._fault(table, directory, super().answer(table, directory))


def by_formula(formula: Formula) -> Callable[[CallTable, Path, Answered], Answered]:
    def fault(table: CallTable, directory: Path, right: Answered) -> Answered:
        finite = all(np.isfinite(array).all() for array in table.arrays().values())
        if right.outcome != "results" or not finite:
            return right
        values = computation(table.call[0], table.arrays(), directory, (formula,))()
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

    assert {row.fn for row in load_calls().call} == {what.split(" of ")[0] for what in GENERATED}
