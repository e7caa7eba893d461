"""candle-mi's public functions, called directly, against float64, for each release."""

from collections import Counter
from pathlib import Path

import pytest

from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.candidate.spelling import parse_candidate, stored_releases
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.coverage.calls_judge import JudgedCalls, expectations, judge_source
from candle_mi_parity.spec.paths import OUTPUTS, cache_root

KNOWN = {
    "CMI101": 3, "CMI102": 2, "CMI103": 1, "CMI104": 2, "CMI105": 5, "CMI106": 2, "CMI107": 3, "CMI108": 9,
    "CMI110": 1, "CMI111": 1, "CMI112": 2, "CMI113": 2, "CMI114": 1, "CMI115": 2, "CMI116": 2, "CMI117": 1,
    "CMI118": 1, "CMI119": 5, "CMI120": 3, "CMI121": 1, "CMI122": 1, "CMI123": 1,
}  # fmt: skip
"""Explanation → number of calls that differ in every release."""
RELEASES = {"0.1.6": 3, "0.1.10": 3, "0.1.24": 0, "0.2.2": 0}
"""Release → number of calls of ``position_delta``, which it does not have."""


def judged(spec: str, out: Path) -> JudgedCalls:
    with open_source(parse_candidate(spec), cache_root(), out, print) as source:
        return judge_source(source, spec, expectations(cache_root()), cache_root(), out / "calls.json")


def check(found: JudgedCalls, absent: int) -> None:
    wrong = [call.message() for call in found.results if call.status not in (Status.PASS, Status.KNOWN)]
    assert found.lost is None and not wrong, wrong
    causes = Counter(id for call in found.results if call.explained for id in call.explained.ids)
    assert causes == KNOWN | ({"CMI109": absent} if absent else {})
    assert sum("has no position_delta" in call.error for call in found.results) == absent
    assert len(found.results) == 129


def test_every_release_is_stored() -> None:
    assert set(stored_releases(OUTPUTS)) == set(RELEASES)


@pytest.mark.parametrize("release", RELEASES)
def test_stored_calls(release: str, tmp_path: Path) -> None:
    check(judged(f"stored:{release}", tmp_path), RELEASES[release])


@pytest.mark.rust
def test_live_calls(tmp_path: Path) -> None:
    check(judged("0.2.2", tmp_path), 0)
