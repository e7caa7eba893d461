"""The reference of the optimizer and of the average of weights, in operations that have a noise rule.

AdamW is Algorithm 2 of Loshchilov and Hutter, Decoupled Weight Decay Regularization (ICLR 2019), as
``torch.optim.AdamW`` computes it; the average is that of ``torch.optim.swa_utils.get_ema_multi_avg_fn``. The tests
compare both with torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.formulas import Formula

Gradients = Sequence[Sequence[torch.Tensor | str]]
"""Of each step the gradient of each parameter; an empty string where it has none."""


def _constant(value: float, like: torch.Tensor) -> torch.Tensor:
    """A number that is rounded to float32 once, and is then the same in every step."""
    return torch.ones((), dtype=like.dtype) * value


def _adamw(
    formulas: Collection[Formula],
    parameters: Sequence[torch.Tensor],
    steps: Gradients,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    restored_after: int | None = None,
    partly_restored_after: int | None = None,
    later: Mapping[str, float] | None = None,
) -> Named:
    """Each parameter after the last step, with both of its moments.

    A parameter without a gradient is left as it is, with its moments, and the step does not count for it.

    :param restored_after: changes nothing.
    :param partly_restored_after: changes nothing.
    :param later: another learning rate ``lr``, ``after`` a number of steps.
    """
    values = list(parameters)
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    like = values[0]
    keep1, keep2, fresh1, fresh2 = (_constant(each, like) for each in (beta1, beta2, 1 - beta1, 1 - beta2))
    taken = [0] * len(values)
    for step, gradients in enumerate(steps):
        if later is not None and later["after"] == step:
            lr = later["lr"]
        for place, gradient in enumerate(gradients):
            if isinstance(gradient, str):
                continue
            taken[place] = step + 1 if Formula.STEPS_OF_THE_OPTIMIZER in formulas else taken[place] + 1
            t = taken[place]
            first[place] = first[place] * keep1 + gradient * fresh1
            second[place] = second[place] * keep2 + gradient * gradient * fresh2
            corrected = first[place] * _constant(1 / (1 - beta1**t), like)
            root = (second[place] * _constant(1 / (1 - beta2**t), like)).sqrt()
            decayed = values[place] * _constant(1 - lr * weight_decay, like)
            values[place] = decayed - corrected / (root + _constant(eps, like)) * _constant(lr, like)
    named = zip(values, first, second, strict=True)
    kinds = ("value", "first", "second")
    return {f"{kind}{at}": tensor for at, row in enumerate(named) for kind, tensor in zip(kinds, row, strict=True)}


def _ema(
    _: Collection[Formula], shadows: Sequence[torch.Tensor], steps: Sequence[Sequence[torch.Tensor]], decay: float
) -> Named:
    """``decay·shadow + (1 − decay)·parameter``, once a step."""
    averages = list(shadows)
    kept, fresh = (_constant(each, averages[0]) for each in (decay, 1 - decay))
    for parameters in steps:
        averages = [old * kept + new * fresh for old, new in zip(averages, parameters, strict=True)]
    return {f"value{place}": average for place, average in enumerate(averages)}


TRAINING: dict[str, tuple[frozenset[Formula], Callable[..., Named]]] = {
    "adamw_step": (frozenset({Formula.STEPS_OF_THE_OPTIMIZER}), _adamw),
    "fold_ema": (frozenset(), _ema),
}
