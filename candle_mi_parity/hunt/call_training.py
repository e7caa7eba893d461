"""Hypothesis strategies for calls of the optimizer and of the average of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from candle_mi_parity.coverage.calls import CallTable, InputTensor
from candle_mi_parity.hunt.call_inputs import NUMBERS, one_call, tensor, tensors

_FINITE = NUMBERS[:3]
_RATES = st.sampled_from([0.1, 0.5, 1e-3, 1.0, 0.0])
_BETAS = st.sampled_from([0.9, 0.999, 0.5, 0.0])


@st.composite
def _steps(draw: DrawFn, gaps: bool) -> tuple[dict[str, InputTensor], list[str], list[list[str]]]:
    """Tensors, those to start from, and those of each step.

    :param gaps: whether a step may have an empty string in place of a tensor.
    """
    shapes = draw(st.lists(st.sampled_from([(1,), (3,), (2, 2), (1, 1, 2)]), min_size=1, max_size=2))
    named: dict[str, InputTensor] = {}

    def new(name: str, shape: tuple[int, ...]) -> str:
        named[name] = tensor(draw(tensors(shape, _FINITE)), shape)
        return name

    start = [new(f"p{place}", shape) for place, shape in enumerate(shapes)]
    steps = [
        [
            "" if gaps and not draw(st.integers(0, 7)) else new(f"g{step}_{place}", shape)
            for place, shape in enumerate(shapes)
        ]
        for step in range(draw(st.integers(1, 4)))
    ]
    return named, start, steps


@st.composite
def _adamw(draw: DrawFn) -> CallTable:
    named, parameters, steps = draw(_steps(True))
    args: dict[str, Any] = {
        "parameters": parameters,
        "steps": steps,
        "lr": draw(_RATES),
        "beta1": draw(_BETAS),
        "beta2": draw(_BETAS),
        "eps": draw(st.sampled_from([1e-8, 1e-3, 1.0])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.5])),
    }
    if draw(st.booleans()):
        args["restored_after"] = draw(st.integers(0, 4))
    if draw(st.booleans()):
        args["later"] = {"after": draw(st.integers(0, 4)), "lr": draw(_RATES)}
    return one_call("adamw_step", args, named)


@st.composite
def _ema(draw: DrawFn) -> CallTable:
    named, shadows, steps = draw(_steps(False))
    decay = draw(st.sampled_from([0.9, 0.999, 0.5, 0.0, 1.0]))
    return one_call("fold_ema", {"shadows": shadows, "steps": steps, "decay": decay}, named)


CALLS: dict[str, Callable[[], SearchStrategy[CallTable]]] = {
    "adamw_step": _adamw,
    "fold_ema": _ema,
}
