"""The table of direct calls with its truths, for tests that compute the same in another way or plant a fault."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.coverage.calls import load_calls
from candle_mi_parity.coverage.calls_compare import CallTruth, answer_of, compare_call
from candle_mi_parity.coverage.calls_judge import Expectations, expectations
from candle_mi_parity.coverage.calls_truth import truth_of
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.spec.paths import cache_root

TABLE = load_calls()
ROWS = {row.id: row for row in TABLE.call}
ARRAYS = {name: array.astype(np.float64) for name, array in TABLE.arrays().items()}
Values = dict[str, np.ndarray]


@functools.cache
def held_to() -> Expectations:
    """What every candidate is held to, from the cache."""
    return expectations(cache_root())


@functools.cache
def truth(call: str, formula: Formula | None = None) -> CallTruth:
    found = held_to().truths.get((call, formula))
    return truth_of(ROWS[call], TABLE, cache_root(), formula) if found is None else found


def right(call: str, formula: Formula | None = None) -> Values:
    return answer_of(ROWS[call], truth(call, formula))


def passes(call: str, values: Values) -> bool:
    return all(result.status is Status.PASS for result in compare_call(ROWS[call], values, truth(call)))


def where(name: str | None) -> Path:
    """The directory of a model, transcoder, network or the like."""
    return TABLE.lay_out(cache_root()) / str(name)


def changed(call: str, change: Callable[[np.ndarray], Any], name: str = "value") -> tuple[str, Values]:
    """The right answer with one changed result."""
    return call, right(call) | {name: np.asarray(change(right(call)[name]), dtype=np.float64)}


def other(call: str, **args: Any) -> tuple[str, Values]:
    """The right answer to another question, also of another network."""
    network = args.pop("network", ROWS[call].network)
    row = ROWS[call].model_copy(update={"args": ROWS[call].args | args, "network": network})
    return call, answer_of(row, truth_of(row, TABLE, cache_root()))
