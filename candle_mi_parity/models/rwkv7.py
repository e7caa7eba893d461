"""RWKV-7 (Goose), see :mod:`candle_mi_parity.models.rwkv`.

Annotations are evaluated here: transformers checks the values of a config against them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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

DECAY_SCALE = 0.6065306597126334
"""exp(-1/2), the largest rate at which the state decays."""
SMALLEST_LENGTH = 1e-12
"""A shorter key is not normalised to a length of 1."""
MIXED = "rwkvag"
"""What is computed from the stream mixed with the position before it, each with its own weights."""


@dataclass
class Settings7:
    """What of ``config.json`` decides the numbers, with the defaults of the published code."""

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    head_dim: int | None = 64
    num_heads: int | None = None
    hidden_ratio: float | None = 4.0
    intermediate_size: int | None = None
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5
    attn: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @property
    def head_width(self) -> int:
        if self.head_dim is None and self.num_heads is None:
            raise ValueError("give `head_dim` or `num_heads`")
        return fitting(self.head_dim or self.hidden_size // (self.num_heads or 1), self.hidden_size)

    @property
    def head_norm_eps(self) -> float:
        return self.head_width * self.norm_eps

    @property
    def inner_size(self) -> int:
        return self.intermediate_size or -(int(self.hidden_size * (self.hidden_ratio or 4)) // -32) * 32

    def rank(self, of: str) -> int:
        """The rank of a low-rank projection: ``decay``, ``a``, ``v`` or ``gate``."""
        scale = {"decay": 2.5, "a": 2.5, "v": 1.7, "gate": 5.0}[of] * self.hidden_size**0.5
        default = max(32, round(scale * (1 if of == "gate" else self.head_width / 64) / 32) * 32)
        return int(getattr(self, f"{of}_low_rank_dim") or default)


class LowRank(nn.Module):
    """``up(activation(down(x)))``; the tensors are named ``lora.0`` and ``lora.2``."""

    def __init__(self, size: int, rank: int, activation: type[nn.Module], bias: bool = True) -> None:
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(size, rank, bias=False), activation(), nn.Linear(rank, size, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lora(x)
        return out


class TimeMix7(TimeMix):
    """``S ← diag(e^w) S − (κ a)(κᵀ S) + k vᵀ``, read by ``r`` after the update; the hook of the decay has ``w``."""

    def __init__(self, config: Settings7, layer: int) -> None:
        super().__init__()
        size, self.width = config.hidden_size, config.head_width
        for name in MIXED:
            self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(1, 1, size)))
        self.k_k, self.k_a = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.r_k = nn.Parameter(torch.empty(size // self.width, self.width))
        self.r_proj, self.k_proj = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.v_proj, self.o_proj = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.w_lora = LowRank(size, config.rank("decay"), nn.Tanh)
        self.a_lora = LowRank(size, config.rank("a"), nn.Identity)
        self.g_lora = LowRank(size, config.rank("gate"), nn.Sigmoid, bias=False)
        self.v_lora = LowRank(size, config.rank("v"), nn.Identity) if layer else None
        self.g_norm = HeadNorm(size, config.head_norm_eps)
        self.eps_in_root = False
        """Whether :data:`SMALLEST_LENGTH` is added to the square of a key's length, for a counterfactual."""

    def _length(self, squared: torch.Tensor) -> torch.Tensor:
        """The number by which a key is divided, given the square of its length."""
        return (squared + SMALLEST_LENGTH).sqrt() if self.eps_in_root else squared.sqrt().clamp_min(SMALLEST_LENGTH)

    def forward(self, x: torch.Tensor, first: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """:param first: the values of layer 0, [B, T, d]; None in layer 0.

        :returns: the output, and the values of layer 0.
        """
        delta = self.time_shift(x)
        mixed = {name: x + delta * self.get_parameter(f"x_{name}") for name in MIXED}
        read, key, value = self.r_proj(mixed["r"]), self.k_proj(mixed["k"]), self.v_proj(mixed["v"])
        rate = self.decay(heads(self.w_lora(mixed["w"]).float().sigmoid() * -DECAY_SCALE, self.width))
        if self.v_lora is None:
            first = value
        else:
            value = value + (first - value) * self.v_lora(mixed["v"]).sigmoid()
        rank_one = self.a_lora(mixed["a"]).sigmoid()
        gate = self.g_lora(mixed["g"])
        scaled = heads(key * self.k_k, self.width).float()
        removed = scaled / self._length(scaled.square().sum(-1, keepdim=True))
        key = key + key * (rank_one - 1) * self.k_a
        read, key, value, rank_one = (heads(each, self.width).float() for each in (read, key, value, rank_one))
        out = self._recurrence(read, rate.exp(), key, value, removed, removed * rank_one)
        bonus = (read * self.r_k.float()).flatten(0, 2)[:, None].bmm(key.flatten(0, 2)[..., None])
        corrected = self.g_norm(out) + (bonus.reshape(*read.shape[:3], 1) * value).flatten(2)
        assert first is not None
        return self.o_proj((corrected * gate.float()).to(x.dtype)), first

    def _recurrence(
        self,
        read: torch.Tensor,
        decay: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        removed: torch.Tensor,
        added: torch.Tensor,
    ) -> torch.Tensor:
        """All arguments, and the result, are [B, T, n, D]."""
        batch, length, count, width = key.shape
        writes, attended = self.factors(length)
        state = torch.zeros(batch, count, width, width, dtype=key.dtype)
        outs = []
        for at in range(length):
            seen = torch.bmm(-removed[:, at].reshape(-1, 1, width), state.reshape(-1, width, width))
            moved = added[:, at, :, :, None] * seen.reshape(batch, count, 1, width)
            state = state * decay[:, at, :, :, None] + moved + times(outer(key, value, at), writes[at])
            out = torch.bmm(read[:, at].reshape(-1, 1, width), state.reshape(-1, width, width))
            outs.append(out.reshape(batch, count, width))
        self.state(state)
        self.effective_attention(effective_attention(read, decay, key, removed, added, attended))
        return torch.stack(outs, dim=1)


def effective_attention(
    read: torch.Tensor,
    decay: torch.Tensor,
    key: torch.Tensor,
    removed: torch.Tensor,
    added: torch.Tensor,
    factors: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each source contributes to each query's output, see :func:`normalised_columns`.

    A query's ``r`` is taken back through the transitions of the state, ``l ← e^w l − (l·κ a) κ``, and multiplied by
    each source's key.
    """
    length = key.shape[1]
    back = read[:, :0].transpose(1, 2)
    columns = []
    for at in reversed(range(length)):
        back = torch.cat((read[:, at, :, None], back), dim=2)
        columns.append(times(dot(back, key[:, at]), factors[at]))
        along = dot(back, added[:, at])[..., None] * -removed[:, at, :, None]
        back = back * decay[:, at, :, None] + along
    return normalised_columns(columns[::-1])


class ChannelMix7(nn.Module):
    """``value(relu(key(x mixed with the position before))²)``."""

    def __init__(self, config: Settings7) -> None:
        super().__init__()
        self.time_shift = Shift()
        self.x_k = nn.Parameter(torch.empty(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.value = nn.Linear(config.inner_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.value(self.key(x + self.time_shift(x) * self.x_k).relu().square())
        return out


class Block7(nn.Module):
    def __init__(self, config: Settings7, layer: int) -> None:
        super().__init__()
        size = config.hidden_size

        def norm() -> nn.Module:
            return nn.LayerNorm(size, config.norm_eps, bias=config.norm_bias)

        self.pre_norm = norm() if layer == 0 and config.norm_first else nn.Identity()
        self.attn_norm, self.ffn_norm = norm(), norm()
        self.attn, self.ffn = TimeMix7(config, layer), ChannelMix7(config)

    def forward(self, x: torch.Tensor, first: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.pre_norm(x)
        out, first = self.attn(self.attn_norm(x), first)
        x = x + out
        return x + self.ffn(self.ffn_norm(x)), first


class Stack7(nn.Module):
    def __init__(self, config: Settings7) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block7(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)
