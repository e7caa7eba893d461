"""An input of a hunt as genes, and the case that it is.

A gene is one deviation from the plain case of a family: a slot, as ``config.rope_theta`` or ``tokens``, and a value.
An input is shrunk by leaving genes out, two are crossed by joining them, and each is a dictionary in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.edits import Steer
from candle_mi_parity.spec.families import BIDIRECTIONAL, RECURRENT, is_bidirectional, transformers_type

Genes = dict[str, Any]
"""Slot → value. A slot ``config.KEY`` or ``sae.cfg.KEY`` holds ``["set", value]``, ``["null"]`` or ``["absent"]``."""

LAYERED = ("layer_types", "max_window_layers", "use_sliding_window", "no_rope_layers")
"""Config keys that tell layers apart; an input that has one of them has two layers, any other has one."""
PLAIN_TOKENS = {"random": 6}
PLAIN_SAE: dict[str, Any] = {
    "architecture": "standard",
    "dtype": "float32",
    "hook_name": "blocks.0.hook_resid_post",
    "apply_b_dec_to_input": False,
}


def layers_of(genes: Mapping[str, Any]) -> int:
    """Number of layers of an input's model."""
    return 2 if any(f"config.{key}" in genes for key in LAYERED) or {"layers", "recurrent"} & genes.keys() else 1


def case_of(family: str, genes: Genes) -> Case:
    """The case of an input.

    :raises CaseTableError: the genes do not fit together, as an edit in a layer that is not there.
    """
    config = _of(genes, "config.")
    model: dict[str, Any] = {"source": "tiny", "config": f"models/{transformers_type(family)}.json", "dialect": "hub"}
    model["change"] = {"num_hidden_layers": layers_of(genes)} | config["set"]
    if family in BIDIRECTIONAL:
        model["change"]["model_type"] = family
    model |= {name: held for name in ("null", "absent") if (held := list(config[name]))}
    # from_pretrained, which alone reads a pickle, loads float32 only.
    files = genes if "loader" in genes and "dtype" not in genes else genes.keys() - {"layout.pickle"}
    model |= {name: held for name in ("weights", "layout") if (held := _flags(files, f"{name}."))}
    if "shards" in genes:
        model["shards"] = genes["shards"]
    row: dict[str, Any] = {"id": f"{family}/hunt", "model": model, "unmeasured": ["*"], "stored": "whole"}
    row["tokens"] = genes.get("tokens", PLAIN_TOKENS)
    if "dtype" in genes:
        row["dtype"] = genes["dtype"]
    elif "loader" in genes:
        row["loader"] = genes["loader"]
    if any(slot.partition(".")[0] == "sae" for slot in genes):
        row["sae"] = _sae(genes)
    if "recurrent" in genes:
        row["recurrent"] = genes["recurrent"]
    if family in RECURRENT:
        row["features"] = ["rwkv"]
    row["edits"] = [genes[slot] for slot in sorted(genes) if slot.startswith("edit.")]
    try:
        case = Case.model_validate(row)
    except ValueError as error:
        raise CaseTableError(one_line(str(error))) from error
    causal = not is_bidirectional({"model_type": family} | config["set"] | dict.fromkeys(config["null"]))
    if causal and any(isinstance(edit, Steer) and edit.sets_the_future for edit in case.edits):
        raise CaseTableError("set_value would put a weight on a key in the future")
    return case


def conditions_of(genes: Genes) -> list[str]:
    """What the genes of a smallest input set, as conditions of an explanation; each is one without which it agrees.

    Weights, files and edits are left out: conditions have no words for most of them.
    """
    found = []
    for slot, value in sorted(genes.items()):
        subject = slot.replace("sae.cfg.", "sae.", 1)
        if slot.startswith(("config.", "sae.cfg.")):
            found += _set_to(subject, value)
        elif slot in ("dtype", "loader"):
            found.append(f"{slot} = {json.dumps(value)}")
        elif slot == "tokens" and isinstance(value, dict) and value["random"] > PLAIN_TOKENS["random"]:
            found.append(f"tokens > {value['random'] - 1}")
    return found


def _set_to(subject: str, value: list[Any]) -> list[str]:
    """A key that is absent, null or set; of a block, each of its keys; of a list, that it is there."""
    if value[0] != "set":
        return [f"{subject} {value[0]}"]
    if isinstance(value[1], dict):
        return [each for key, held in value[1].items() for each in _set_to(f"{subject}.{key}", ["set", held])]
    if value[1] is None or isinstance(value[1], list):
        return [f"{subject} {'null' if value[1] is None else 'present'}"]
    return [f"{subject} = {json.dumps(value[1])}"]


def _of(genes: Genes, prefix: str) -> dict[str, Any]:
    """The genes of one file by what they do: ``set``, ``null``, ``absent``."""
    found: dict[str, Any] = {"set": {}, "null": [], "absent": []}
    for slot, value in genes.items():
        if slot.startswith(prefix):
            key = slot.removeprefix(prefix)
            if value[0] == "set":
                found["set"][key] = value[1]
            else:
                found[value[0]].append(key)
    return found


def _flags(genes: Iterable[str], prefix: str) -> list[str]:
    return sorted(slot.removeprefix(prefix) for slot in genes if slot.startswith(prefix))


def _sae(genes: Genes) -> dict[str, Any]:
    if "sae.npz" in genes:
        return {"layer": 0, "d_sae": 32, "threshold": genes["sae.npz"]}
    cfg = _of(genes, "sae.cfg.")
    held = {key: value for key, value in (PLAIN_SAE | cfg["set"]).items() if key not in cfg["absent"]}
    sae: dict[str, Any] = {"layer": 0, "d_sae": 32, "cfg": held}
    if "sae.threshold" in genes or held.get("architecture") == "jumprelu":
        sae["threshold"] = genes.get("sae.threshold", 0.25)
    if "sae.weights" in genes:
        sae["weights"] = genes["sae.weights"]
    if "sae.point" in genes:
        sae["point"] = genes["sae.point"]
        if "hook_name" in held and "hook_name" not in cfg["set"]:
            held["hook_name"] = f"blocks.0.{genes['sae.point']}"
    if "sae.scaling_factor" in genes:
        sae["scaling_factor"] = True
    if statistics := _flags(genes, "sae.statistics."):
        sae["statistics"] = statistics
    return sae


def entries_of(genes: Genes) -> dict[str, str]:
    """The entries of the menu that an input uses → the slot that it is in."""
    found = {}
    for slot, value in genes.items():
        if slot == "tokens":
            continue
        if slot.startswith("edit."):
            found[f"edit.{value['kind']}@{value['hook'].split('.', 2)[-1]}"] = slot
        elif slot == "recurrent":
            found[f"recurrent, {value['depth']} passes{' with feedback' if value['feedback'] else ''}"] = slot
        elif isinstance(value, list) and len(value) == 2 and isinstance(value[1], dict) and value[1]:
            found |= {f"{slot}.{key}={json.dumps(held)[:40]}": slot for key, held in value[1].items()}
        elif isinstance(value, list):
            found[f"{slot} {value[0]} {json.dumps(value[1])[:60]}" if len(value) > 1 else f"{slot} {value[0]}"] = slot
        else:
            found[slot if value is True else f"{slot}={json.dumps(value)}"] = slot
    return found
