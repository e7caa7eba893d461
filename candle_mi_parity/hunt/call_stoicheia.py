"""Hypothesis strategies for calls of candle-mi's module ``stoicheia``, and what rounding leaves undecided in one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from candle_mi_parity.compare.gate import ELEMENT_GATE, UNIT
from candle_mi_parity.coverage.calls import CallRow, CallTable, InputTensor
from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.calls_networks import NetworkRow, Task
from candle_mi_parity.coverage.calls_stoicheia import NETWORKS, THRESHOLD, TorchNetwork, correlations
from candle_mi_parity.coverage.calls_tasks import SAMPLES, TASKS, drawn
from candle_mi_parity.coverage.calls_truth import with_noise
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.hunt.call_inputs import ID, NUMBERS, tensor, tensors
from candle_mi_parity.trace.truth import TruthTensor

_FINITE = NUMBERS[:2]
_WEIGHTS = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
_RECURRENT: tuple[Task, ...] = ("2nd_argmax", "argmedian", "median")
_ANY_NUMBER = frozenset({"network_forward", "forward_fast", "forward_fast_ablated", "forward_fast_traced"})
"""Functions that NaN and infinities are given to."""
_CLASSES = frozenset({"accuracy", "ablate_neurons", "ablate_neuron_pairs", "surprise_accounting"})
"""Functions that take an argmax of outputs."""
_GATES = frozenset({"classify_regions", "region_linear_map"})
"""Functions that ask where a pre-activation is positive."""


@st.composite
def _network(draw: DrawFn, fn: str) -> NetworkRow:
    whole = ("network_config", "network_forward", "network_project")
    tasks: tuple[Task, ...] = (*_RECURRENT, "longest_cycle") if fn in whole else _RECURRENT
    tasks = _RECURRENT[:2] if fn in _CLASSES else tasks
    task = draw(st.sampled_from(tasks))
    least = 3 if fn == "probe_neurons" else 2 if fn == "surprise_accounting" else 1
    hidden, length = draw(st.integers(1, 4)), draw(st.integers(least, 4))
    given: dict[str, Any] = {}
    if task != "longest_cycle" and draw(st.booleans()):
        shapes = {"rnn.weight_ih_l0": (hidden, 1), "rnn.weight_hh_l0": (hidden, hidden)}
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            weights = draw(st.lists(_WEIGHTS, min_size=count, max_size=count))
            given[name] = np.array(weights).reshape(shape).tolist()
    written: Literal["safetensors", "pth", "pkl"] = draw(st.sampled_from(("safetensors", "pth", "pkl")))
    return NetworkRow(
        task=task,
        hidden=hidden,
        length=length,
        seed=draw(st.integers(0, 9)),
        file="pth-legacy" if fn == "network_weights" and not draw(st.integers(0, 9)) else written,
        dtype=draw(st.sampled_from(["float32", "float32", "float64", "float16", "bfloat16"])),
        views=written != "safetensors" and draw(st.booleans()),
        bias=fn in ("network_forward", "forward_fast") and not draw(st.integers(0, 4)),
        layers=draw(st.integers(1, 3)),
        heads=2 if fn == "network_forward" and not hidden % 2 and not draw(st.integers(0, 4)) else 1,
        input_range=draw(st.none() | st.integers(1, 6)),
        tensors=given,
    )


@st.composite
def _inputs(draw: DrawFn, shape: tuple[int, ...], any_number: bool = False) -> InputTensor:
    kinds = (*_FINITE, NUMBERS[5]) if any_number and not draw(st.integers(0, 4)) else _FINITE
    return tensor(draw(tensors(shape, kinds)), shape)


@st.composite
def _tokens(draw: DrawFn, row: NetworkRow) -> InputTensor:
    """Seldom one token more than the network has positions for, or one that is not in its range."""
    steps = draw(st.integers(1, row.length + (not draw(st.integers(0, 9)))))
    shape, most = (draw(st.integers(1, 2)), steps), (row.input_range or row.length) - 1
    tokens = draw(st.lists(st.integers(0, most), min_size=shape[0] * steps, max_size=shape[0] * steps))
    if not draw(st.integers(0, 9)):
        tokens[0] = most + 1
    return tensor(np.array(tokens, dtype=float).reshape(shape).tolist(), shape)


@st.composite
def _forward(draw: DrawFn) -> CallTable:
    row = draw(_network("network_forward"))
    if row.recurrent:
        steps = draw(st.integers(1, 4))
        named = {"a": draw(_inputs((draw(st.integers(1, 2)), steps), any_number=True))}
        hooks = [f"rnn.hook_{kind}.{step}" for kind in ("pre_activation", "hidden") for step in range(steps)]
        hooks += ["rnn.hook_final_state"]
    else:
        named = {"a": draw(_tokens(row))}
        kinds = ("hook_resid_pre", "hook_attn_out", "hook_resid_post")
        hooks = ["hook_embed", *(f"blocks.{layer}.{kind}" for layer in range(row.layers) for kind in kinds)]
    edits = []
    for hook in draw(st.lists(st.sampled_from(hooks), max_size=2)):
        kind = draw(st.sampled_from(["add", "scale", "zero"]))
        named["b"] = draw(_inputs((row.hidden,)))
        edits.append([hook, kind, draw(st.sampled_from([0.5, -1.0, 2.0])), "b" if kind == "add" else ""])
    args: dict[str, Any] = {"x": "a", "edits": edits} if edits else {"x": "a"}
    return _table("network_forward", args, named, row)


def _table(
    fn: str, args: dict[str, Any], named: dict[str, InputTensor], row: NetworkRow | None, exact: bool = False
) -> CallTable:
    call = CallRow(id=ID, fn=fn, args=args, network=None if row is None else "network", exact=exact)
    return CallTable(tensors=named, networks={} if row is None else {"network": row}, call=[call])


@st.composite
def _call(draw: DrawFn, fn: str) -> CallTable:
    row = draw(_network(fn))
    if fn in ("network_config", "network_weights"):
        return _table(fn, {}, {}, row, exact=True)
    if fn in ("probe_neurons", "surprise_accounting"):
        args: dict[str, Any] = {"n_probes" if fn == "probe_neurons" else "n_samples": draw(st.integers(2, 12))}
        if fn == "surprise_accounting" and draw(st.booleans()):
            args["class"] = draw(st.integers(0, row.outputs))
        return _table(fn, args, {}, row)
    count = draw(st.integers(1, 4))
    shape: tuple[int, ...] = (count, row.length)
    if fn == "network_project":
        shape = draw(st.sampled_from([(count, row.hidden), (1, count, row.hidden)]))
    elif fn in ("forward_fast_traced", "region_linear_map"):
        shape = (row.length,)
    args, name = {"x": "a"}, "a"
    if fn == "region_linear_map" and draw(st.booleans()):
        args, shape = {"pre": "a"}, (row.length, row.hidden)
    if fn == "forward_fast_ablated":
        args["ablated"] = draw(st.lists(st.integers(0, row.hidden - 1), max_size=2, unique=True))
    if fn in _CLASSES:
        args["targets"] = draw(st.lists(st.integers(0, row.outputs), min_size=count, max_size=count))
    named = {name: draw(_inputs(shape, any_number=fn in _ANY_NUMBER))}
    return _table(fn, args, named, row, exact=fn == "classify_regions")


@st.composite
def _task(draw: DrawFn, fn: str) -> CallTable:
    count, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    shape: tuple[int, ...] = (length,) if fn == "argmax_f32" else (count, length)
    args: dict[str, Any] = {"x": "a"}
    if fn == "oracle_predict":
        args["task"] = draw(st.sampled_from([*_RECURRENT, "longest_cycle"]))
    if fn == "longest_cycle" or args.get("task") == "longest_cycle":
        most = length - (draw(st.integers(0, 9)) > 0 or fn == "oracle_predict")
        places = draw(st.lists(st.integers(0, most), min_size=count * length, max_size=count * length))
        named = {"a": tensor(np.array(places, dtype=float).reshape(shape).tolist(), shape)}
        if fn == "longest_cycle":
            args["signed"] = not draw(st.integers(0, 9))
    else:
        named = {"a": draw(_inputs(shape, any_number=fn != "oracle_predict"))}
    return _table(fn, args, named, None, exact=True)


STOICHEIA: dict[str, Callable[[], SearchStrategy[CallTable]]] = {
    **{fn: partial(_call, fn) for fn in NETWORKS if fn != "network_forward"},
    "network_forward": _forward,
    **{fn: partial(_task, fn) for fn in TASKS},
}


def undecided(table: CallTable, arrays: dict[str, np.ndarray], formulas: Collection[Formula]) -> str:
    """What rounding may decide in the table's call of a network; empty for nothing.

    :param formulas: known wrong formulas.
    """
    (row,) = table.call
    assert row.network is not None
    net = TorchNetwork(table.networks[row.network], formulas)
    args: Any = row.args
    if row.fn in _CLASSES:
        numbers = arrays[args["x"]] if "x" in args else drawn(args["n_samples"], net.row.length, SAMPLES)
        x, neurons = torch.from_numpy(numbers).double(), range(net.row.hidden)
        sets: list[tuple[int, ...]] = [()]
        if row.fn.startswith("ablate"):
            sets += [(neuron,) for neuron in neurons]
        if row.fn == "ablate_neuron_pairs":
            sets += combinations(neurons, 2)
        return next((why for each in sets if (why := _near_largest(row, lambda: net.run(x, (), each)[0]))), "")  # noqa: B023
    if row.fn in _GATES and "x" in args:
        x = torch.from_numpy(arrays[args["x"]]).double().reshape(-1, net.row.length)
        found = _noisy(row, lambda: {"pre": net.pre_activations(x)})["pre"]
        near = (np.abs(found.value) <= _slack(found)) & ((found.value != 0) | (found.noise != 0))
        return "a pre-activation is 0 within rounding" if near.any() else ""
    return _near_role(row, net) if row.fn == "probe_neurons" else ""


def _near_largest(row: CallRow, outputs: Callable[[], torch.Tensor]) -> str:
    found = _noisy(row, lambda: {"outputs": outputs()})["outputs"]
    if found.value.shape[-1] < 2:
        return ""
    order = np.argsort(-found.value, -1, kind="stable")[:, :2]
    value, slack = (np.take_along_axis(each, order, -1) for each in (found.value, _slack(found)))
    equal = (slack == 0).all(-1)  # as zeros are; of these the first is taken
    near = (value[:, 0] - value[:, 1] <= slack.sum(-1)) & ~equal
    return "the two largest outputs are equal within rounding" if near.any() else ""


def _near_role(row: CallRow, net: TorchNetwork) -> str:
    roles = correlations(net, 2)[0]
    found = _noisy(row, lambda: {"each": correlations(net, int(str(row.args["n_probes"])))[1]})["each"]
    best = np.argmax(found.value, 0)
    for neuron, at in enumerate(best):
        value, slack = found.value[:, neuron], _slack(found)[:, neuron] + UNIT
        others = np.array(roles) != roles[at]
        if value[at] > 0 and (others & (value[at] - value <= slack + slack[at])).any():
            return "two roles correlate equally within rounding"
        if abs(value[at] - THRESHOLD) <= slack[at]:
            return "a correlation is at the threshold within rounding"
    return ""


def _noisy(row: CallRow, once: Callable[[], Named]) -> dict[str, TruthTensor]:
    return with_noise(row, once, True)[0]


def _slack(found: TruthTensor) -> np.ndarray:
    return np.asarray(ELEMENT_GATE * (found.noise + np.where(found.noise > 0, UNIT * np.abs(found.value), 0.0)))
