"""Every place that says PASS, found in the source itself, with a fault that makes it say otherwise.

A place that is added, or moves to another function, fails here until it has its fault.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.outcome import Outcome
from candle_mi_parity.compare.verdict import CaseResult, Status, TensorResult, Verdict
from candle_mi_parity.files.json_out import write_json
from candle_mi_parity.judge.case import _status
from candle_mi_parity.pytest_plugin import check
from candle_mi_parity.run import nightly, nightly_verdict
from candle_mi_parity.run.nightly import StepResult
from candle_mi_parity.run.repeat import RepeatedCase
from candle_mi_parity.spec.paths import ROOT
from candle_mi_parity.trace.trace import InMemory
from tests.harness.test_calls import STORED, answered
from tests.harness.test_calls import judged as judged_calls
from tests.harness.test_diff import between, scale
from tests.support.planting import CASES, Arrays, real, with_arrays
from tests.support.results import case as result
from tests.support.results import run_of

SCORE, SAE, CALL = "llama/hub", "llama/sae-jumprelu", "kl/1d"
Plant = Callable[[Arrays], object]
Found = tuple[object, object]
"""What the place says of the honest thing, and of the faulty one."""


def places(path: Path) -> Iterator[tuple[str, str]]:
    """(module, function) wherever ``Status.PASS``, ``Verdict.PASS`` or ``"PASS"`` is an answer, not a question."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        asked = (node for node in ast.walk(function) if isinstance(node, ast.Compare | ast.Subscript | ast.Dict))
        questions = {id(part) for node in asked for part in ast.walk(node)}
        nested = (node for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function)
        questions |= {id(part) for node in nested for part in ast.walk(node)}
        for node in ast.walk(function):
            named = isinstance(node, ast.Attribute) and node.attr == "PASS"
            spelt = isinstance(node, ast.Constant) and node.value == "PASS"
            if (named or spelt) and id(node) not in questions:
                yield path.stem, function.name


def dump(case_id: str, plant: Plant | None = None) -> list[TensorResult]:
    """All results of torch's float32 run, with a fault planted in its arrays."""
    there = real(case_id)
    arrays = there.arrays
    if plant is not None:
        plant(arrays)
    return compare(there.truth, with_arrays(there.emitted, arrays), there.decoder, None)


def of(results: list[TensorResult], name: str) -> Status:
    return next(one.status for one in results if one.name == name)


def said_of(name: str, case_id: str, plant: Plant) -> Found:
    return of(dump(case_id), name), of(dump(case_id, plant), name)


def one_logit(arrays: Arrays) -> None:
    arrays["logits"][0, 3, arrays["logits"][0, 3].argmin()] += 100


def one_query(arrays: Arrays) -> None:
    arrays["blocks.0.attn.hook_q"] *= 1.001


def sae_scalar(name: str, factor: float) -> Found:
    """A number beside the tensors, one way and the other."""
    there = real(SAE)
    other = replace(there.emitted, scalars=there.emitted.scalars | {name: there.emitted.scalars[name] * factor})
    both: list[InMemory] = [there.emitted, other]
    honest, faulty = (of(compare(there.truth, one, there.decoder, None), name) for one in both)
    return honest, faulty


def top_feature(_: Path) -> Found:
    there, name = real(SAE), "sae.top_features_last_pos"
    first, *rest = there.emitted.top_features
    other = replace(there.emitted, top_features=[first.model_copy(update={"value": first.value * 1.001}), *rest])
    honest, faulty = (of(compare(there.truth, one, there.decoder, None), name) for one in (there.emitted, other))
    return honest, faulty


def a_case(_: Path) -> Found:
    """One tensor more is noisy than the row declares."""
    first, *rest = dump(SCORE)
    noisy = replace(first, status=Status.UNMEASURED)
    return _status([first, *rest], CASES[SCORE], False)[0], _status([noisy, *rest], CASES[SCORE], False)[0]


def a_run(_: Path) -> Found:
    return run_of(result("a/b")).verdict, run_of(result("a/b"), result("a/c", Status.FAIL)).verdict


def a_call(_: Path) -> Found:
    spoilt = answered(CALL, {"value": np.array(29.0)})
    faulty = [spoilt if answer.id == CALL else answer for answer in STORED.calls]
    return judged_calls(STORED.calls)[CALL], judged_calls(faulty)[CALL]


def a_diff(_: Path) -> Found:
    return between(None, None).verdict, between(None, scale("blocks.0.attn.hook_q", 1.01)).verdict


def a_test(_: Path) -> Found:
    """What pytest asserts of a case: the answer is the test's own outcome."""

    def outcome(one: CaseResult) -> Status:
        try:
            check(one, lambda name: name.startswith("blocks"))
        except AssertionError:
            return Status.FAIL
        return Status.PASS

    return outcome(result("a/b")), outcome(result("a/b", Status.FAIL))


def nights_diff(tmp: Path) -> Found:
    """A case that one side could not be had of."""

    def told(outcome: Outcome) -> object:
        side = {"outcome": outcome.value}
        case = {"id": "a/b", "worse": False, "a": side, "b": {"outcome": Outcome.AGREES.value}}
        write_json({"line": "x", "cases": [case]}, tmp / "diff.json")
        return nightly._of_diff(tmp / "diff.json")[1]["a/b"]

    return told(Outcome.AGREES), told(Outcome.ERROR)


def nights_tests(tmp: Path) -> Found:
    def told(inside: str) -> object:
        (tmp / "junit.xml").write_text(f'<testsuite><testcase classname="t" name="a">{inside}</testcase></testsuite>')
        return nightly._of_junit(tmp / "junit.xml")["t::a"]

    return told(""), told('<failure message="x"/>')


def a_night(_: Path) -> Found:
    fine, bad = (
        StepResult(name="release", command=[], verdict=verdict, line="x", cases={})
        for verdict in (Verdict.PASS, Verdict.INCONCLUSIVE)
    )
    return nightly_verdict.verdict([fine]), nightly_verdict.verdict([fine, bad])


def a_repeat(_: Path) -> Found:
    """The same bytes twice, of no tensor."""
    return tuple(RepeatedCase(id="a/b", tensors=count, differing=[]).status for count in (44, 0))  # type: ignore[return-value]


FAULTS: dict[tuple[str, str], Callable[[Path], Found]] = {
    ("judge", "concluded"): lambda _: said_of("blocks.0.attn.hook_q", SCORE, one_query),
    ("compare", "_discrete"): lambda _: said_of("logits.next_token", SCORE, one_logit),
    ("compare_sae", "result"): top_feature,
    ("compare_sae", "_judge_count"): lambda _: sae_scalar("sae.n_active_last_pos", 2),
    ("compare_sae", "_judge_scalar"): lambda _: sae_scalar("sae.reconstruction_mse", 1.001),
    ("calls_compare", "_verdict"): a_call,
    ("diff", "verdict"): a_diff,
    ("nightly", "_compared"): nights_diff,
    ("nightly", "_of_junit"): nights_tests,
    ("nightly_verdict", "verdict"): a_night,
    ("pytest_plugin", "check"): a_test,
    ("repeat", "status"): a_repeat,
    ("run", "_status"): a_case,
    ("verdict", "verdict"): a_run,
}


def test_every_place_that_says_pass_has_its_fault() -> None:
    found = {place for path in sorted((ROOT / "candle_mi_parity").rglob("*.py")) for place in places(path)}
    assert found - {("page", "matrix")} == set(FAULTS), "the page's is the order of its rows"


@pytest.mark.parametrize("place", FAULTS, ids=".".join)
def test_a_fault_turns_it(place: tuple[str, str], tmp_path: Path) -> None:
    honest, faulty = FAULTS[place](tmp_path)
    assert honest in (Status.PASS, Verdict.PASS, "PASS")
    assert faulty not in (Status.PASS, Verdict.PASS, "PASS")


def test_a_tensor_of_which_nothing_was_compared_is_no_pass() -> None:
    first, *rest = dump(SCORE)
    status, said = _status([replace(first, compared=0), *rest], CASES[SCORE], False)
    assert status is Status.UNMEASURED
    assert said.startswith(f"nothing was compared of {first.name}")
