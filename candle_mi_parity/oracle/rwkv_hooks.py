"""Where candle-mi's hook points lie in :mod:`candle_mi_parity.models.rwkv`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from candle_mi_parity.models.rwkv import TimeMix
from candle_mi_parity.spec.hook_points import SIGNED, STATE, WRITES

Change = Callable[[torch.Tensor], torch.Tensor]


def attach(
    model: Any, at: Callable[[str, torch.Tensor], torch.Tensor], edits: Mapping[str, Sequence[Change]]
) -> list[Any]:
    """Register a hook at each hook point of a model.

    :param at: records a hook point's tensor and returns what takes its place.
    :param edits: those at ``rwkv.writes`` change the factors of what each position writes, [T].
    :returns: the handles that remove the hooks.
    """

    def output(name: str) -> Callable[..., Any]:
        return lambda _module, _args, out: at(name, out)

    handles = [
        model.model.embeddings.register_forward_hook(output("hook_embed")),
        model.model.norm.register_forward_hook(output("hook_final_norm")),
    ]
    for index, layer in enumerate(model.model.layers):
        prefix = f"blocks.{index}."
        mixing = next(module for module in layer.modules() if isinstance(module, TimeMix))
        handles += [
            layer.register_forward_pre_hook(_first_argument(f"{prefix}hook_resid_pre", at)),
            mixing.writes.register_forward_hook(_changed(edits.get(prefix + WRITES, ()))),
            mixing.decay.register_forward_hook(output(f"{prefix}rwkv.hook_decay")),
            mixing.state.register_forward_hook(output(prefix + STATE)),
            mixing.effective_attention.register_forward_hook(_attention(f"{prefix}rwkv.hook_effective_attn", at)),
            layer.register_forward_hook(_first_output(f"{prefix}hook_resid_post", at)),
        ]
    return handles


def alike(tokens: Sequence[Sequence[int]]) -> int:
    """The largest number of positions with the same token behind the same token.

    What is written into the state is rounded in the same way at each of them, and the samples of the noise round each
    in its own: the sum of m equal errors is √m times that of m independent ones.
    """
    return max(max(Counter(pairwise(row)).values(), default=1) for row in tokens)


def _changed(changes: Sequence[Change]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
        for change in changes:
            out = change(out)
        return out

    return hook


def _attention(name: str, at: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        at(name, out[0])
        at(name + SIGNED, out[1])

    return hook


def _first_argument(name: str, at: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda _module, args: (at(name, args[0]), *args[1:])


def _first_output(name: str, at: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda _module, _args, out: (at(name, out[0]), *out[1:])
