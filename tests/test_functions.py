"""candle-mi's public functions, called directly, against float64, for each release."""

from pathlib import Path

import pytest

from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.candidate.spelling import parse_candidate, stored_releases
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.coverage.calls_judge import JudgedCalls, expectations, judge_source
from candle_mi_parity.spec.paths import OUTPUTS, cache_root

KNOWN = {
    "CMI101": ["logit_diff/2d", "logit_diff/3d"],
    "CMI102": ["top_changed/2d", "top_changed/3d"],
    "CMI103": ["kl/far"],
    "CMI104": ["sample/tie"],
    "CMI105": [*(f"topk-{path}/all-negative" for path in ("auto", "cpu"))]
    + [f"topk-{path}/k-is-all" for path in ("auto", "cpu", "gpu")],
    "CMI106": ["topk-auto/small-ties", "topk-cpu/small-ties"],
    "CMI107": [f"jump-negative/{x}" for x in ("theta", "theta-batch", "huge")],
    "CMI108": [f"topk-gpu/{x}" for x in ("spread", "seq", "ties", "k-beyond-positives", "all-negative")]
    + [f"topk-gpu/{x}" for x in ("zeros", "small-ties", "small", "huge")],
}
"""Explanation → the calls that differ in every release."""
ABSENT = {"CMI109": [f"position_delta/{position}" for position in (0, 1, 3)]}
RELEASES = {"0.1.6": ABSENT, "0.1.10": ABSENT, "0.1.24": {}, "0.2.2": {}}


def judged(spec: str, out: Path) -> JudgedCalls:
    with open_source(parse_candidate(spec), cache_root(), out, print) as source:
        return judge_source(source, spec, expectations(cache_root()), cache_root(), out / "calls.json")


def check(found: JudgedCalls, absent: dict[str, list[str]]) -> None:
    expected = {f"calls/{call}": cause for cause, calls in (KNOWN | absent).items() for call in calls}
    wrong = [call.message() for call in found.results if call.status not in (Status.PASS, Status.KNOWN)]
    assert found.lost is None and not wrong, wrong
    assert {call.id: _cause(call) for call in found.results if call.status is Status.KNOWN} == expected
    missing = {call.id for call in found.results if "has no position_delta" in call.error}
    assert missing == {f"calls/{call}" for calls in absent.values() for call in calls}
    assert len(found.results) == 100


def _cause(call: CaseResult) -> str:
    assert call.explained is not None
    return ",".join(call.explained.ids)


def test_every_release_is_stored() -> None:
    assert set(stored_releases(OUTPUTS)) == set(RELEASES)


@pytest.mark.parametrize("release", RELEASES)
def test_stored_calls(release: str, tmp_path: Path) -> None:
    check(judged(f"stored:{release}", tmp_path), RELEASES[release])


@pytest.mark.rust
def test_live_calls(tmp_path: Path) -> None:
    check(judged("0.2.2", tmp_path), {})
