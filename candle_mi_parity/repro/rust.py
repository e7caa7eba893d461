"""An input's interventions as lines of a Rust test, by candle-mi's public API."""

from __future__ import annotations

from collections.abc import Sequence

from candle_mi_parity.repro.shrink import Input
from candle_mi_parity.spec.edits import Attention, Edit, Inject, Knockout, Scale, Steer


def imports(case: Input) -> str:
    """Names that the test imports from ``candle_mi``, in rustfmt's order."""
    names = {"GenericTransformer", "HookPoint", "HookSpec", "MIBackend", "TransformerConfig"}
    for edit in case.edits:
        if isinstance(edit, Knockout):
            names |= {"create_knockout_mask", "KnockoutSpec", "Intervention"}
        elif isinstance(edit, Steer):
            names |= {"apply_steering", "SteeringSpec", "Intervention"}
        elif isinstance(edit, Scale):
            names |= {"Intervention"}
    return ", ".join(sorted(names, key=lambda name: (name[0].isupper(), name)))


def edit_lines(edit: Edit, heads: int, width: int) -> list[str]:
    """Lines that register one edit in ``hooks``, beside ``model``, ``tokens`` and, for an injection, ``sae``.

    :param width: tokens of the prompt.
    """
    point = f'HookPoint::from("{edit.hook}")'
    layer = edit.hook.split(".")[1]
    if isinstance(edit, Knockout):
        return [
            f"let spec = KnockoutSpec::new().layer({layer}){_entries(edit.spec)};",
            f"let mask = create_knockout_mask(&spec, {heads}, {width}, &Device::Cpu, DTYPE)?;",
            f"hooks.intervene({point}, Intervention::Knockout(mask));",
        ]
    if isinstance(edit, Steer):
        return [
            f"let spec = SteeringSpec::{edit.how}({_float(edit.value)}).layer({layer}){_entries(edit.spec)};",
            f"let point = {point};",
            "let mut plain = HookSpec::new();",
            "plain.capture(point.clone());",
            "let cache = model.forward(&tokens, &plain)?;",
            f"let steered = apply_steering(cache.require(&point)?, &spec, {heads}, {width})?;",
            "hooks.intervene(point, Intervention::Replace(steered));",
        ]
    if isinstance(edit, Inject):
        features = ", ".join(f"({int(index)}, {_float(strength)})" for index, strength in edit.features)
        call = f"sae.prepare_hook_injection(&[{features}], {edit.position}, {width}, &Device::Cpu)?"
        return [f"hooks.extend(&{call});"]
    assert isinstance(edit, Scale), f"{edit.kind} was let through"
    return [f"hooks.intervene({point}, Intervention::Scale({edit.factor!r}));"]


def _entries(spec: Attention) -> str:
    """Method calls that select entries of the attention matrix in either spec."""
    calls = [f"heads(&{_list(spec.heads)})"] if spec.heads is not None else []
    calls += [f"edge({query}, {key})" for query, key in spec.edges]
    calls += [f"from_position({query})" for query in spec.from_positions]
    calls += [f"to_position({key})" for key in spec.to_positions]
    calls += [f"from_to_positions({fan.query}, &{_list(fan.keys)})" for fan in spec.from_to]
    return "".join(f".{call}" for call in calls)


def _list(numbers: Sequence[int]) -> str:
    return f"[{', '.join(map(str, numbers))}]"


def _float(number: float) -> str:
    """A short number (at most 8 bits of it) as a Rust literal."""
    return repr(float(number))
