"""SAE features, on the candidate's own residual and on the truth's; a feature may flip only inside the gate."""

from collections.abc import Callable

from candle_mi_parity.compare.verdict import CaseResult
from tests.plugin import check


def belongs(name: str) -> bool:
    return name.endswith(".features") or name in ("sae.n_active_last_pos", "sae.top_features_last_pos")


def test_encodings(candidate: str, sae_case_id: str, judged: Callable[[str, str], CaseResult]) -> None:
    check(judged(candidate, sae_case_id), belongs)
