"""The search for what is computed instead: it finds one change or two, and is made for each cause."""

import math
from pathlib import Path

import numpy as np
import pytest

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.judge.case import Judgement, Progress
from candle_mi_parity.judge.explain import explain_new
from candle_mi_parity.judge.hypotheses import Hypothesis
from candle_mi_parity.judge.search import Search, Trial
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.paths import cache_root
from tests.support.explaining import changed, evidence, searched
from tests.support.planting import Arrays, Real, real

SCORES = "blocks.0.attn.hook_scores"


def rotated(directory: Path, theta: float, more: float = 1.0) -> Judgement:
    """A case in which another rotary base is used and, if ``more`` is not 1, the logits are wrong too."""
    there = changed(directory, real("llama/hub"), {"rope_theta": theta})
    arrays = there.arrays
    arrays["logits"] *= np.float32(more)
    return judgement(directory.name, there, arrays)


def judgement(id: str, there: Real, arrays: Arrays) -> Judgement:
    found = evidence(there, arrays)
    result = CaseResult(f"llama/{id}", "llama", "", Status.FAIL, "")
    result.tensors = compare(there.truth, found.trace, there.decoder, None)
    return Judgement(result, found)


def test_a_second_cause_at_the_same_hook_is_searched(tmp_path: Path) -> None:
    first, other, alike = (rotated(tmp_path / name, theta) for name, theta in (("a", 1e4), ("b", 1e6), ("c", 1e4)))
    on_top = rotated(tmp_path / "d", 1e4, more=1.01)
    explain_new([first, other, alike, on_top], NOTHING_KNOWN, cache_root(), 120, Progress())
    for one, change in ((first, "no rope_theta"), (other, "rope_theta = 1000000.0"), (alike, "no rope_theta")):
        assert one.result.explained is not None, one.result.unexplained
        assert one.result.explained.change == change
    told = on_top.result
    assert told.explained is None and told.beyond_known == "logits"
    assert told.unexplained == f"{SCORES} is that of llama/a, with no rope_theta; then logits differs from it too"


@pytest.mark.thorough
def test_what_is_not_explained_does_not_stand_for_others(tmp_path: Path) -> None:
    there = real("llama/hub")
    arrays = there.arrays
    arrays[SCORES][0, 2] *= np.float32(1.01)
    no_setting, other = judgement("a", there, arrays), rotated(tmp_path / "b", 1e6)
    explain_new([no_setting, other], NOTHING_KNOWN, cache_root(), 240, Progress(), each=60)
    assert no_setting.result.explained is None and other.result.explained is not None
    explain_new([late := rotated(tmp_path / "c", 1e6)], NOTHING_KNOWN, cache_root(), 0, Progress())
    assert late.result.unexplained == "the time limit of the search was reached"


def test_a_change_moves_no_tensor_whose_truth_another_processor_rounded(tmp_path: Path) -> None:
    """The plain truth is from the cache, which a machine of CI may have filled that adds up in another order."""
    there = changed(tmp_path / "a", real("llama/hub"), {"rope_theta": 1e4})
    search = Search(evidence(there), SCORES, math.inf)
    search.__dict__["_plain_distance"] = float(np.nextafter(search._plain_distance, 2))
    for field, value, moves in (("max_position_embeddings", 256, False), ("rope_theta", 1e6, True)):
        trial = search._try(Hypothesis(Counterfactual(config_set={field: value}), []), "single changes")
        assert isinstance(trial, Trial) and trial.moves is moves, field


def test_nothing_is_searched_where_the_numbers_are_not_finite() -> None:
    there = real("llama/hub")
    arrays = there.arrays
    arrays["blocks.1.attn.hook_q"][0, 2] *= np.float32(1.01)
    arrays["blocks.1.hook_resid_post"][0, 3, 1] = np.nan
    found = searched(there, arrays)
    assert found.explained is None
    assert found.unexplained == (
        "blocks.1.hook_resid_post holds NaN or infinities, which no change of a setting explains: none was tried"
    )


@pytest.mark.thorough
def test_the_search_does_not_explain_a_fault_that_no_setting_makes() -> None:
    there = real("llama/hub")
    arrays = there.arrays
    arrays["blocks.1.attn.hook_q"][0, 2] *= np.float32(1.01)
    found = searched(there, arrays)
    assert found.explained is None
    assert found.unexplained.startswith("none of ") and "single changes" in found.unexplained
