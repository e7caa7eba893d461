"""A range of layers that is run several times within transformers' forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from candle_mi_parity.errors import OracleError
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual, Variant
from candle_mi_parity.spec.recurrent import Feedback, Recurrent, feedback_key

Fed = list[tuple[Feedback, torch.Tensor]]
"""Each feedback with its vector [d]."""


class Recurrence:
    """Repeats the layers of :class:`Recurrent` while a model runs.

    :ivar again: whether a pass after the first is running.
    :param fed: the vectors that are added, in the format and on the device of the model.
    :param variants: other arithmetic, for a counterfactual.
    """

    def __init__(self, spec: Recurrent, fed: Fed, variants: frozenset[Variant] = frozenset()) -> None:
        self.again = False
        self._first, self._last = spec.layers
        self._depth, self._fed, self._variants = spec.depth, fed, variants
        self._given: torch.Tensor | None = None
        self._calls: dict[int, dict[str, Any]] = {}

    def watch(self, layers: nn.ModuleList) -> list[Any]:
        """Keep the arguments of the layers; register it before the hooks that change a layer's input."""
        held = range(self._first, self._last + 1)
        return [layers[i].register_forward_pre_hook(self._keep(i), with_kwargs=True) for i in held]

    def repeat(self, layers: nn.ModuleList) -> Any:
        """Run the range again when it ends; register it after the hooks that change a layer's output."""

        def hook(_module: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
            if self.again:
                return out
            if not isinstance(out, torch.Tensor):
                raise OracleError(f"a layer gives {type(out).__name__}, expected a tensor")
            self.again = True
            try:
                for _ in range(1, self._depth):
                    out = self._next_input(out)
                    for index in range(self._first, self._last + 1):
                        out = layers[index](out, **self._calls[index])
            finally:
                self.again = False
            return out

        return layers[self._last].register_forward_hook(hook)

    def _keep(self, index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.again:
                return None
            self._calls[index] = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            stream = args[0] if args else kwargs["hidden_states"]
            if index == self._first:
                self._given = stream
                if Variant.FEEDBACK_FROM_THE_FIRST_PASS in self._variants:
                    stream = self._added(stream)
            return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

        return hook

    def _next_input(self, out: torch.Tensor) -> torch.Tensor:
        if not self._fed:
            return out
        assert self._given is not None
        return self._added(out if Variant.FEEDBACK_ON_THE_OUTPUT in self._variants else self._given)

    def _added(self, stream: torch.Tensor) -> torch.Tensor:
        """The stream [B, T, d] with the feedback; a row has its own vectors, so that samples are independent."""
        places = torch.arange(stream.shape[1], device=stream.device)[:, None]
        for row, vector in self._fed:
            scaled = vector.expand(stream.shape[0], 1, -1) * row.strength
            stream = torch.where(places.eq(row.position), stream + scaled, stream)
        return stream


def recurrence_of(
    subject: PreparedCase, drawn: dict[str, torch.Tensor], change: Counterfactual = PLAIN
) -> Recurrence | None:
    """The recurrence of a case for one forward pass; None without one.

    :param drawn: the case's tensors, in the format and on the device of the model.
    :param change: what is changed in it.
    """
    if subject.case.recurrent is None:
        return None
    spec = change.recurrent or subject.case.recurrent
    vectors = {(row.seed, row.size): drawn[feedback_key(i)] for i, row in enumerate(subject.case.recurrent.feedback)}
    fed = [(row, vectors[row.seed, row.size]) for row in spec.feedback]
    return Recurrence(spec, fed, frozenset(change.variants))
