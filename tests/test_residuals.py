"""Residual stream, block outputs and MLP hooks are the truth's, within rounding.

A fault in a block's arithmetic shows here first: `mlp.hook_post` for an activation, `hook_attn_out` for a
projection, `hook_resid_mid` for a norm that is applied in the wrong place.
"""

from collections.abc import Callable

from candle_mi_parity.compare.verdict import CaseResult
from candle_mi_parity.pytest_plugin import check


def belongs(name: str) -> bool:
    if name.startswith("lens"):
        return False
    return "hook_resid" in name or name.startswith("hook_") or "mlp" in name or name.endswith("attn_out")


def test_residuals(candidate: str, plain_case_id: str, judged: Callable[[str, str], CaseResult]) -> None:
    check(judged(candidate, plain_case_id), belongs)
