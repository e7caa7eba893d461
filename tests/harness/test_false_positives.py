"""Honest variants of the arithmetic are inside the gate; docs/sensitivity.md records the many that were tried."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.oracle.hooks import load_model
from tests.support.planting import failures, real


class OneByOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """float32 matmuls whose terms are added one after the other, as a plain loop does.

    :param factor: of every product; 1 is honest.
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._factor, self.calls = factor, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_matmul = func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm")
        if not is_matmul or args[-1].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        a, b = args[-2:]
        total = a[..., :1] * b[..., :1, :]
        for k in range(1, b.shape[-2]):
            total.add_(a[..., k : k + 1] * b[..., k : k + 1, :])
        total *= self._factor
        return args[0] + total if len(args) == 3 else total


class OtherAttention(TorchSource):
    """transformers' own attention code, in which scores and patterns cannot be recorded."""

    def model(self, directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        return load_model(directory, dtype, self.device, "sdpa")


def results_of(source: TorchSource, mode: AbstractContextManager[object], whole: bool = True) -> list[TensorResult]:
    """A float32 run of the plain Llama, compared with its truth.

    :param whole: whether the run records every tensor; if not, only those that it records are compared.
    """
    case = real("llama/hub")
    with source, mode:
        run = source.trace(case.subject, "free", case.truth, case.inputs)
    return compare(case.truth, run, None, None if whole else set(run.arrays))


def test_another_order_of_summation_is_inside_the_gate() -> None:
    mode = OneByOne()
    results = results_of(TorchSource(), mode)
    assert mode.calls and not failures(results)
    assert 0.2 < max(result.position_ratio for result in results) < 4
    assert max(result.element_ratio for result in results) < 16


@pytest.mark.parametrize("factor", [1 + 1e-4, 1 - 1e-4])
def test_a_wrong_sum_fails(factor: float) -> None:
    assert failures(results_of(TorchSource(), OneByOne(factor)))


def test_another_attention_code_is_inside_the_gate() -> None:
    assert not failures(results_of(OtherAttention(), nullcontext(), whole=False))
    assert "blocks.0.attn.hook_scores" in failures(results_of(OtherAttention(), nullcontext()))
