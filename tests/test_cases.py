"""Every case against every candidate, judged once; each group of tensors is a subtest.

The groups are defined in the files beside this one, which test each on the plain cases.
"""

from collections.abc import Callable

import pytest

from candle_mi_parity.compare.verdict import CaseResult
from tests import test_attention, test_encodings, test_logits, test_mse, test_residuals
from tests.plugin import check

GROUPS = {
    "residuals": test_residuals.belongs,
    "attention": test_attention.belongs,
    "logits": test_logits.belongs,
    "encodings": test_encodings.belongs,
    "mse": test_mse.belongs,
}


@pytest.mark.every(5)  # `make parity` judges all
def test_case(
    candidate: str, case_id: str, judged: Callable[[str, str], CaseResult], subtests: pytest.Subtests
) -> None:
    result = judged(candidate, case_id)
    check(result, lambda name: True)  # a known divergence ends here
    for group, belongs in GROUPS.items():
        if any(belongs(tensor.name) for tensor in result.tensors):
            with subtests.test(group):
                check(result, belongs)


def test_every_tensor_of_a_case_belongs_to_a_group(judged: Callable[[str, str], CaseResult]) -> None:
    names = {tensor.name for case_id in ("gemma2/hub", "llama/hub") for tensor in judged("0.2.2", case_id).tensors}
    assert [name for name in names if sum(belongs(name) for belongs in GROUPS.values()) != 1] == []
