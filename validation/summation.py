"""Other orders of summation: a dispatch mode that computes float32 matmuls, means and sums in an order of its own.

All orders are right: they differ from each other, and from torch's, by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch.utils._python_dispatch import TorchDispatchMode

from candle_mi_parity.spec.cases import TableRow

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Sums(TableRow):
    """The order in which a matmul adds its terms.

    :ivar order: ``permuted`` also reorders means and sums; ``one_by_one`` is a plain loop.
    :ivar size: terms in a block.
    """

    order: Literal["permuted", "blocks", "one_by_one", "float64", "openblas"]
    seed: int = 0
    size: Annotated[int, Field(ge=1)] = 8


_MATMULS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
_REDUCTIONS = frozenset({"mean", "sum"})


class Reordered(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Matmuls (and, where the order moves single terms, means and sums) in the order that ``sums`` says.

    :ivar calls: how many operations were computed so; a variant in which it stays 0 varied nothing.
    :raises NotImplementedError: a matmul with factors of its own.
    """

    def __init__(self, sums: Sums) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sums = sums
        self._product: Product = {
            "permuted": self._permuted,
            "blocks": self._blocks,
            "one_by_one": _one_by_one,
            "float64": lambda a, b: torch.matmul(a.double(), b.double()).float(),
            "openblas": lambda a, b: torch.from_numpy(np.matmul(a.numpy(), b.numpy())),
        }[sums.order]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func.overloadpacket.__name__), dict(kwargs or {})
        if name in _MATMULS and args[-1].dtype == torch.float32:
            if kwargs:
                raise NotImplementedError(f"{func} with {', '.join(kwargs)}")
            self.calls += 1
            product = self._product(*args[-2:])
            return args[0] + product if len(args) == 3 else product
        if name in _REDUCTIONS and len(args) > 1 and args[0].dtype == torch.float32 and self._moves_terms:
            self.calls += 1
            dim = args[1][0]
            return func(args[0].index_select(dim, self._order(args[0].shape[dim])), *args[1:], **kwargs)
        return func(*args, **kwargs)

    @property
    def _moves_terms(self) -> bool:
        return self._sums.order == "permuted"

    def _order(self, count: int) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng([self._sums.seed, count]).permutation(count))

    def _permuted(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        order = self._order(b.shape[-2])
        return torch.matmul(a.index_select(-1, order), b.index_select(-2, order))

    def _blocks(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = None
        for start in range(0, b.shape[-2], self._sums.size):
            end = start + self._sums.size
            part = torch.matmul(a[..., start:end], b[..., start:end, :])
            total = part if total is None else total.add_(part)
        assert total is not None
        return total


def _one_by_one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Each product rounded, then added to the sum so far: what a plain loop without fused multiply-add does."""
    total = a[..., :1] * b[..., :1, :]
    for k in range(1, b.shape[-2]):
        total.add_(a[..., k : k + 1] * b[..., k : k + 1, :])
    return total
