"""The pytest plugin of every environment in which candle-mi-parity is installed: one fixture, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from candle_mi_parity.compare.check_result import CheckResult


@pytest.fixture
def assert_parity() -> Callable[..., CheckResult]:
    """``assert_parity(model=…, prompt=…, sae=…)`` fails the test unless :func:`candle_mi_parity.check` passes."""
    from candle_mi_parity import check  # here, because it takes a second that other tests need not wait
    from candle_mi_parity.compare.verdict import Status
    from candle_mi_parity.files.escape import printable

    def holds(**asked: Any) -> CheckResult:
        result = check(**asked)
        if not result.agrees:
            wrong = [p.case.message() for p in result.prompts if p.case.status is not Status.PASS]
            pytest.fail(printable("\n".join([result.sentence, *wrong[:3]])), pytrace=False)
        return result

    return holds
