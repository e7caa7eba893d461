"""Residual stream, block outputs and MLP hooks equal the truth within rounding."""

from collections.abc import Callable

from candle_mi_parity.compare.verdict import CaseResult
from tests.plugin import check


def belongs(name: str) -> bool:
    if name.startswith("lens"):
        return False
    return "hook_resid" in name or name.startswith("hook_") or "mlp" in name or name.endswith("attn_out")


def test_residuals(candidate: str, plain_case_id: str, judged: Callable[[str, str], CaseResult]) -> None:
    check(judged(candidate, plain_case_id), belongs)
