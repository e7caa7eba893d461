"""Queries, keys, values, scores and patterns are the truth's, within rounding.

Rotary faults show at `hook_scores` (q and k are captured before rotary), mask and softcap faults at
`hook_pattern` (scores are captured before both).
"""

from collections.abc import Callable

from candle_mi_parity.compare.verdict import CaseResult
from tests.plugin import check


def belongs(name: str) -> bool:
    return ".attn." in name


def test_attention(candidate: str, attentive_case_id: str, judged: Callable[[str, str], CaseResult]) -> None:
    check(judged(candidate, attentive_case_id), belongs)
