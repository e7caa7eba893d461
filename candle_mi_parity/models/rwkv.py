"""RWKV-6 and RWKV-7 in torch, for transformers, which has neither.

The formulas are those of the papers: RWKV-6 (Finch) of Peng et al. 2024 (arXiv:2404.05892, section 4), RWKV-7
(Goose) of Peng et al. 2025 (arXiv:2503.14456, section 4). Config keys and names of tensors are those of published
checkpoints: RWKV-6 as in ``RWKV/v6-Finch-1B6-HF``, RWKV-7 as flash-linear-attention saves it. :func:`register` makes
both known to transformers' Auto classes.

A tensor that is a hook point but no output of a layer goes through an ``nn.Identity``, to which a hook can be
attached. In bfloat16 the recurrence and the norm of its heads are computed in float32, as in RWKV-6's published code.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

SMALLEST_SUM = 1e-10
"""Added to the sum by which a row of effective attention is divided."""
DECAY_SCALE = 0.6065306597126334
"""exp(-1/2), the largest rate at which RWKV-7's state decays."""
MIX_RANK, DECAY_RANK = 32, 64
"""Ranks of RWKV-6's two low-rank projections, which its config does not have; twice that at a width of 4096."""


class Rwkv6Config(transformers.PreTrainedConfig):  # type: ignore[no-untyped-call]
    model_type = "rwkv6"
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
        return self.head_size or self.num_attention_heads

    @property
    def head_norm_eps(self) -> float:
        """1e-5·divisor², whatever ``layer_norm_epsilon`` is."""
        return 1e-5 * self.head_size_divisor**2

    @property
    def inner_size(self) -> int:
        return self.intermediate_size or int(self.hidden_size * 3.5) // 32 * 32


class Rwkv7Config(transformers.PreTrainedConfig):  # type: ignore[no-untyped-call]
    model_type = "rwkv7"
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
        return self.head_dim or self.hidden_size // (self.num_heads or 1)

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


class RwkvModel(transformers.PreTrainedModel):  # type: ignore[no-untyped-call]
    """The common part of the two models, which have the stream, ``layers``, ``norm`` and ``lm_head``."""

    _supports_attention_backend = True

    def _init_weights(self, _module: nn.Module) -> None:
        """All weights come from files."""

    def forward(self, input_ids: torch.Tensor, **_unused: Any) -> CausalLMOutput:
        """Logits [B, T, V] of token ids [B, T]."""
        inner: Any = self.model
        stream, first_value = inner.embeddings(input_ids), None
        for layer in inner.layers:
            stream, first_value = layer(stream, first_value)
        return CausalLMOutput(logits=self.lm_head(inner.norm(stream)))


def register() -> None:
    """Make transformers' Auto classes know both models; it may be called again."""
    from candle_mi_parity.models.rwkv6 import Rwkv6ForCausalLM
    from candle_mi_parity.models.rwkv7 import Rwkv7ForCausalLM

    for config, model in ((Rwkv6Config, Rwkv6ForCausalLM), (Rwkv7Config, Rwkv7ForCausalLM)):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config, model, exist_ok=True)
