"""The truth has not changed: each case against its golden, to 1e-9 of each array's rms.

Goldens come from the float64 oracle alone. They fail where an upgrade of a library changes a truth.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pytest_regressions.ndarrays_regression import NDArraysRegressionFixture

from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.paths import FIXTURES, cache_root
from candle_mi_parity.trace.truth import TruthTensor
from tests.support.goldens import Golden, GoldenError, has_golden

CASES = {case.id: case for case in load_cases() if has_golden(case)}


@pytest.mark.parametrize("case_id", CASES)
def test_golden(case_id: str, ndarrays_regression: NDArraysRegressionFixture, request: pytest.FixtureRequest) -> None:
    subject = prepare(CASES[case_id], cache_root())
    golden = Golden(subject, Oracle(subject, cache_root()).truth(), FIXTURES / "goldens")
    option = request.config.option
    if option.force_regen or option.regen_all:
        golden.record(option.reason)
    else:
        golden.check()
    ndarrays_regression.check(golden.arrays(), fullpath=golden.path, tolerances=golden.tolerances())


def test_a_golden_of_other_tokens_or_of_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    subject = prepare(CASES["llama/hub"], cache_root())
    golden = Golden(subject, Oracle(subject, cache_root()).truth(), tmp_path)
    with pytest.raises(GoldenError, match="no such file"):
        golden.check()
    golden.record("for this test alone")
    golden.check()
    with pytest.raises(GoldenError, match=r"stale golden llama-hub\.npz: tokens changed"):
        replace(golden, subject=replace(subject, tokens=[[1, 2]])).check()
    nan = np.full((1, 2, 3), np.nan)
    tensors = {**golden.truth.tensors, "logits": TruthTensor(nan, nan)}
    with pytest.raises(GoldenError, match="logits of the truth holds NaN or Inf"):
        replace(golden, truth=replace(golden.truth, tensors=tensors)).check()
