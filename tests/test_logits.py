"""Logits of every case are the truth's, within rounding; a next token may differ only at a tie."""

from collections.abc import Callable

from candle_mi_parity.compare.verdict import CaseResult
from candle_mi_parity.pytest_plugin import check


def test_logits(candidate: str, case_id: str, judged: Callable[[str, str], CaseResult]) -> None:
    check(judged(candidate, case_id), lambda name: name.startswith("logits"))
