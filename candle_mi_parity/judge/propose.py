"""Rows of ``fixtures/explanations.toml`` for new divergences and refusals, to be completed by hand."""

from __future__ import annotations

import re

from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.explanations import Refusal, Stage, load_explanations, proposed


def proposals(result: RunResult) -> list[str]:
    """One row for each new refusal, and for each cause of new divergences that a search has found."""
    table, release = load_explanations(), result.identity.get("version", "")
    found: dict[str, str] = {}
    for case in result.cases:
        if case.status is Status.FAIL and (answer := _answer(case)) is not None:
            found.setdefault(answer.model_dump_json(), proposed(answer, case.family, release, table))
    return list(found.values()) or ["# no new refusal, and no new divergence with an explanation"]


def _answer(case: CaseResult) -> Counterfactual | Refusal | None:
    if case.failure is not None and case.failure.refused:
        message = case.error.partition(": ")[2]
        return Refusal(stage=Stage(case.failure), message=re.escape(message))
    if case.explained is not None and case.explained.key:
        return Counterfactual.model_validate_json(case.explained.key)
    return None
