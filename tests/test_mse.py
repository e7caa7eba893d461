"""SAE reconstruction, its MSE with the noise propagated, and the last position's norms."""

from collections.abc import Callable

from candle_mi_parity.compare.verdict import CaseResult
from tests.plugin import check


def belongs(name: str) -> bool:
    return name.endswith((".recon", "_mse", "_norm")) and name.startswith("sae")


def test_mse(candidate: str, sae_case_id: str, judged: Callable[[str, str], CaseResult]) -> None:
    check(judged(candidate, sae_case_id), belongs)
