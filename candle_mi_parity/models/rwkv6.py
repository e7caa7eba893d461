"""RWKV-6 (Finch), see :mod:`candle_mi_parity.models.rwkv`.

Annotations are evaluated here: transformers checks the values of a config against them.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from candle_mi_parity.models.rwkv import (
    HeadNorm,
    Shift,
    TimeMix,
    dot,
    fitting,
    heads,
    normalised_columns,
    outer,
    times,
)

MIXED = "wkvrg"
"""What is computed from the stream mixed with the position before it, in the order of ``time_maa_w2``."""
MIX_RANK, DECAY_RANK = 32, 64
"""Ranks of the two low-rank projections, which the config does not have; twice that at a width of 4096."""
SMALLEST = 2.0**-150
"""Half of float32's smallest number: what is below it becomes 0."""
WIDE = 4096
"""The width at which the ranks are twice as large."""


@dataclass
class Settings6:
    """What of ``config.json`` decides the numbers, with the defaults of the published code."""

    vocab_size: int = 65536
    hidden_size: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 64
    head_size: int | None = None
    head_size_divisor: int = 8
    intermediate_size: int | None = None
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    @property
    def head_width(self) -> int:
        """``num_attention_heads`` holds the size of a head, as ``head_size`` does."""
        return fitting(self.head_size or self.num_attention_heads, self.hidden_size)

    @property
    def head_norm_eps(self) -> float:
        """1e-5·divisor², whatever ``layer_norm_epsilon`` is."""
        return 1e-5 * self.head_size_divisor**2

    @property
    def inner_size(self) -> int:
        return self.intermediate_size or int(self.hidden_size * 3.5) // 32 * 32


class TimeMix6(TimeMix):
    """``S ← diag(w) S + k vᵀ`` with ``w = exp(−exp(d))``, read before that with a bonus: ``rᵀ (S + diag(u) k vᵀ)``.

    The hook of the decay has ``w``.
    """

    def __init__(self, config: Settings6) -> None:
        super().__init__()
        size, self.width = config.hidden_size, config.head_width
        factor = 2 if size == WIDE else 1
        for name in "x" + MIXED:
            self.register_parameter(f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, size)))
        self.rank = MIX_RANK * factor
        self.time_maa_w1 = nn.Parameter(torch.empty(size, len(MIXED) * self.rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(MIXED), self.rank, size))
        self.time_decay = nn.Parameter(torch.empty(1, 1, size))
        self.time_decay_w1 = nn.Parameter(torch.empty(size, DECAY_RANK * factor))
        self.time_decay_w2 = nn.Parameter(torch.empty(DECAY_RANK * factor, size))
        self.time_faaaa = nn.Parameter(torch.empty(size // self.width, self.width))
        self.receptance, self.key = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.value, self.gate = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.output = nn.Linear(size, size, bias=False)
        self.ln_x = HeadNorm(size, config.head_norm_eps)
        self.loses_vanished = False
        """Whether effective attention is lost where the decay is 0 in float32, for a counterfactual."""

    def _mixed(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stream mixed with the position before, by weights that depend on both."""
        delta = self.time_shift(x)
        low = torch.tanh((x + delta * self.time_maa_x).flatten(0, 1) @ self.time_maa_w1)
        mixed = {}
        for index, name in enumerate(MIXED):
            part = low[:, index * self.rank : (index + 1) * self.rank]
            own = (part @ self.time_maa_w2[index]).reshape(x.shape)
            mixed[name] = x + delta * (self.get_parameter(f"time_maa_{name}") + own)
        return mixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self._mixed(x)
        read, key, value = self.receptance(mixed["r"]), self.key(mixed["k"]), self.value(mixed["v"])
        gate = functional.silu(self.gate(mixed["g"]))
        low = torch.tanh(mixed["w"].flatten(0, 1) @ self.time_decay_w1) @ self.time_decay_w2
        rate = (self.time_decay + low.reshape(x.shape)).float()
        decay = self.decay(heads((-rate.exp()).exp(), self.width))
        read, key, value = (heads(each, self.width).float() for each in (read, key, value))
        out = self.ln_x(self._recurrence(read, decay, key, value, self.time_faaaa.float()))
        result: torch.Tensor = self.output(out.to(x.dtype) * gate)
        return result

    def _recurrence(
        self, read: torch.Tensor, decay: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bonus: torch.Tensor
    ) -> torch.Tensor:
        """:param bonus: [n, D]; the others, and the result, are [B, T, n, D]."""
        batch, length, count, width = key.shape
        writes, attended = self.factors(length)
        state = torch.zeros(batch, count, width, width, dtype=key.dtype)
        outs = []
        for at in range(length):
            combined = outer(key, value, at) * bonus[:, :, None] + state
            out = torch.bmm(read[:, at].reshape(-1, 1, width), combined.reshape(-1, width, width))
            outs.append(out.reshape(batch, count, width))
            state = times(outer(key, value, at), writes[at]) + state * decay[:, at, :, :, None]
        self.state(state)
        lost = (decay < SMALLEST).any(-1).cumsum(1) > 0 if self.loses_vanished else None
        self.effective_attention(effective_attention(read, decay, key, bonus, attended, lost))
        return torch.stack(outs, dim=1)


def effective_attention(
    read: torch.Tensor,
    decay: torch.Tensor,
    key: torch.Tensor,
    bonus: torch.Tensor,
    factors: list[float],
    lost: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each source contributes to each query's output, see :func:`normalised_columns`.

    ``Σ r_t k_i Π w_j`` over the positions j between source and query; ``Σ r_t k_t u`` for the query itself, which is
    read before it is written.

    :param lost: sources to which no later query attends, [B, T, n]; None for a truth.
    """
    back = read[:, :0].transpose(1, 2)
    columns = []
    for at in reversed(range(key.shape[1])):
        own = dot(read[:, at, :, None], key[:, at] * bonus)
        later = times(dot(back, key[:, at]), factors[at])
        if lost is not None:
            later = later.masked_fill(lost[:, at, :, None], 0.0)
        columns.append(torch.cat((own, later), dim=-1))
        back = torch.cat((read[:, at, :, None], back * decay[:, at, :, None]), dim=2)
    return normalised_columns(columns[::-1])


class ChannelMix6(nn.Module):
    """``sigmoid(receptance(…))·value(relu(key(…))²)`` of the stream mixed with the position before it."""

    def __init__(self, config: Settings6) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.inner_size
        self.time_shift = Shift()
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, size))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, size))
        self.key, self.value = nn.Linear(size, inner, bias=False), nn.Linear(inner, size, bias=False)
        self.receptance = nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = self.time_shift(x)
        value: torch.Tensor = self.value(self.key(x + delta * self.time_maa_k).relu().square())
        gated: torch.Tensor = self.receptance(x + delta * self.time_maa_r).sigmoid() * value
        return gated


class Block6(nn.Module):
    def __init__(self, config: Settings6, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_epsilon
        self.pre_ln = nn.LayerNorm(size, eps) if layer == 0 else nn.Identity()
        self.ln1, self.ln2 = nn.LayerNorm(size, eps), nn.LayerNorm(size, eps)
        self.attention, self.feed_forward = TimeMix6(config), ChannelMix6(config)

    def forward(self, x: torch.Tensor, _first: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        x = self.pre_ln(x)
        x = x + self.attention(self.ln1(x))
        return x + self.feed_forward(self.ln2(x)), None


class Stack6(nn.Module):
    def __init__(self, config: Settings6) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block6(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    @property
    def norm(self) -> nn.LayerNorm:
        return self.ln_out
