"""What RWKV-6 and RWKV-7 have in common, in torch alone; transformers has neither.

The formulas are those of the papers: RWKV-6 (Finch) of Peng et al. 2024 (arXiv:2404.05892, section 4), RWKV-7
(Goose) of Peng et al. 2025 (arXiv:2503.14456, section 4). Config keys and names of tensors are those of published
checkpoints: RWKV-6 as in ``RWKV/v6-Finch-1B6-HF``, RWKV-7 as flash-linear-attention saves it.
:mod:`candle_mi_parity.models.rwkv_auto` makes both known to transformers; ``repro`` copies this module and one of the
others beside its script.

A tensor that is a hook point but no output of a layer goes through an ``nn.Identity``, to which a hook can be
attached. In bfloat16 the recurrence and the norm of its heads are computed in float32, as in RWKV-6's published code.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

SMALLEST_SUM = 1e-10
"""Added to the sum by which a row of effective attention is divided."""


def fitting(width: int, size: int) -> int:
    """The width of a head.

    :raises ValueError: no number of heads has the width of the model.
    """
    if width < 1 or size % width or not size:
        raise ValueError(f"a width of {size} is not a number of heads of {width}")
    return width


class Shift(nn.Module):
    """What is added to each position of [B, T, d] to make it the position before; zero lies before the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1) - x


def heads(x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, T, n·D] → [B, T, n, D]."""
    return x.reshape(*x.shape[:2], -1, width)


def dot(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """[B, n, R, D] times [B, n, D] → [B, n, R]."""
    batch, count, many, width = rows.shape
    flat = rows.reshape(batch * count, many, width)
    return torch.bmm(flat, vector.reshape(batch * count, width, 1)).reshape(batch, count, many)


class HeadNorm(nn.Module):
    """A group norm of [B, T, n, D] with a group a head, → [B, T, n·D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = functional.layer_norm(x, x.shape[-1:], None, None, self.eps).flatten(2)
        return normed * self.weight.float() + self.bias.float()


class TimeMix(nn.Module):
    """What the time mixing of both versions has in common.

    :ivar decay: its output is [B, T, n, D].
    :ivar state: its output is the state after the last position, [B, n, D, D], key by value.
    :ivar effective_attention: its output is twice [B, n, T, T], without negative weights and with them.
    :ivar writes: its output is the factor of each position's write into the state, [T], which is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.time_shift = Shift()
        self.writes, self.decay = nn.Identity(), nn.Identity()
        self.state, self.effective_attention = nn.Identity(), nn.Identity()
        self.attends_to_unwritten = False
        """Whether effective attention is computed as if ``writes`` were 1, for a counterfactual."""

    def factors(self, length: int) -> tuple[list[float], list[float]]:
        """The factors of what each position writes, and those that effective attention takes for them."""
        writes: list[float] = self.writes(torch.ones(length)).tolist()
        return writes, [1.0] * length if self.attends_to_unwritten else writes


def outer(key: torch.Tensor, value: torch.Tensor, at: int) -> torch.Tensor:
    """k vᵀ of position ``at``, [B, n, D, D], of key and value [B, T, n, D]."""
    return key[:, at, :, :, None] * value[:, at, :, None, :]


def times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The product, for which nothing is rounded where the factor is 1."""
    return tensor if factor == 1 else tensor * factor


def normalised_columns(columns: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of each source for the queries from its own position on, [B, n, T − source] → [B, n, T, T].

    Negative weights become 0, and each row is divided by its sum.

    :returns: also the weights with their signs, divided by the same sums.
    """
    rows = columns[0].shape[-1]
    filled = [torch.cat((c.new_zeros(*c.shape[:2], rows - c.shape[-1]), c), dim=-1) for c in columns]
    weights = torch.stack(filled, dim=-1)
    positive = weights.relu()
    sums = positive.sum(-1, keepdim=True) + SMALLEST_SUM
    return positive / sums, weights / sums
