"""Each rival rule passes an honest twin and fails a gross fault, and the table says what was counted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from proof import packages, rival_views, rivals, rules
from proof.catalogue import load_faults
from proof.packages import Absent, from_packages
from proof.rival_scores import Dumps, Faulty, Score, need, score
from proof.rules import Rule, built_in
from proof.variants import load_settings
from tests.support.planting import Arrays, Real, real

CASE = "gemma2/hub"
MADE = [*built_in(), *from_packages()]
RULES = {rule.name: rule for rule in MADE if isinstance(rule, Rule)}
ABSENT = [rule for rule in MADE if isinstance(rule, Absent)]
EVERY = [name for name, rule in RULES.items() if rule.sees == "every tensor"]
POST = "blocks.1.mlp.hook_post"


def gross(there: Real) -> Arrays:
    """Everything a hundred times as large, and in another order."""
    return {name: np.ascontiguousarray(100 * array[..., ::-1]) for name, array in there.arrays.items()}


def with_one(there: Real, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    return there.arrays | {name: change(there.arrays[name])}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_passes_the_twin_and_fails_a_gross_fault(name: str) -> None:
    there, rule = real(CASE), RULES[name]
    assert rule.check(there, there.arrays, 1.0) is None
    assert rule.check(there, gross(there), 1.0) is not None


@pytest.mark.parametrize("name", [name for name in RULES if name != "this suite"])
def test_a_tolerance_can_be_scaled(name: str) -> None:
    there, rule = real(CASE), RULES[name]
    assert rule.check(there, there.arrays, 1e-6) is None, "the twin is equal to the bit"
    dump = {name: array * np.float32(1 + 3e-4) for name, array in there.arrays.items()}
    assert rule.check(there, dump, 1e9) is None
    if rule.sees != "SAE at one position":
        assert rule.check(there, dump, 1e-9) is not None


@pytest.mark.parametrize("name", EVERY)
def test_a_rule_that_sees_every_tensor_names_the_one_that_is_wrong(name: str) -> None:
    there = real(CASE)
    assert RULES[name].check(there, with_one(there, POST, lambda x: 2 * x), 1.0) == POST


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_tensor_is_named_where_a_rule_notices(name: str) -> None:
    there = real(CASE)
    dump = there.arrays
    del dump[POST]
    blind = name.startswith("Polygraphy")
    assert RULES[name].check(there, dump, 1.0) == (None if blind else POST)


@pytest.mark.parametrize("name", EVERY)
def test_a_nan_is_named_where_a_rule_notices(name: str) -> None:
    there = real(CASE)
    blind = name.startswith("firefly")
    found = RULES[name].check(there, with_one(there, POST, lambda x: np.full_like(x, np.nan)), 1.0)
    assert found == (None if blind else POST)


@pytest.mark.parametrize("name", EVERY)
def test_another_shape_is_named(name: str) -> None:
    there = real(CASE)
    assert RULES[name].check(there, with_one(there, POST, lambda x: x[:, :-1]), 1.0) == POST


def test_the_gate_is_scaled_and_decisions_are_not() -> None:
    there, ours = real(CASE), RULES["this suite"]
    assert ours.check(there, there.arrays, 0.05) is not None, "the twin differs from the truth by rounding"
    assert ours.check(there, with_one(there, POST, lambda x: x * (1 + 1e-4)), 1e9) is None
    leak = there.arrays["blocks.1.attn.hook_pattern"]
    leak[0, 2, 4, 5] = 1e-30
    dump = there.arrays | {"blocks.1.attn.hook_pattern": leak}
    assert ours.check(there, dump, 1e9) == "blocks.1.attn.hook_pattern"


def test_rules_of_logits_see_nothing_else() -> None:
    there = real(CASE)
    dump = with_one(there, POST, lambda x: 0 * x)
    for name in ("candle-mi, validate_*_forward.rs", "llama.cpp, check-nmse.py", "TransformerLens, logits"):
        assert RULES[name].check(there, dump, 1.0) is None


def test_an_absent_package_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Rule:
        raise ModuleNotFoundError("No module named 'firefly'")

    monkeypatch.setattr(packages, "_firefly", missing)
    (found,) = [rule for rule in from_packages() if rule.name == "firefly-ml"]
    assert isinstance(found, Absent) and "No module named 'firefly'" in found.reason


def stub(limit: float, name: str = "blocks.0.hook_resid_mid") -> Rule:
    """Fails where the logits' largest error is past ``limit``."""

    def check(there: Real, got: Arrays, scale: float) -> str | None:
        return name if np.abs(got["logits"] - there.arrays["logits"]).max() > limit * scale else None

    return Rule("stub", "logits", f"{limit:g}", check)


def shifted(there: Real, by: float) -> Arrays:
    return there.arrays | {"logits": (there.arrays["logits"].astype(np.float64) + by)}


def test_a_need_is_what_the_worst_honest_dump_needs() -> None:
    there = real(CASE)
    honest = [shifted(there, 0.5), shifted(there, 2.0), shifted(there, 1.0)]
    assert need(stub(0.1), there, honest) == pytest.approx(20, rel=0.02)
    assert need(stub(0.1), there, [there.arrays]) < 1e-8
    never = Rule("never", "", "", lambda *_: "logits")
    assert need(never, there, honest) == math.inf


def scored(rule: Rule) -> Score:
    there = real(CASE)
    faulty = [Faulty("large", "logits", shifted(there, 100.0)), Faulty("small", "logits", shifted(there, 0.06))]
    return score(rule, [Dumps(there, {"near": shifted(there, 0.01), "far": shifted(there, 0.05)}, faulty)])


def test_a_score_says_what_a_rule_named_at_each_tolerance() -> None:
    found = scored(stub(0.02, "logits"))
    assert found.honest == {CASE: {"near": None, "far": "logits"}}
    assert found.needs[CASE] == pytest.approx(2.5, rel=0.03)
    large, small = found.asked
    assert (large.default, large.own, large.joint) == ("logits",) * 3
    assert (small.default, small.own) == ("logits", None), "0.06 is less than 1.5 × 0.05"


def test_a_rule_that_no_tolerance_makes_pass_kills_nothing_on_equal_footing() -> None:
    found = scored(Rule("never", "", "", lambda *_: "logits"))
    assert [asked.default for asked in found.asked] == ["logits"] * 2
    assert [(asked.own, asked.joint) for asked in found.asked] == [(None, None)] * 2


def test_nothing_to_compare_is_an_error() -> None:
    there = real(CASE)
    for dumps in (
        Dumps(there, {"twin": there.arrays}, []),
        Dumps(there, {}, [Faulty("x", "logits", there.arrays)]),
    ):
        with pytest.raises(ValueError, match="nothing to compare"):
            score(stub(1), [dumps])


def test_another_tensor_named_is_a_kill_and_not_right() -> None:
    found = scored(stub(0.02))
    assert len(rival_views.killed(found, [CASE], "default")) == 2
    assert not rival_views.right(found, [CASE], "default")
    assert not rival_views.killed(found, ["llama/hub"], "default")


def test_the_table_says_what_a_kill_is_worth(tmp_path: Path) -> None:
    names = {"ours": 0.05, "fair": 0.055, "refusing": 0.02}
    found = [scored(stub(limit, "logits")) for limit in names.values()]
    for one, name in zip(found, names, strict=True):
        one.rule = Rule(name, "logits", "d", one.rule.check)
    rival_views.write(found, [Absent("gone", "not installed")], tmp_path)
    table = (tmp_path / "rivals.md").read_text()
    assert re.search(r"\| fair \| logits \| d \| 2/2 \| 2/2, 2 \| 0\.9\d* \| 1/2, 1 \| 1/2, 1 \|", table)
    assert "| refusing | logits | d | 1/2 | (2/2, 2) |" in table
    assert "- gone: not installed" in table
    assert (
        "- At the defaults: as many kills as this suite: fair; as many first tensors right: fair. Nearest: fair, "
        in table
    )
    assert "which misses nothing that this suite kills." in table
    document = json.loads((tmp_path / "rivals.json").read_text())
    assert document["rules"][2]["honest"][CASE]["far"] == "logits" and document["not_run"][0]["name"] == "gone"


@pytest.mark.parametrize("missing", ABSENT, ids=lambda missing: missing.name)
def test_rules_of_absent_packages(missing: Absent) -> None:
    pytest.skip(missing.reason)


def test_a_test_that_stops_at_a_tensor_names_it() -> None:
    there = real(CASE)

    def stops(name: str, *_: np.ndarray) -> bool:
        if name == POST:
            raise RuntimeError("shapes")
        return False

    assert rules.in_order(stops, there, there.arrays) == POST


def test_faults_that_no_dump_shows_are_left_to_the_catalogue() -> None:
    faults = load_faults()
    shown = list(rivals.shown_in_a_dump(faults))
    assert 100 < len(shown) < len(faults)
    assert all(fault.scored and not fault.io and not fault.source for fault in shown)
    left = {fault.first for fault in faults if fault.scored and not (fault.io or fault.source)}
    assert {fault.first for fault in shown} == left - set(rivals.FIGURES)


def test_changes_of_one_tensor_are_moved_to_real_weights() -> None:
    moved = [fault for fault in load_faults() if rivals.moves_to_real_weights(fault)]
    assert len(moved) >= 30
    assert all(fault.tensor and not (fault.config or fault.weight or fault.function) for fault in moved)


def test_honest_dumps_are_settings_of_the_table() -> None:
    assert set(rivals.HONEST) <= {setting.id for setting in load_settings()}
    there = real("llama/hub")
    (dump,) = rivals.honest_dumps(there, ["sums reversed"]).values()
    assert list(dump) == list(there.arrays)
    assert any(not np.array_equal(dump[name], array) for name, array in there.arrays.items())


def test_the_table_says_what_separates_the_nearest_rival(tmp_path: Path) -> None:
    one, two = scored(stub(0.055, "logits")), scored(stub(10.0, "logits"))
    line = "- At the defaults: as many kills as this suite: "
    assert (
        line + "none; as many first tensors right: none. Nearest: stub, which misses small."
        in rival_views.markdown([one, two], [])
    )
    assert "nothing that this suite kills, and kills small, which this suite misses." in rival_views.markdown(
        [two, one], []
    )


def test_an_honest_dump_that_is_the_reference_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="1 thread varies nothing in llama/hub"):
        rivals.honest_dumps(real("llama/hub"), ["1 thread"])


def test_a_dump_shares_what_is_the_honest_runs_own() -> None:
    there = real(CASE)
    one_bit = np.nextafter(there.arrays[POST], np.float32(9))
    shared = rivals._sharing(there.arrays | {POST: one_bit, "extra": one_bit}, there)
    reference = rules.reference_of(there)
    assert shared[POST] is one_bit and shared["extra"] is one_bit
    assert all(shared[name] is reference[name] for name in reference if name != POST)
