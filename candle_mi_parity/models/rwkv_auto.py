"""RWKV-6 and RWKV-7 as classes of transformers, see :mod:`candle_mi_parity.models.rwkv`.

:func:`register` makes both known to transformers' Auto classes. A value of another type is refused, as by its own.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from candle_mi_parity.models.rwkv6 import Settings6, Stack6
from candle_mi_parity.models.rwkv7 import Settings7, Stack7


@strict
class Rwkv6Config(Settings6, transformers.PreTrainedConfig):  # type: ignore[no-untyped-call]
    model_type = "rwkv6"


@strict
class Rwkv7Config(Settings7, transformers.PreTrainedConfig):  # type: ignore[no-untyped-call]
    model_type = "rwkv7"


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


class Rwkv6ForCausalLM(RwkvModel):  # type: ignore[no-untyped-call]
    config_class = Rwkv6Config
    base_model_prefix = "rwkv"
    _tied_weights_keys = {"head.weight": "rwkv.embeddings.weight"}

    def __init__(self, config: Rwkv6Config, *_: Any) -> None:
        super().__init__(config)
        self.rwkv = Stack6(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def model(self) -> Stack6:
        return self.rwkv

    @property
    def lm_head(self) -> nn.Linear:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.rwkv.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Rwkv7ForCausalLM(RwkvModel):  # type: ignore[no-untyped-call]
    config_class = Rwkv7Config
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: Rwkv7Config, *_: Any) -> None:
        super().__init__(config)
        if config.attn or config.hidden_act != "sqrelu":
            raise ValueError("hybrid attention and other activations than sqrelu are not implemented here")
        self.model = Stack7(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> Any:
        return self.model.embeddings

    def get_output_embeddings(self) -> Any:
        return self.lm_head


def register() -> None:
    """Make transformers' Auto classes know both models; it may be called again."""
    for config, model in ((Rwkv6Config, Rwkv6ForCausalLM), (Rwkv7Config, Rwkv7ForCausalLM)):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config, model, exist_ok=True)
