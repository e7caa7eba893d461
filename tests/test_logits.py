"""Logits and logit lens equal the truth within rounding; a next token may differ only at a tie."""

from collections.abc import Callable

from candle_mi_parity.compare.verdict import CaseResult
from tests.plugin import check


def belongs(name: str) -> bool:
    return name.startswith(("logits", "lens"))


def test_logits(candidate: str, plain_case_id: str, judged: Callable[[str, str], CaseResult]) -> None:
    check(judged(candidate, plain_case_id), belongs)
