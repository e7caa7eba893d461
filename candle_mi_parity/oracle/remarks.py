"""What is stored with a truth: tensors that are constant, and values beyond the format's range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from candle_mi_parity.oracle.hooks import recorded, scalings
from candle_mi_parity.spec.hook_points import format_of
from candle_mi_parity.trace.truth import Expected


def constant(tensors: Mapping[str, Expected]) -> dict[str, float]:
    """Tensors with several compared entries that are all equal, and their value; such tensors exercise nothing."""
    found = {}
    for name, tensor in tensors.items():
        value = tensor.value
        if tensor.allowed is not None:
            value = value[np.broadcast_to(tensor.allowed, value.shape)]
        if value.size > 1 and value.min() == value.max():
            found[name] = float(value.flat[0])
    return found


def beyond(tensors: Mapping[str, Expected], inner: Mapping[str, float], dtype: str) -> dict[str, float]:
    """Tensors with a value beyond their format's range, or computed from one, and the largest such value.

    :param inner: see :func:`inner_values`.
    :param dtype: the model's format.
    """
    found = {}
    for name, tensor in tensors.items():
        limit = torch.finfo(getattr(torch, format_of(name, dtype))).max
        largest = max(float(np.abs(tensor.value).max(initial=0.0)), inner.get(name, 0.0))
        if largest > limit:
            found[name] = largest
    return found


@contextmanager
def inner_values(model: nn.Module) -> Iterator[dict[str, float]]:
    """Hook → the largest value between it and the hook before it, filled while the model runs.

    The inputs of linear layers, and the products of queries and keys before they are scaled: the gated product of an
    MLP, the attended values and these products may exceed float16's range where no hook's tensor does.
    """
    largest: dict[int, float] = {}
    names: dict[str, float] = {}

    def before(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        place = len(recorded())
        largest[place] = max(largest.get(place, 0.0), float(args[0].abs().max()))

    def after(_module: nn.Module, _args: object, _out: object) -> None:
        order = list(recorded())
        names.update({order[place]: value for place, value in largest.items() if place < len(order)})
        for name, scaling in scalings().items():
            names[name] = max(names.get(name, 0.0), float(recorded()[name].abs().max()) / scaling)

    handles = [m.register_forward_pre_hook(before) for m in model.modules() if isinstance(m, nn.Linear)]
    handles.append(model.register_forward_hook(after))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
