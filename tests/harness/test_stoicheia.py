"""AlgZoo's networks and tasks: the truth from torch's own modules and from AlgZoo's own lines, and planted faults."""

import functools
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from candle_mi_parity.coverage.calls import CallRow, CallTable, InputTensor
from candle_mi_parity.coverage.calls_networks import NetworkRow
from candle_mi_parity.coverage.calls_stoicheia import NETWORKS, TorchNetwork
from candle_mi_parity.coverage.calls_tasks import PROBES, SAMPLES, TASKS, drawn, signals
from candle_mi_parity.coverage.calls_truth import truth_of
from candle_mi_parity.hunt.call_stoicheia import undecided
from candle_mi_parity.hunt.call_truth import expected
from candle_mi_parity.hunt.callees import write_inputs
from candle_mi_parity.spec.paths import cache_root
from tests.support.calls import ARRAYS, ROWS, TABLE, Values, passes, right, where

OURS = {row.id: row for row in TABLE.call if row.fn in NETWORKS | TASKS}

RIGHT = {id: row for id, row in OURS.items() if not row.raises}
SINGLES = TABLE.arrays()


def net_of(call: str) -> NetworkRow:
    return TABLE.networks[str(ROWS[call].network)]


def x_of(call: str) -> torch.Tensor:
    return torch.from_numpy(ARRAYS[str(ROWS[call].args["x"])])


# --- torch's own modules ------------------------------------------------------------------------------


class OneLayerRNN(torch.nn.Module):
    """AlgZoo's (``alg_zoo/architectures.py``)."""

    def __init__(self, row: NetworkRow) -> None:
        super().__init__()
        self.rnn = torch.nn.RNN(1, row.hidden, nonlinearity="relu", bias=row.bias, batch_first=True)
        self.linear = torch.nn.Linear(row.hidden, row.outputs, bias=row.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.rnn(x[..., None])[1].squeeze(0))  # type: ignore[no-any-return]


class AttentionOnlyTransformer(torch.nn.Module):
    """AlgZoo's; it also gives the patterns."""

    def __init__(self, row: NetworkRow) -> None:
        super().__init__()
        attention, width = torch.nn.MultiheadAttention, row.hidden
        self.embed = torch.nn.Embedding(row.input_range or row.length, width)
        self.pos_embed = torch.nn.Embedding(row.length, width)
        made = (attention(width, row.heads, bias=row.bias, batch_first=True) for _ in range(row.layers))
        self.attns = torch.nn.ModuleList(made)
        self.unembed = torch.nn.Linear(width, row.outputs, bias=row.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        tokens = x.long()
        state = self.embed(tokens) + self.pos_embed(torch.arange(tokens.shape[-1])[None])
        hooks = {"hook_embed": state}
        for layer, attn in enumerate(self.attns):
            out, pattern = attn(state, state, state, average_attn_weights=False)
            hooks |= {f"blocks.{layer}.hook_resid_pre": state, f"blocks.{layer}.attn.hook_pattern": pattern}
            state = state + out
            hooks |= {f"blocks.{layer}.hook_attn_out": out, f"blocks.{layer}.hook_resid_post": state}
        return self.unembed(state)[:, -1], hooks


@functools.cache
def module(name: str) -> Any:
    """The network of a file, read by torch, in float64."""
    row = TABLE.networks[name]
    path = row.at(where(name))
    state = load_file(path) if row.file == "safetensors" else torch.load(path, weights_only=True)
    found: torch.nn.Module = OneLayerRNN(row) if row.recurrent else AttentionOnlyTransformer(row)
    # As AlgZoo's, whose networks are float32.
    found.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=True)
    return found.double().requires_grad_(False)


def ablated(name: str, neurons: tuple[int, ...]) -> Any:
    """The network without what leads into some neurons."""
    found = OneLayerRNN(TABLE.networks[name]).double()
    state = {key: tensor.clone() for key, tensor in module(name).state_dict().items()}
    for key in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        state[key][list(neurons)] = 0
    found.load_state_dict(state)
    return found.requires_grad_(False)


def right_share(network: Any, call: str) -> float:
    targets = torch.tensor(ROWS[call].args["targets"], dtype=torch.int64)
    return float((network(x_of(call)).argmax(-1) == targets).double().mean())


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


@pytest.mark.every(6)
@pytest.mark.parametrize(
    "call", [id for id, row in RIGHT.items() if row.fn == "network_forward" and not row.args.get("edits")]
)
def test_torchs_modules_give_the_truth_of_a_forward(call: str) -> None:
    row, found = net_of(call), module(str(ROWS[call].network))
    if row.recurrent and not len(x_of(call)):
        return  # torch.nn.RNN takes no empty batch
    if row.recurrent:
        states = found.rnn(x_of(call)[..., None])[0]
        hooks = {f"rnn.hook_hidden.{step}": states[:, step] for step in range(states.shape[1])}
        output = found.linear(states[:, -1])
        hooks |= {"rnn.hook_final_state": states[:, -1], "rnn.hook_output": output}
    else:
        output, hooks = found(x_of(call))
    given = {name: numbers(tensor) for name, tensor in hooks.items()}
    given |= dict.fromkeys(("output", "captured_output"), numbers(output)[:, None])
    assert given["output"].size and passes(call, right(call) | given)


@pytest.mark.every(6)
@pytest.mark.parametrize("call", [id for id, row in RIGHT.items() if row.fn.startswith("forward_fast")])
def test_torchs_rnn_gives_the_truth_of_the_fast_passes(call: str) -> None:
    row = ROWS[call]
    x: Any = x_of(call) if row.fn != "forward_fast_traced" else x_of(call)[None]
    if not len(x):
        return
    neurons: Any = row.args.get("ablated", [])
    given = numbers(ablated(str(row.network), tuple(neurons))(x) if neurons else module(str(row.network))(x))
    assert passes(call, right(call) | {"value": given[0] if row.fn == "forward_fast_traced" else given})


@pytest.mark.every(6)
@pytest.mark.parametrize(
    "call", [id for id, row in RIGHT.items() if row.fn in ("network_weights", "network_project")]
)
def test_torch_reads_the_weights_and_projects_with_them(call: str) -> None:
    found = module(str(ROWS[call].network))
    if ROWS[call].fn == "network_project":
        last = found.linear if net_of(call).recurrent else found.unembed
        assert passes(call, {"value": numbers(last(x_of(call)))})
    else:
        weights = {"weight_ih": found.rnn.weight_ih_l0, "weight_hh": found.rnn.weight_hh_l0}
        weights["weight_oh"] = found.linear.weight
        assert passes(call, {name: numbers(weight) for name, weight in weights.items()})


@pytest.mark.parametrize("call", [id for id, row in RIGHT.items() if row.fn == "network_config"])
def test_a_network_has_as_many_parameters_as_torch_counts(call: str) -> None:
    count = sum(weight.numel() for weight in module(str(ROWS[call].network)).parameters())
    assert right(call)["value"][-1] == count


@pytest.mark.parametrize(
    "call", [id for id, row in RIGHT.items() if row.fn == "region_linear_map" and "x" in row.args]
)
def test_the_linear_map_of_a_region_is_autograds_jacobian(call: str) -> None:
    found = module(str(ROWS[call].network))
    jacobian = torch.func.jacrev(lambda x: found(x[None])[0])(x_of(call))
    assert passes(call, {"value": numbers(jacobian)})


@pytest.mark.parametrize("call", [id for id, row in RIGHT.items() if row.fn == "classify_regions" and len(x_of(id))])
def test_the_regions_are_where_the_states_of_torchs_rnn_are_positive(call: str) -> None:
    states = module(str(ROWS[call].network)).rnn(x_of(call)[..., None])[0]
    patterns = [tuple((row > 0).double().flatten().tolist()) for row in states]
    counted = sorted((-patterns.count(each), each) for each in set(patterns))
    shaped = np.array([each for _, each in counted]).reshape(len(counted), *states.shape[1:])
    counts = np.array([float(-count) for count, _ in counted])
    named: Values = {"total": np.array(float(len(patterns))), "listed": counts, "patterns": shaped}
    assert passes(call, named | {"counts": counts, "own": shaped})


@pytest.mark.every(6)
@pytest.mark.parametrize(
    "call",
    [
        id
        for id, row in RIGHT.items()
        if row.fn in ("accuracy", "ablate_neurons", "ablate_neuron_pairs") and row.args["targets"]
    ],
)
def test_torchs_rnn_gives_the_truth_of_accuracies(call: str) -> None:
    name, neurons = str(ROWS[call].network), range(net_of(call).hidden)
    baseline = right_share(module(name), call)
    if ROWS[call].fn == "accuracy":
        assert passes(call, {"value": np.array(baseline)})
        return
    alone = np.array([right_share(ablated(name, (neuron,)), call) for neuron in neurons])
    delta = alone - baseline
    if ROWS[call].fn == "ablate_neurons":
        given = {"baseline": np.array(baseline), "value": alone, "delta": delta, "listed": np.sort(delta)}
    else:
        pairs = list(combinations(neurons, 2))
        both = np.array([right_share(ablated(name, pair), call) for pair in pairs])
        sums = np.array([delta[one] + delta[other] for one, other in pairs])
        named = np.array(pairs, dtype=float).reshape(-1, 2)
        given = {"pairs": named, "value": both, "delta": both - baseline, "interaction": both - baseline - sums}
    assert passes(call, given)


@pytest.mark.parametrize("call", [id for id, row in RIGHT.items() if row.fn == "standardize_rnn"])
def test_a_standardised_network_gives_the_same_outputs(call: str) -> None:
    found, name = right(call), str(ROWS[call].network)
    assert set(np.abs(found["weight_ih"])) == {1.0}
    given = {"value": numbers(module(name)(x_of(call)))}
    standard = OneLayerRNN(net_of(call)).double()
    weights = {"rnn.weight_ih_l0": found["weight_ih"][:, None], "rnn.weight_hh_l0": found["weight_hh"]}
    weights["linear.weight"] = found["weight_oh"]
    standard.load_state_dict({key: torch.from_numpy(weight) for key, weight in weights.items()})
    assert passes(call, found | given)
    assert passes(call, found | {"value": standard(x_of(call)).detach().numpy()})


@pytest.mark.every(6)
@pytest.mark.parametrize(
    "call", [id for id, row in RIGHT.items() if row.fn == "network_forward" and row.args.get("edits")]
)
def test_an_edit_changes_what_follows_and_nothing_before(call: str) -> None:
    edits: Any = ROWS[call].args["edits"]
    plain = {name: numbers(tensor) for name, tensor in TorchNetwork(net_of(call)).run(x_of(call))[1].items()}
    first = next((list(plain).index(edit[0]) for edit in edits if edit[0] in plain), len(plain))
    found = truth_of(ROWS[call], TABLE, cache_root())  # by this processor, which the cached one may not be
    for place, name in enumerate(plain):
        same = np.array_equal(found[name].value, plain[name])
        assert same or place > first  # a hook point is captured before its own edit
    output = TorchNetwork(net_of(call)).run(x_of(call))[0].numpy()
    assert np.array_equal(found["output"].value[:, 0], output) == (call == "stoicheia-edit/no-such-step")


# --- AlgZoo's own lines ---------------------------------------------------------------------------------


def task_2nd_argmax(x: torch.Tensor) -> torch.Tensor:
    return x.argsort(-1)[..., -2]


def task_argmedian(x: torch.Tensor) -> torch.Tensor:
    return x.argsort(-1)[..., x.shape[-1] // 2]


def task_median(x: torch.Tensor) -> torch.Tensor:
    middle = x.sort(-1).values[..., (x.shape[-1] - 1) // 2 : (x.shape[-1] + 2) // 2]
    return middle.mean(-1) if x.shape[-1] % 2 == 0 else middle.squeeze(-1)


def task_longest_cycle(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[1]
    start_pos = torch.arange(n)[None].expand(*x.shape)
    pos, paths = start_pos, []
    for _ in range(n):
        pos = x.gather(1, pos)
        paths.append(pos)
    return (torch.stack(paths, dim=-1) == start_pos[..., None]).to(torch.int64).argmax(-1).amax(-1)


ALGZOO: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "second_argmax": lambda x: x.gather(1, task_2nd_argmax(x)[:, None])[:, 0],
    "argmedian": lambda x: x.gather(1, task_argmedian(x)[:, None])[:, 0],
    "median": task_median,
    "longest_cycle": lambda x: task_longest_cycle(x.long()),
}
NAMED = {"2nd_argmax": "second_argmax", "argmedian": "argmedian", "longest_cycle": "longest_cycle"}


@pytest.mark.every(8)
@pytest.mark.parametrize("call", [id for id, row in RIGHT.items() if row.fn in ALGZOO or row.fn == "oracle_predict"])
def test_algzoos_tasks_give_the_truth(call: str) -> None:
    """Of equal values its argsort takes any, so that values are compared and not places."""
    fn = NAMED[str(ROWS[call].args["task"])] if ROWS[call].fn == "oracle_predict" else ROWS[call].fn
    assert passes(call, {"value": numbers(ALGZOO[fn](x_of(call)).float())})


def test_the_task_of_cycles_is_algzoos_on_any_function() -> None:
    draw = np.random.Generator(np.random.PCG64(5)).integers
    for size in range(1, 7):
        x = draw(0, size, (40, size))
        call = CallTable(
            tensors={"x": InputTensor(values=x.tolist())},
            call=[CallRow(id="cycle", fn="longest_cycle", args={"x": "x", "signed": True}, exact=True)],
        )
        found = truth_of(call.call[0], call, cache_root())["value"].value
        assert np.array_equal(found, task_longest_cycle(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize(
    "call", [id for id, row in RIGHT.items() if row.fn == "surprise_accounting" and row.args["n_samples"]]
)
def test_surprise_is_of_algzoos_targets(call: str) -> None:
    args: Any = ROWS[call].args
    x = torch.from_numpy(drawn(args["n_samples"], net_of(call).length, SAMPLES)).double()
    wanted = (task_2nd_argmax if net_of(call).task == "2nd_argmax" else task_argmedian)(x)
    given = module(str(ROWS[call].network))(x).argmax(-1)
    estimated = torch.full_like(wanted, args["class"]) if "class" in args else wanted
    shares = {"model": given == wanted, "estimate": estimated == wanted, "disagreement": given != estimated}
    shares |= {"agreement": given == estimated}
    values = {name: np.array(float(share.double().mean())) for name, share in shares.items()}
    assert passes(call, right(call) | values)


@pytest.mark.parametrize("call", [id for id, row in RIGHT.items() if row.fn == "probe_neurons"])
def test_numpy_gives_the_correlations_of_probed_neurons(call: str) -> None:
    args: Any = ROWS[call].args
    x = torch.from_numpy(drawn(args["n_probes"], net_of(call).length, PROBES)).double()
    states = module(str(ROWS[call].network)).rnn(x[..., None])[1][0].numpy()
    best = []
    for neuron in states.T:
        if not neuron.std():
            best.append((0.0, 6.0))
            continue
        sizes = [(abs(np.corrcoef(neuron, signal.numpy())[0, 1]), float(role)) for role, signal in signals(x)]
        size, role = max(sizes, key=lambda each: each[0])
        best.append((size, role if size >= 0.8 else 6.0))
    assert passes(call, {"role": np.array([role for _, role in best]), "value": np.array([size for size, _ in best])})


def test_neurons_that_compute_a_role_exactly_have_it() -> None:
    recent, maximum = right("stoicheia-probe/signs"), right("stoicheia-probe/maximum")
    assert recent["role"].tolist() == [4, 4] and np.allclose(recent["value"], 1)  # the last input, and its negative
    # What the last input adds to the maximum, and the maximum of all others.
    assert maximum["role"].tolist() == [2, 3] and np.allclose(maximum["value"], 1)


def test_inputs_are_drawn_by_the_generator_that_candle_mi_has() -> None:
    state, found = 42, []
    for _ in range(3):
        state = (state * 6364136223846793005 + 1) & (2**64 - 1)
        found.append((state >> 33) / 2**31 * 6 - 3)
    assert np.allclose(drawn(1, 3, PROBES)[0], found, atol=1e-6)
    assert np.array_equal(drawn(2, 3, SAMPLES).ravel(), drawn(3, 2, SAMPLES).ravel())


# --- what rounding may decide ---------------------------------------------------------------------------


@pytest.mark.every(20)
@pytest.mark.parametrize(
    "call", [id for id, row in RIGHT.items() if row.network is not None and "none" not in id and "no-rows" not in id]
)
def test_rounding_decides_nothing_in_the_table(call: str) -> None:
    table = TABLE.model_copy(update={"call": [ROWS[call]]})
    assert undecided(table, SINGLES, ()) == ""


TWO = NetworkRow(task="2nd_argmax", hidden=1, length=2, tensors={"linear.weight": [[0.5], [0.5]]})
THREE = NetworkRow(
    task="2nd_argmax", hidden=1, length=3, tensors={"rnn.weight_ih_l0": [[1.0]], "rnn.weight_hh_l0": 0.0}
)
SUM = NetworkRow(
    task="2nd_argmax", hidden=1, length=2, tensors={"rnn.weight_ih_l0": [[0.1]], "rnn.weight_hh_l0": [[0.3]]}
)
UNDECIDED: dict[str, tuple[str, NetworkRow, dict[str, Any], list[Any]]] = {
    "the two largest outputs": ("accuracy", TWO, {"x": "x", "targets": [0]}, [[1.0, 1.0]]),
    "a pre-activation": ("classify_regions", SUM, {"x": "x"}, [[1.0, -0.3]]),
    "two roles": ("probe_neurons", THREE.model_copy(update={"length": 2}), {"n_probes": 9}, [[0.0]]),
}


@pytest.mark.parametrize("why", UNDECIDED)
def test_a_call_that_rounding_decides_has_no_truth(why: str, tmp_path: Path) -> None:
    fn, row, args, x = UNDECIDED[why]
    call = CallRow(id="generated", fn=fn, args=args, network="network")
    table = CallTable(tensors={"x": InputTensor(values=x)}, networks={"network": row}, call=[call])
    assert expected(table, write_inputs(table, tmp_path)).unknown.startswith(why)


# --- the rows of the table ------------------------------------------------------------------------------


BAD: dict[str, dict[str, Any]] = {
    "3 heads of a width of 4": {"heads": 3},
    "stores no views": {"views": True},
    "greater than 0": {"hidden": 0},
    "Input should be": {"task": "argmax"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_network_that_cannot_be_is_refused(message: str) -> None:
    good = {"task": "longest_cycle", "hidden": 4, "length": 4}
    NetworkRow.model_validate(good)
    with pytest.raises(ValidationError, match=message):
        NetworkRow.model_validate(good | BAD[message])


def test_every_function_is_called_on_every_kind_of_network_and_file() -> None:
    assert {row.fn for row in OURS.values()} == set(NETWORKS | TASKS)
    called = {TABLE.networks[str(row.network)].task for row in OURS.values() if row.network is not None}
    assert called == {"2nd_argmax", "argmedian", "median", "longest_cycle"}
    files = {(row.file, row.dtype) for row in TABLE.networks.values()}
    assert {file for file, _ in files} == {"safetensors", "pth", "pth-legacy", "pkl", "bin"}
    assert {dtype for file, dtype in files if file == "pth"} == {"float16", "bfloat16", "float32", "float64"}
