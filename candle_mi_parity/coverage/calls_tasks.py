"""The reference of AlgZoo's tasks and of what candle-mi's module ``stoicheia`` computes without a network, in torch.

The tasks are those of ``alg_zoo/tasks.py`` (https://github.com/alignment-research-center/alg-zoo).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch

from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.calls_networks import Task
from candle_mi_parity.coverage.formulas import Formula

Formulas = Collection[Formula]


def drawn(count: int, length: int, state: int) -> np.ndarray:
    """What candle-mi draws as inputs, float32 [count, length]: the high bits of a congruential generator, over ±3."""
    numbers = np.empty(count * length, dtype=np.float32)
    for place in range(len(numbers)):
        state = (state * 6364136223846793005 + 1) % 2**64
        numbers[place] = (np.float32(state >> 33) / np.float32(2**31) - np.float32(0.5)) * np.float32(6)
    return numbers.reshape(count, length)


PROBES, SAMPLES = 42, 123456789
"""The generator's first states."""


def signals(x: torch.Tensor, formulas: Formulas = ()) -> list[tuple[int, torch.Tensor]]:
    """Roles in the order of candle-mi's ``NeuronRole``, each with signals of inputs [N, T] that it is documented as.

    A neuron's activation is never negative, so neither is a signal.
    """
    steps = x.shape[1]
    largest, last = x.max(1).values.relu(), x[:, -1]
    found = [(0, largest), (1, x.min(1).values.relu())]
    if steps > 1:
        found.append((2, largest - x[:, :-1].max(1).values.relu()))
    if Formula.SIGNALS_AS_CODED in formulas:
        found += [(3, (largest - last).relu()), (4, last.relu())]
    else:
        others = [[place for place in range(steps) if place != out] for out in range(steps) if steps > 1]
        found += [(3, x[:, places].max(1).values.relu()) for places in others]
        found += [(4, last.relu()), (4, (-last).relu())]
    pairs = [(one, other) for one in range(steps) for other in range(steps) if one != other]
    return found + [(5, (x[:, one] - x[:, other]).relu()) for one, other in pairs]


def _pattern(formulas: Formulas, x: torch.Tensor) -> Named:
    """Of pre-activations [T, H]."""
    active = (x >= 0 if Formula.ZERO_FIRES in formulas else x > 0).double()
    slots = torch.tensor(float(active.numel()), dtype=torch.float64)
    return {"value": active, "active": active.sum(), "slots": slots, "each": active.sum(-1)}


def classes(task: Task, x: torch.Tensor, formulas: Formulas) -> torch.Tensor:
    if Formula.CLASS_ZERO in formulas:
        return torch.zeros(len(x), dtype=torch.int64)
    if task == "median":
        raise ValueError("the median is a number and no class")
    if task == "longest_cycle":
        return _cycle(formulas, x, True)["value"].long()
    place = -2 if task == "2nd_argmax" else x.shape[1] // 2
    return torch.sort(x, dim=-1, stable=True).indices[:, place]


def _oracle(formulas: Formulas, x: torch.Tensor, task: Task) -> Named:
    found = classes(task, x, formulas)
    positions = task in ("2nd_argmax", "argmedian")
    return {"value": x.gather(1, found[:, None])[:, 0] if positions else found.double()}


def _sorted(x: torch.Tensor, formulas: Formulas, falling: bool) -> torch.Tensor:
    """Ascending, NaN last; or by an insertion sort in which NaN is neither larger nor smaller than anything."""
    if Formula.NAN_EQUALS_ALL not in formulas:
        return torch.sort(x, dim=-1).values
    rows = []
    for numbers in x.tolist():
        order: list[float] = []
        for number in numbers:
            place = len(order)
            while place and (number > order[place - 1] if falling else number < order[place - 1]):
                place -= 1
            order.insert(place, number)
        rows.append(order[::-1] if falling else order)
    return torch.tensor(rows, dtype=x.dtype)


def _second(formulas: Formulas, x: torch.Tensor) -> Named:
    return {"value": _sorted(x, formulas, True)[..., -2]}


def _argmedian(formulas: Formulas, x: torch.Tensor) -> Named:
    return {"value": _sorted(x, formulas, False)[..., x.shape[-1] // 2]}


def _median(formulas: Formulas, x: torch.Tensor) -> Named:
    """Of an even number, the mean of the two in the middle."""
    length, found = x.shape[-1], _sorted(x, formulas, False)
    if length % 2 or Formula.UPPER_MEDIAN in formulas:
        return {"value": found[..., length // 2]}
    return {"value": (found[..., length // 2 - 1] + found[..., length // 2]) / 2}


def _cycle(formulas: Formulas, x: torch.Tensor, signed: bool) -> Named:
    """The class of a function {0, …, n − 1} → {0, …, n − 1}: the length of its longest cycle, less 1.

    :raises ValueError: a value is beyond the function's own arguments.
    """
    rows = x.long().tolist()
    if any(not 0 <= value < len(row) for row in rows for value in row):
        raise ValueError("index out of bounds")
    if Formula.WALK_LENGTH in formulas:
        return {"value": torch.tensor([float(_longest_walk(row)) for row in rows])}
    longest = []
    for row in rows:
        returns = []
        for start in range(len(row)):
            at, steps = row[start], 1
            while at != start and steps <= len(row):
                at, steps = row[at], steps + 1
            returns.append(steps if at == start else 0)
        longest.append(max(returns))
    less = 0 if Formula.CYCLE_LENGTH in formulas else 1
    return {"value": torch.tensor([float(each - less) for each in longest])}


def _longest_walk(row: list[int]) -> int:
    """The most new places on a way from the first that was not seen."""
    seen: set[int] = set()
    longest = 0
    for start in range(len(row)):
        at, before = start, len(seen)
        while at not in seen:
            seen.add(at)
            at = row[at]
        longest = max(longest, len(seen) - before)
    return longest


def _argmax(formulas: Formulas, x: torch.Tensor) -> Named:
    if Formula.NAN_PASSED_OVER in formulas:
        x = torch.where(x.isnan(), -torch.inf, x)
        return {"value": torch.tensor(float(x.argmax()) if x.numel() else 0.0)}
    return {"value": torch.argmax(x, 0).double()}


_ORDER = frozenset({Formula.NAN_EQUALS_ALL})
TASKS: dict[str, tuple[frozenset[Formula], Callable[..., Named]]] = {
    "activation_pattern": (frozenset({Formula.ZERO_FIRES}), _pattern),
    "argmax_f32": (frozenset({Formula.NAN_PASSED_OVER}), _argmax),
    "oracle_predict": (frozenset({Formula.CLASS_ZERO, Formula.CYCLE_LENGTH, Formula.WALK_LENGTH}), _oracle),
    "second_argmax": (_ORDER, _second),
    "argmedian": (_ORDER, _argmedian),
    "median": (_ORDER | {Formula.UPPER_MEDIAN}, _median),
    "longest_cycle": (frozenset({Formula.CYCLE_LENGTH, Formula.WALK_LENGTH}), _cycle),
}
"""Function without a network → its wrong formulas, and what computes it."""
