"""How small a mistake may be and still be seen: the smallest dose of each sized fault that is killed.

A dose is a factor 1 + ε with ε a power of two, so that an answer is right to a factor of two. The two parts of the
gate are told apart, and the free run from the teacher-forced one, where the gate is narrow in deep layers too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import InMemory
from tests.support.planting import Arrays, Real, real, with_arrays

CASES = ("llama/hub", "gemma2/hub", "smollm2/hub")
MODES: tuple[Mode, ...] = ("free", "forced")
SMALLEST, LARGEST = -27, 6
"""Exponents of ε: 2⁻²⁷ is below float32's resolution, 2⁶ is no small mistake."""

Model = Any
InModel = Callable[[Model, float], Iterator[None]]
InDump = Callable[[Arrays, float], None]


@dataclass(frozen=True)
class Dose:
    """The smallest ε that is killed, for one fault on one case in one mode; None where 2⁶ is not.

    :ivar position: by the position part of the gate alone; ``element`` by the other; ``gate`` by either.
    :ivar first: the tensor that fails first at ``gate``.
    """

    case: str
    mode: str
    fault: str
    position: float | None
    element: float | None
    gate: float | None
    first: str


@dataclass(frozen=True)
class Seen:
    """Of one dose: which parts of the gate it passes, and the tensor that fails first."""

    position: bool
    element: bool
    gate: bool
    first: str


# --- the faults -----------------------------------------------------------------------------------


def _middle(model: Model) -> Any:
    return model.model.layers[len(model.model.layers) // 2]


@contextmanager
def _times(tensor: torch.Tensor, factor: float) -> Iterator[None]:
    """A tensor, in place, times a factor for a while."""
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.mul_(factor)
        yield
        tensor.copy_(before)


@contextmanager
def _attributes(owners: list[Any], name: str, factor: float) -> Iterator[None]:
    before = [getattr(owner, name) for owner in owners]
    for owner, value in zip(owners, before, strict=True):
        setattr(owner, name, value * factor)
    yield
    for owner, value in zip(owners, before, strict=True):
        setattr(owner, name, value)


@contextmanager
def one_weight(model: Model, factor: float) -> Iterator[None]:
    """One element of one matrix of the middle layer."""
    with _times(_middle(model).mlp.gate_proj.weight[3, 5:6], factor):
        yield


@contextmanager
def one_head(model: Model, factor: float) -> Iterator[None]:
    """One head's rows of the middle layer's query projection."""
    attention = _middle(model).self_attn
    with _times(attention.q_proj.weight[attention.head_dim : 2 * attention.head_dim], factor):
        yield


@contextmanager
def theta(model: Model, factor: float) -> Iterator[None]:
    """rope_theta, hence every rotary frequency but the first."""
    frequencies = model.model.rotary_emb.inv_freq
    count = len(frequencies)
    with _times(frequencies, 1.0):  # keeps the honest ones
        frequencies.mul_(float(factor) ** (-torch.arange(count, dtype=torch.float64) / count).float())
        yield


@contextmanager
def norm_eps(model: Model, factor: float) -> Iterator[None]:
    """eps of every norm."""
    name = "variance_epsilon" if hasattr(model.model.norm, "variance_epsilon") else "eps"
    norms = [module for module in model.modules() if isinstance(module, type(model.model.norm))]
    with _attributes(norms, name, factor):
        yield


@contextmanager
def softcap(model: Model, factor: float) -> Iterator[None]:
    """The softcap of attention in every layer."""
    with _attributes([layer.self_attn for layer in model.model.layers], "attn_logit_softcapping", factor):
        yield


@contextmanager
def attention_scale(model: Model, factor: float) -> Iterator[None]:
    """The scale of attention in every layer."""
    with _attributes([layer.self_attn for layer in model.model.layers], "scaling", factor):
        yield


def _middle_output(arrays: Arrays) -> str:
    layers = [name for name in arrays if name.endswith("mlp.hook_post")]
    return layers[len(layers) // 2]


def one_tensor(arrays: Arrays, factor: float) -> None:
    """A captured tensor of the middle layer."""
    arrays[_middle_output(arrays)] *= np.float32(factor)


def one_position(arrays: Arrays, factor: float) -> None:
    """One position of it."""
    arrays[_middle_output(arrays)][0, 11] *= np.float32(factor)


def one_logit(arrays: Arrays, factor: float) -> None:
    """The largest logit of the last position."""
    last = arrays["logits"][0, -1]
    last[np.abs(last).argmax()] *= np.float32(factor)


IN_MODEL: dict[str, Any] = {
    "attention scale": attention_scale,
    "softcap": softcap,
    "rope theta": theta,
    "norm eps": norm_eps,
    "one head's query": one_head,
    "one weight": one_weight,
}
IN_DUMP: dict[str, InDump] = {"one tensor": one_tensor, "one position": one_position, "one logit": one_logit}


# --- the search -----------------------------------------------------------------------------------


def seen(there: Real, dump: InMemory) -> Seen:
    """Judge a dump, as a run compares it."""
    results = compare(there.truth, dump, there.decoder, None)
    failed = [result for result in results if result.status is Status.FAIL]
    return Seen(
        position=any(not result.position_ratio < POSITION_GATE for result in results),
        element=any(not result.element_ratio < ELEMENT_GATE for result in results),
        gate=bool(failed),
        first=failed[0].name if failed else "",
    )


def smallest(killed: Callable[[int], bool]) -> int | None:
    """The least exponent that is killed, by bisection; None when the largest is not."""
    low, high = SMALLEST - 1, LARGEST
    if not killed(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if killed(middle) else (middle, high)
    return high


def dose(case: str, mode: Mode, name: str, run: Callable[[float], Seen]) -> Dose:
    """Search the three thresholds; each dose is judged once.

    :raises AssertionError: the dose of 1, which is no fault, is killed.
    """
    known: dict[int, Seen] = {}

    def at(exponent: int) -> Seen:
        if exponent not in known:
            known[exponent] = run(1 + 2.0**exponent)
        return known[exponent]

    assert not run(1.0).gate, f"{case} {mode} {name}: the clean twin fails"
    found = [smallest(lambda k, part=part: getattr(at(k), part)) for part in ("position", "element", "gate")]  # type: ignore[misc]
    position, element, gate = (None if exponent is None else 2.0**exponent for exponent in found)
    first = "" if found[2] is None else at(found[2]).first
    return Dose(case, mode, name, position, element, gate, first)


def doses(case: str, mode: Mode, step: Callable[[str], None]) -> list[Dose]:
    """All sized faults of a case in a mode."""
    there = real(case, mode)
    found = []
    with TorchSource() as source:
        model = source.model(there.subject.model_dir)

        def in_model(plant: Any, factor: float) -> Seen:
            with ExitStack() as stack:
                stack.enter_context(plant(model, factor))
                return seen(there, source.trace(there.subject, mode, there.truth, there.inputs))

        def in_dump(plant: InDump, factor: float) -> Seen:
            arrays = there.arrays
            plant(arrays, factor)
            return seen(there, with_arrays(there.emitted, arrays))

        for name, plant in IN_MODEL.items():
            if name == "softcap" and getattr(model.config, "attn_logit_softcapping", None) is None:
                continue
            step(f"{case} {mode} {name}")
            found.append(dose(case, mode, name, lambda factor, plant=plant: in_model(plant, factor)))  # type: ignore[misc]
        for name, change in IN_DUMP.items():
            step(f"{case} {mode} {name}")
            found.append(dose(case, mode, name, lambda factor, change=change: in_dump(change, factor)))  # type: ignore[misc]
    return found


# --- what is written ------------------------------------------------------------------------------


def _said(size: float | None) -> str:
    return f"> {2.0**LARGEST:g}" if size is None else f"{size:.1e}"


def markdown(found: list[Dose]) -> str:
    """A row for each fault, case and mode."""
    lines = ["| case | fault | run | position part | element part | gate | first tensor at the gate |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [
        f"| {one.case} | {one.fault} | {one.mode} | {_said(one.position)} | {_said(one.element)} | {_said(one.gate)}"
        f" | {one.first} |"
        for one in found
    ]
    return "\n".join(lines) + "\n"


def plot(found: list[Dose], path: Path) -> None:
    """A panel a case: the two parts of the gate by their marks, free runs filled and forced ones hollow."""
    cases = list(dict.fromkeys(one.case for one in found))
    faults = list(dict.fromkeys(one.fault for one in found))[::-1]
    figure = Figure(figsize=(5 * len(cases), 4.5), layout="tight")
    panels = figure.subplots(1, len(cases), sharex=True, sharey=True, squeeze=False)
    for panel, case in zip(panels[0], cases, strict=True):
        for part, mark, colour in (("position", "o", "tab:blue"), ("element", "s", "tab:orange")):
            for mode, shift in (("free", 0.12), ("forced", -0.12)):
                here = (one for one in found if (one.case, one.mode) == (case, mode))
                rows = [one for one in here if getattr(one, part) is not None]
                panel.plot(
                    [getattr(one, part) for one in rows], [faults.index(one.fault) + shift for one in rows],
                    mark, color=colour, fillstyle="full" if mode == "free" else "none", label=f"{part}, {mode}",
                )  # fmt: skip
        panel.set(title=case, xscale="log", xlabel="smallest ε that is killed")
        panel.set_yticks(range(len(faults)), faults)
        panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize="small")
    figure.savefig(path)


def save(found: list[Dose], out: Path) -> None:
    """Write ``doses.json``, ``doses.md`` and ``doses.svg``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "doses.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    (out / "doses.md").write_text(markdown(found), encoding="utf-8")
    plot(found, out / "doses.svg")
