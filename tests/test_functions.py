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
    "CMI110": 2, "CMI111": 1, "CMI112": 2, "CMI113": 4, "CMI114": 1, "CMI115": 2, "CMI116": 3, "CMI117": 4,
    "CMI118": 2, "CMI119": 5, "CMI120": 3, "CMI121": 1, "CMI122": 1, "CMI123": 1, "CMI140": 17, "CMI141": 7,
    "CMI142": 2, "CMI143": 1, "CMI144": 1, "CMI145": 1, "CMI146": 4, "CMI147": 3, "CMI150": 1, "CMI170": 2,
    "CMI175": 3, "CMI176": 3, "CMI180": 6, "CMI181": 4, "CMI182": 3, "CMI183": 3, "CMI184": 2, "CMI185": 1,
    "CMI211": 1,
}  # fmt: skip
"""Explanation → number of calls that differ in every release."""
STOICHEIA = {
    "CMI151": 4, "CMI152": 3, "CMI154": 1, "CMI155": 3, "CMI156": 3, "CMI157": 3, "CMI158": 1, "CMI159": 1,
    "CMI160": 1, "CMI161": 1, "CMI190": 5, "CMI191": 3, "CMI192": 1, "CMI193": 6, "CMI194": 3, "CMI195": 1,
    "CMI196": 6, "CMI197": 1,
}  # fmt: skip
"""Those of AlgZoo's networks, which 0.1.6 does not have."""
IGNORED = {"CMI198": 24}
"""Edits of these networks, in the releases before 0.2.2."""
OLD = {"CMI109": 7, "CMI131": 28, "CMI148": 2, "CMI149": 4, "CMI186": 2, "CMI172": 9, "CMI178": 16, "CMI202": 114,
       "CMI213": 13, "CMI214": 6, "CMI215": 30, "CMI216": 3}  # fmt: skip
"""Those of 0.1.6 and 0.1.10, which lack ``position_delta``, contrastive steering, a mask, ``decoder_matrix``."""
OLDEST = OLD | {"CMI177": 59, "CMI179": 33, "CMI199": 254}
"""Of 0.1.6, which lacks all transcoders but cross-layer ones."""
PER_LAYER = {"CMI171": 2, "CMI174": 2}
NEW = {"CMI130": 4, "CMI173": 2, "CMI200": 1, "CMI201": 1, "CMI210": 3, **PER_LAYER}
RELEASES = {
    "0.1.6": OLDEST,
    "0.1.10": OLD | PER_LAYER | STOICHEIA | IGNORED | {"CMI162": 2, "CMI164": 5},
    "0.1.24": NEW | STOICHEIA | IGNORED | {"CMI163": 8, "CMI203": 8, "CMI212": 19},
    "0.2.2": NEW | STOICHEIA | {"CMI153": 3},
}


def judged(spec: str, out: Path) -> JudgedCalls:
    with open_source(parse_candidate(spec), cache_root(), out, print) as source:
        return judge_source(source, spec, expectations(cache_root()), cache_root(), out / "calls.json")


def check(found: JudgedCalls, own: dict[str, int]) -> None:
    wrong = [call.message() for call in found.results if call.status not in (Status.PASS, Status.KNOWN)]
    assert found.lost is None and not wrong, wrong
    causes = Counter(id for call in found.results if call.explained for id in call.explained.ids)
    assert causes == KNOWN | own
    absent = sum("has no " in call.error for call in found.results)
    assert absent == sum(
        own.get(id, 0)
        for id in ("CMI109", "CMI131", "CMI149", "CMI164", "CMI178", "CMI179", "CMI199", "CMI202", "CMI203", "CMI215")
    )
    assert len(found.results) == 1139


def test_every_release_is_stored() -> None:
    assert set(stored_releases(OUTPUTS)) == set(RELEASES)


@pytest.mark.parametrize("release", RELEASES)
def test_stored_calls(release: str, tmp_path: Path) -> None:
    check(judged(f"stored:{release}", tmp_path), RELEASES[release])


@pytest.mark.rust
def test_live_calls(tmp_path: Path) -> None:
    check(judged("0.2.2", tmp_path), RELEASES["0.2.2"])
