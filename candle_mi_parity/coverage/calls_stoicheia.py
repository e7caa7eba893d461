"""The reference of candle-mi's module ``stoicheia``, in torch, with its known wrong formulas.

Networks are AlgZoo's (``alg_zoo/architectures.py`` of https://github.com/alignment-research-center/alg-zoo). The
tests compare them with the modules of torch that AlgZoo uses, ``torch.nn.RNN`` and ``torch.nn.MultiheadAttention``,
and the linear map of a region with autograd's Jacobian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from candle_mi_parity.coverage.calls_measures import Named
from candle_mi_parity.coverage.calls_networks import NetworkRow
from candle_mi_parity.coverage.calls_tasks import PROBES, SAMPLES, TASKS, Formulas, classes, drawn, signals
from candle_mi_parity.coverage.formulas import Formula

Edits = Sequence[tuple[str, str, float, torch.Tensor]]
"""A hook point, a kind, the factor or the position, and the tensor."""
THRESHOLD = 0.8
"""The correlation from which on a neuron has a role."""
UNKNOWN = 6


class TorchNetwork:
    """A network in a dtype.

    :ivar formulas: known wrong formulas; none for the truth.
    """

    def __init__(self, row: NetworkRow, formulas: Formulas = (), dtype: torch.dtype = torch.float64) -> None:
        self.row, self.formulas, self.dtype = row, formulas, dtype
        self.weights = {name: torch.from_numpy(array).to(dtype) for name, array in row.weights().items()}
        if wrong := [name for name, shape in row._shapes().items() if self.weights[name].shape != shape]:
            raise ValueError(f"size mismatch for {wrong[0]}")
        if row.missing:
            raise ValueError(f"missing keys: {', '.join(row.missing)}")
        if row.file == "bin":
            raise ValueError("no suffix of a file of weights")

    def run(
        self, x: torch.Tensor, edits: Edits = (), ablated: Collection[int] = ()
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``x`` [N, T] → output [N, O], and the tensor at each hook point before it is edited."""
        hooks: dict[str, torch.Tensor] = {}

        def hook(name: str, tensor: torch.Tensor) -> torch.Tensor:
            hooks[name] = tensor
            if Formula.EDITS_IGNORED in self.formulas:
                return tensor
            for point, kind, number, value in edits:
                tensor = _edited(tensor, kind, number, value) if point == name else tensor
            return tensor

        return (self._recur(x, hook, ablated) if self.row.recurrent else self._attend(x, hook)), hooks

    def _recur(self, x: torch.Tensor, hook: Hook, ablated: Collection[int]) -> torch.Tensor:
        """``torch.nn.RNN(nonlinearity="relu")`` and a linear layer on its final state."""
        if not x.shape[1] and Formula.NO_STEPS not in self.formulas:
            raise ValueError("Expected sequence length to be larger than 0 in RNN")
        hidden = torch.zeros(len(x), self.row.hidden, dtype=self.dtype)
        kept = torch.tensor([neuron not in ablated for neuron in range(self.row.hidden)])
        for step in range(x.shape[1]):
            given = self._linear(x[:, step : step + 1], "rnn.weight_ih_l0", "rnn.bias_ih_l0")
            pre = given + self._linear(hidden, "rnn.weight_hh_l0", "rnn.bias_hh_l0")
            pre = hook(f"rnn.hook_pre_activation.{step}", pre)
            hidden = torch.where(kept, self._relu(pre), 0.0)
            hidden = hook(f"rnn.hook_hidden.{step}", hidden)
        hidden = hook("rnn.hook_final_state", hidden)
        return hook("rnn.hook_output", self.project(hidden))

    def _attend(self, tokens: torch.Tensor, hook: Hook) -> torch.Tensor:
        """Embeddings, ``torch.nn.MultiheadAttention`` in a residual stream, and the unembedding of the last token."""
        embedding, batch, steps = torch.nn.functional.embedding, *tokens.shape
        state = embedding(tokens.long(), self.weights["embed.weight"])
        state = hook("hook_embed", state + embedding(torch.arange(steps), self.weights["pos_embed.weight"]))
        heads = 1 if Formula.ONE_HEAD in self.formulas else self.row.heads
        width = self.row.hidden // heads
        for layer in range(self.row.layers):
            at = f"blocks.{layer}"
            state = hook(f"{at}.hook_resid_pre", state)
            packed = self._linear(state, f"attns.{layer}.in_proj_weight", f"attns.{layer}.in_proj_bias")
            q, k, v = (
                part.reshape(batch, steps, heads, width).transpose(1, 2).reshape(-1, steps, width)
                for part in packed.tensor_split(3, -1)
            )
            scores = (torch.bmm(q, k.transpose(1, 2)) / math.sqrt(width)).reshape(batch, heads, steps, steps)
            pattern = torch.softmax(hook(f"{at}.attn.hook_scores", scores), -1)
            pattern = hook(f"{at}.attn.hook_pattern", pattern).reshape(-1, steps, steps)
            mixed = torch.bmm(pattern, v).reshape(batch, heads, steps, width).transpose(1, 2).reshape(state.shape)
            out = self._linear(mixed, f"attns.{layer}.out_proj.weight", f"attns.{layer}.out_proj.bias")
            state = state + hook(f"{at}.hook_attn_out", out)
            state = hook(f"{at}.hook_resid_post", state)
        return self.project(state[:, -1])

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] → [..., O]."""
        layer = "linear" if self.row.recurrent else "unembed"
        return self._linear(x, f"{layer}.weight", f"{layer}.bias")

    def _linear(self, x: torch.Tensor, weight: str, bias: str) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # a matrix, for which the product has a noise rule
        found = (rows @ self.weights[weight].t()).reshape(*x.shape[:-1], len(self.weights[weight]))
        has = bias in self.weights and Formula.BIASES_UNREAD not in self.formulas
        return found + self.weights[bias] if has else found

    def _relu(self, pre: torch.Tensor) -> torch.Tensor:
        return torch.where(pre.isnan(), 0.0, pre.relu()) if Formula.RELU_OF_NAN in self.formulas else pre.relu()

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [N, T] → [N, T, H]."""
        _, hooks = self.run(x)
        return torch.stack([hooks[f"rnn.hook_pre_activation.{step}"] for step in range(x.shape[1])], 1)

    def active(self, pre: torch.Tensor) -> torch.Tensor:
        """Where ReLU has the derivative 1; at 0 autograd's is 0."""
        return pre >= 0 if Formula.ZERO_FIRES in self.formulas else pre > 0


Hook = Callable[[str, torch.Tensor], torch.Tensor]


def _edited(tensor: torch.Tensor, kind: str, number: float, value: torch.Tensor) -> torch.Tensor:
    """:raises IndexError: there is no such position.
    :raises ValueError: the tensor has no positions.
    """
    if kind == "replace":
        return value
    if kind in ("add", "knockout"):
        return tensor + value
    if kind == "scale":
        return tensor * number
    if kind == "zero":
        return torch.zeros_like(tensor)
    if tensor.dim() != 3:
        raise ValueError("the tensor has no positions")
    parts = list(tensor.unbind(1))
    parts[int(number)] = value.expand_as(parts[0])
    return torch.stack(parts, 1)


def _config(net: TorchNetwork) -> Named:
    """Layers, width, outputs, heads, outputs, parameters."""
    row = net.row
    params = sum(weight.numel() for weight in net.weights.values())
    shape = [1, row.hidden, row.outputs, 0] if row.recurrent else [row.layers, row.hidden, row.outputs, row.heads]
    return {"value": torch.tensor([*shape, row.outputs, params], dtype=torch.float64)}


def _weights(net: TorchNetwork) -> Named:
    names = {"weight_ih": "rnn.weight_ih_l0", "weight_hh": "rnn.weight_hh_l0", "weight_oh": "linear.weight"}
    return {name: net.weights[key] for name, key in names.items()}


def _forward(net: TorchNetwork, x: torch.Tensor, edits: Edits = ()) -> Named:
    output, hooks = net.run(x, edits)
    return {"output": output[:, None], "captured_output": output[:, None], **hooks}


def _ablated(net: TorchNetwork, x: torch.Tensor, ablated: list[int]) -> Named:
    return {"value": net.run(x, ablated=ablated)[0]}


def _traced(net: TorchNetwork, x: torch.Tensor) -> Named:
    """``x`` [T]."""
    return {"pre": net.pre_activations(x[None])[0], "value": net.run(x[None])[0][0]}


def _accuracies(
    net: TorchNetwork, x: torch.Tensor, targets: list[int], sets: Iterable[Collection[int]]
) -> torch.Tensor:
    """With each set of neurons ablated; NaN on no inputs.

    The number of right outputs has no error, and equal numbers have the same error when they are divided.
    """
    wanted = torch.tensor(targets, dtype=torch.int64)
    right = [(net.run(x, ablated=each)[0].argmax(-1) == wanted).sum() for each in sets]
    return _shares(len(targets), net)[torch.stack(right)]


def _shares(count: int, net: TorchNetwork) -> torch.Tensor:
    if not count and Formula.NO_INPUTS in net.formulas:
        return torch.zeros(1, dtype=net.dtype)
    return torch.arange(count + 1).to(net.dtype) / count


def _accuracy(net: TorchNetwork, x: torch.Tensor, targets: list[int]) -> Named:
    return {"value": _accuracies(net, x, targets, [()])[0]}


def _ablate(net: TorchNetwork, x: torch.Tensor, targets: list[int]) -> Named:
    found = _accuracies(net, x, targets, [(), *((neuron,) for neuron in range(net.row.hidden))])
    baseline, each = found[0], found[1:]
    delta = each - baseline
    return {"baseline": baseline, "value": each, "delta": delta, "listed": torch.sort(delta).values}


def _ablate_pairs(net: TorchNetwork, x: torch.Tensor, targets: list[int]) -> Named:
    neurons = range(net.row.hidden)
    pairs = list(combinations(neurons, 2))
    found = _accuracies(net, x, targets, [(), *((neuron,) for neuron in neurons), *pairs])
    alone, delta = found[1 : len(neurons) + 1] - found[0], found[len(neurons) + 1 :] - found[0]
    left, right = (alone[[pair[side] for pair in pairs]] for side in (0, 1))
    named = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    value = found[len(neurons) + 1 :]
    return {"pairs": named, "value": value, "delta": delta, "interaction": delta - (left + right)}


def _standardize(net: TorchNetwork, x: torch.Tensor) -> Named:
    """:raises ValueError: a neuron's input weight is 0 and has no sign."""
    ih, hh, oh = _weights(net).values()
    if not ih.all():
        raise ValueError("an input weight is 0")
    scales, signs = ih[:, 0].abs(), torch.where(ih > 0, 1.0, -1.0).to(net.dtype)
    recurrent, out = hh * scales / scales[:, None], oh * scales
    scaled = TorchNetwork(net.row, net.formulas, net.dtype)
    scaled.weights |= {"rnn.weight_ih_l0": signs, "rnn.weight_hh_l0": recurrent, "linear.weight": out}
    found = {"scales": scales, "weight_ih": signs[:, 0], "weight_hh": recurrent, "weight_oh": out}
    return found | {"quality": torch.zeros((), dtype=net.dtype), "value": scaled.run(x)[0]}


def _regions(net: TorchNetwork, x: torch.Tensor) -> Named:
    """The patterns of all inputs by count, largest first, and those of equal counts in their own order."""
    active = net.active(net.pre_activations(x))
    found, counts = np.unique(active.flatten(1).numpy(), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    patterns = torch.from_numpy(found[order]).double().reshape(-1, *active.shape[1:])
    listed = torch.from_numpy(counts[order]).double()
    total = torch.tensor(float(len(x)), dtype=torch.float64)
    return {"total": total, "listed": listed, "patterns": patterns, "counts": listed, "own": patterns}


def _linear_map(net: TorchNetwork, x: torch.Tensor | None = None, pre: torch.Tensor | None = None) -> Named:
    """The Jacobian [O, T] of the output at an input ``x`` [T], or where pre-activations [T, H] have these signs."""
    if x is not None:
        pre = net.pre_activations(x[None])[0]
    assert pre is not None
    gates = net.active(pre)
    ih, hh, oh = _weights(net).values()
    columns = []
    for step in range(len(gates)):
        state = torch.where(gates[step][:, None], ih, 0.0)
        for later in gates[step + 1 :]:
            state = torch.where(later[:, None], hh @ state, 0.0)
        columns.append(oh @ state)
    return {"value": torch.cat(columns, 1)}


def correlations(net: TorchNetwork, n_probes: int) -> tuple[list[int], torch.Tensor]:
    """Roles, and the size of each neuron's correlation with their signals [signals, H]."""
    x = torch.from_numpy(drawn(n_probes, net.row.length, PROBES)).to(net.dtype)
    _, hooks = net.run(x)
    final = hooks["rnn.hook_final_state"]
    roles, rows = zip(*signals(x, net.formulas), strict=True)
    activations, references = (_centred(rows) for rows in (final.t().contiguous(), torch.stack(rows)))
    covariance = references @ activations.t()
    sizes = (references.square().sum(1)[:, None] * activations.square().sum(1)).sqrt()
    constant = sizes == 0  # correlates with nothing
    return list(roles), torch.where(constant, 0.0, covariance / torch.where(constant, 1.0, sizes)).abs()


def _centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(1, keepdim=True)


def _probe(net: TorchNetwork, n_probes: int) -> Named:
    roles, found = correlations(net, n_probes)
    best = found.max(0).values
    role = torch.tensor(roles, dtype=torch.float64)[found.argmax(0)]
    return {"role": torch.where(best < THRESHOLD, float(UNKNOWN), role), "value": best}


def _surprise(net: TorchNetwork, n_samples: int, class_: int | None = None) -> Named:
    """:raises ValueError: the task has no classes; AlgZoo has no accuracy of such a network."""
    x = torch.from_numpy(drawn(n_samples, net.row.length, SAMPLES)).to(net.dtype)
    right = classes(net.row.task, x, net.formulas)
    given = net.run(x)[0].argmax(-1)
    estimated = right if class_ is None else torch.full_like(right, class_)
    params = sum(weight.numel() for weight in net.weights.values())
    chance = 0.0 if net.row.task == "median" else 1 / net.row.outputs
    shares = _shares(n_samples, net)
    return {
        "model": shares[(given == right).sum()],
        "estimate": shares[(estimated == right).sum()],
        "disagreement": shares[(given != estimated).sum()],
        "agreement": shares[(given == estimated).sum()],
        "chance": torch.tensor(chance, dtype=torch.float64),
        "counts": torch.tensor([float(params), float(n_samples)], dtype=torch.float64),
    }


_RNN = frozenset({Formula.RELU_OF_NAN, Formula.BIASES_UNREAD})
_COUNTED = _RNN | {Formula.NO_INPUTS}
_GATES = _RNN | {Formula.ZERO_FIRES}
_ALL = _RNN | {Formula.EDITS_IGNORED, Formula.ONE_HEAD, Formula.NO_STEPS}
NETWORKS: dict[str, tuple[frozenset[Formula], Callable[..., Named]]] = {
    "network_config": (frozenset(), _config),
    "network_weights": (frozenset(), _weights),
    "network_forward": (_ALL, _forward),
    "network_project": (frozenset({Formula.BIASES_UNREAD}), lambda net, x: {"value": net.project(x)}),
    "forward_fast": (_RNN, lambda net, x: {"value": net.run(x)[0]}),
    "forward_fast_ablated": (_RNN, _ablated),
    "forward_fast_traced": (_RNN, _traced),
    "accuracy": (_COUNTED, _accuracy),
    "ablate_neurons": (_COUNTED, _ablate),
    "ablate_neuron_pairs": (_COUNTED, _ablate_pairs),
    "standardize_rnn": (_RNN, _standardize),
    "classify_regions": (_GATES, _regions),
    "region_linear_map": (_GATES, _linear_map),
    "probe_neurons": (_RNN | {Formula.SIGNALS_AS_CODED}, _probe),
    "surprise_accounting": (_RNN | {Formula.CLASS_ZERO}, _surprise),
}
"""Function of a network → its wrong formulas, and what computes it of a network with some of them."""


def network_call(
    fn: str, row: NetworkRow | None, formulas: Formulas, dtype: torch.dtype, args: dict[str, Any]
) -> Callable[[], Named]:
    """A call of one of :data:`NETWORKS` or :data:`TASKS` with its arguments."""
    if "class" in args:
        args = {key: value for key, value in args.items() if key != "class"} | {"class_": args["class"]}
    if fn in TASKS:
        return lambda: TASKS[fn][1](formulas, **args)
    assert row is not None
    return lambda: NETWORKS[fn][1](TorchNetwork(row, formulas, dtype), **args)
