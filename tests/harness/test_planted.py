"""Effects of a planted fault beside its first tensor; most faults are in ``validation/faults.toml``."""

from pathlib import Path

import numpy as np

from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.spec.cases import RandomTokens
from tests.support.planting import (
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


def test_every_result_of_the_twin_is_a_pass_with_room_to_spare(tmp_path: Path) -> None:
    results = compare_trace(real("gemma2/hub"), write(tmp_path, real("gemma2/hub")))
    assert {result.status for result in results} == {Status.PASS}
    assert max(result.position_ratio for result in results) < 4
    assert max(result.element_ratio for result in results) < 16
