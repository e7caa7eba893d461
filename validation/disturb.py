"""Functions that disturb transformers' float32 run, by the name that a row gives as ``function``.

Each run has its own model, so that hooks and changed weights do not leak; :meth:`Running.patch` restores what it
patches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn

from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle import hooks
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.trace.trace import InMemory
from tests.support.planting import Arrays

Tensor = torch.Tensor
How = Callable[["Running", Any], object]
"""``how(run, change)`` plants a change, for example :meth:`Running.norms`."""


@dataclass
class Running:
    """A run that is about to start.

    :ivar subject: its input; a function may replace it.
    :ivar captured: tensors that replace the recorded ones.
    :ivar after: changes of the arrays, and of what else the run leaves.
    """

    subject: PreparedCase
    model: Any
    sae: TorchSae | None
    stack: ExitStack
    captured: dict[str, Tensor] = field(default_factory=dict)
    after: list[Callable[[Arrays, InMemory], None]] = field(default_factory=list)

    def patch(self, target: object, name: str, value: object) -> None:
        self.stack.enter_context(mock.patch.object(target, name, value))

    @property
    def layers(self) -> Any:
        return self.model.model.layers

    def modules(self, kind: type[nn.Module]) -> list[Any]:
        """The model's modules of a class."""
        return [module for module in self.model.modules() if isinstance(module, kind)]

    @property
    def modeling(self) -> Any:
        """transformers' module of the model's family."""
        return importlib.import_module(type(self.model).__module__)

    def attention(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the arguments of attention: module, query, key, value, attention_mask, scaling, softcap."""

        def wrapped(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any) -> Any:
            given = {"module": module, "query": query, "key": key, "value": value, "attention_mask": mask, **rest}
            change(given)
            return hooks.attention(**given)

        register = transformers.AttentionInterface.register
        register(hooks.our_attention(), wrapped)
        self.stack.callback(register, hooks.our_attention(), hooks.attention)

    def softmax(self, instead: Callable[[Tensor], Tensor]) -> None:
        """Another softmax over the last axis, for attention."""
        self.patch(torch, "softmax", lambda scores, dim, dtype=None: instead(scores))

    def rotary(self, instead: Callable[[Callable[..., Any], Tensor, Tensor, Tensor, Tensor], Any]) -> None:
        """Another rotation: ``instead(original, q, k, cos, sin)``."""
        original = self.modeling.apply_rotary_pos_emb

        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> Any:
            return instead(original, q, k, cos, sin)

        self.patch(self.modeling, "apply_rotary_pos_emb", rotate)

    def norms(self, instead: Callable[[Any, Tensor], Tensor]) -> None:
        """Another forward of the family's RMSNorm: ``instead(module, x)``."""
        self.patch(type(self.model.model.norm), "forward", instead)


def output(module: Any, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace a module's output by ``change(input, output)``, before it is recorded."""

    def hook(_module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (change(args[0] if args else out[0], out[0]), *out[1:])
        return change(args[0], out)

    module.register_forward_hook(hook)


def outputs(modules: Iterable[Any], change: Callable[[Any, Tensor], Tensor]) -> None:
    """Replace the output of each module by ``change(module, input)``."""
    for module in modules:
        output(module, lambda x, _, module=module: change(module, x))  # type: ignore[misc]


FUNCTIONS: dict[str, tuple[How, Callable[..., Any]]] = {}


def directly(run: Running, change: Callable[[Running], object]) -> object:
    return change(run)


def register(how: How, **changes: Callable[..., object]) -> None:
    """Register each change under its name; it is planted by ``how(run, change)``.

    :raises ValueError: a name is given twice.
    """
    if twice := FUNCTIONS.keys() & changes.keys():
        raise ValueError(f"registered twice: {', '.join(twice)}")
    FUNCTIONS.update({name: (how, change) for name, change in changes.items()})


def fault(how: How = directly) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function under its own name, as :func:`register` does."""

    def registered(change: Callable[..., Any]) -> Callable[..., Any]:
        register(how, **{change.__name__: change})
        return change

    return registered
