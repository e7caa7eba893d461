"""The interventions and recurrences that a hunt draws."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from candle_mi_parity.hunt.genes import Genes, layers_of
from candle_mi_parity.spec.hook_points import STATE, hook_names

LAST_PLACE = 5
"""Last position that an edit names in a bidirectional model."""
_STATE_EDITS = ("state_knockout", "state_steer")


def drawn_edit(rng: random.Random, genes: Genes, bidirectional: bool) -> Genes:
    """An edit in a layer that the input has; in a bidirectional model also of a key after its query."""
    layers = layers_of(genes)
    hook = rng.choice(hook_names(layers))
    wide = ".attn." not in hook
    kinds = ["replace", "add", "scale", "zero"]
    kinds += ["patch_at", "patch_at"] if wide else []
    kinds += ["knockout"] * 4 if hook.endswith("hook_scores") else []
    kinds += ["steer"] * 4 if hook.endswith("hook_pattern") else []
    kind = rng.choice(kinds)
    edit = _tensor_edit(rng, kind, hook, wide)
    if kind in ("knockout", "steer"):
        edit["spec"] = _spec(rng, layers, LAST_PLACE if bidirectional else None)
    if kind == "steer":
        how = rng.choice(["scale", "set_value"])  # candle-mi refuses to set a weight above 1
        edit |= {"how": how, "value": rng.choice([0.0, 0.25, 1.0, *([3.0] if how == "scale" else [])])}
    return _as_gene(genes, edit)


def drawn_recurrent_edit(rng: random.Random, genes: Genes) -> Genes:
    """An edit of the stream of a model without attention, or of what is written into its state.

    A pass takes one edit of each kind of the state, whose positions may lie behind the prompt.
    """
    layers = layers_of(genes)
    there = {edit["kind"] for slot, edit in genes.items() if slot.startswith("edit.")}
    free = [kind for kind in _STATE_EDITS if kind not in there]
    if not free or rng.random() < 0.4:
        hook = rng.choice([name for name in hook_names(layers, recurrent=True) if ".rwkv." not in name])
        kind = rng.choice(["replace", "add", "scale", "zero", "patch_at"])
        return _as_gene(genes, _tensor_edit(rng, kind, hook, wide=True))
    edit: dict[str, Any] = {"kind": rng.choice(free), "hook": f"blocks.{rng.randrange(layers)}.{STATE}"}
    edit["at"] = sorted(rng.sample([0, 1, 2, 3, 4, 7, 12, 40], rng.choice([1, 1, 2, 3])))
    first = rng.randrange(layers)
    edit["layers"] = rng.choice([None, None, "all", [first, rng.randrange(first, layers)]])
    if edit["kind"] == "state_steer":
        edit["factor"] = rng.choice([0.0, 0.5, 2.0, -1.0, 1.0])
    return _as_gene(genes, edit)


def _as_gene(genes: Genes, edit: dict[str, Any]) -> Genes:
    return {f"edit.{sum(slot.startswith('edit.') for slot in genes)}": edit}


def _tensor_edit(rng: random.Random, kind: str, hook: str, wide: bool) -> dict[str, Any]:
    """An edit of a kind, with what one of a whole tensor is given.

    :param wide: whether the hook's tensor is [B, T, d].
    """
    edit: dict[str, Any] = {"kind": kind, "hook": hook}
    if kind in ("replace", "add", "patch_at"):
        edit |= {"seed": rng.randrange(3), "size": rng.choice([0.1, 1.0, 10.0])}
        shapes = {
            "add": ["[d]", "[1, d]", "[1, 1, d]", "[1, T, d]", "[B, 1, d]"],
            "patch_at": ["[1, 1, d]", "[B, 1, d]"],
        }
        if wide and kind in shapes and rng.random() < 0.5:
            edit["shape"] = rng.choice(shapes[kind])
    if kind == "patch_at":
        edit["position"] = rng.choice([0, 1, 2, 5])
    if kind == "scale":
        edit["factor"] = rng.choice([0.0, 0.5, -1.0, 2.0])
    return edit


def drawn_recurrence(rng: random.Random) -> dict[str, Any]:
    """A range of the two layers."""
    first = rng.randrange(2)
    fed = [
        {"position": rng.choice([0, 1, 2, 5]), "strength": rng.choice([-1.0, 0.5, 4.0]), "seed": rng.randrange(3)}
        for _ in range(rng.choice([0, 0, 1, 2]))
    ]
    return {"layers": [first, rng.randrange(first, 2)], "depth": rng.choice([1, 2, 2, 3]), "feedback": fed}


def _spec(rng: random.Random, layers: int, last: int | None) -> dict[str, Any]:
    """:param last: the last key; None for keys before their query."""
    spec: dict[str, Any] = {}
    if rng.random() < 0.3:
        first = rng.randrange(layers)
        spec["layers"] = [first, rng.randrange(first, layers)]
    if rng.random() < 0.4:
        spec["heads"] = sorted(rng.sample(range(4), rng.choice([1, 2])))
    query = rng.choice([1, 2, 3, 4])
    keys = query if last is None else last + 1
    which = rng.choice(["edges", "edges", "from_to", "to_positions", "from_positions"])
    if which == "edges":
        spec["edges"] = [[query, rng.randrange(keys)] for _ in range(rng.choice([1, 1, 2]))]
    elif which == "from_to":
        spec["from_to"] = [{"query": query, "keys": sorted({0, rng.randrange(keys)})}]
    else:
        spec[which] = [query]
    return spec


def places_of(edit: Mapping[str, Any]) -> list[int]:
    """The positions that an edit or a recurrence names."""
    spec = edit.get("spec", {})
    places = [edit.get("position", 0), *spec.get("from_positions", []), *spec.get("to_positions", [])]
    places += [place for edge in spec.get("edges", []) for place in edge]
    places += [place for fan in spec.get("from_to", []) for place in (fan["query"], *fan["keys"])]
    return places + [row["position"] for row in edit.get("feedback", [])]
