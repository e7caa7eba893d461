"""The steps that make a model, its SAE and its edits smaller."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from candle_mi_parity.repro.shrink import Config, Input, Pair, Step
from candle_mi_parity.spec.cases import SaelensDirectory
from candle_mi_parity.spec.edits import Edit, Inject, Knockout, Steer


def _both(pair: Pair, config: Config, tokens: tuple[int, ...] | None = None) -> Pair:
    return pair.both(lambda side: replace(side, config=side.config | config, tokens=tokens or side.tokens))


def _layers(pair: Pair) -> Iterator[tuple[str, Pair]]:
    for count in range(1, pair.case.config["num_hidden_layers"]):
        yield f"{count} layers", pair.both(partial(_on_layers, count=count))


def _on_layers(side: Input, count: int) -> Input:
    """Move what is in a removed layer to the last remaining one."""

    def moved(text: str) -> str:
        return re.sub(r"\bblocks\.(\d+)\.", lambda at: f"blocks.{min(int(at[1]), count - 1)}.", text)

    config = side.config | {"num_hidden_layers": count}
    if kinds := config.get("layer_types"):
        config["layer_types"] = kinds[:count]
    sae = side.sae
    if sae is not None:
        sae = SaelensDirectory.model_validate_json(moved(sae.model_dump_json()))
        sae = sae.model_copy(update={"layer": min(sae.layer, count - 1)})
    edits = tuple(edit.model_copy(update={"hook": moved(edit.hook)}) for edit in side.edits)
    return replace(side, config=config, sae=sae, edits=edits)


def _tokens(pair: Pair) -> Iterator[tuple[str, Pair]]:
    for count in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128):
        if count < len(pair.case.tokens):
            yield f"{count} tokens", pair.both(partial(_on_tokens, count=count))


def _on_tokens(side: Input, count: int) -> Input:
    """The first tokens; an edit at a later position moves to the last one."""
    edits = tuple(_mapped(edit, _POSITIONS, lambda position: min(position, count - 1)) for edit in side.edits)
    return replace(side, tokens=side.tokens[:count], edits=edits)


def _mapped(edit: Edit, names: frozenset[str], change: Callable[[int], int]) -> Edit:
    """An edit with the integers in some of its fields changed."""

    def walk(value: Any, named: bool) -> Any:
        if isinstance(value, dict):
            return {key: walk(inner, named or key in names) for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, named) for inner in value]
        return change(value) if named and isinstance(value, int) else value

    return type(edit).model_validate(walk(edit.model_dump(), False))


def _on_heads(side: Input, count: int) -> Input:
    edits = tuple(_mapped(edit, frozenset({"heads"}), lambda head: min(head, count - 1)) for edit in side.edits)
    return replace(side, edits=edits)


def _fewer_edits(pair: Pair) -> Iterator[tuple[str, Pair]]:
    """Without one edit, or without one entry of an edit."""
    edits = pair.case.edits
    for index, edit in enumerate(edits):
        before, after = edits[:index], edits[index + 1 :]
        if len(edits) > 1:
            yield f"without the {edit.kind}", _edited(pair, (*before, *after))
        for label, fewer in _fewer_entries(edit):
            yield f"{edit.kind} without {label}", _edited(pair, (*before, fewer, *after))


def _edited(pair: Pair, edits: tuple[Edit, ...]) -> Pair:
    return Pair(replace(pair.case, edits=edits), pair.control)


def _fewer_entries(edit: Edit) -> Iterator[tuple[str, Edit]]:
    if isinstance(edit, Inject):
        for index in range(len(edit.features) if len(edit.features) > 1 else 0):
            features = [feature for place, feature in enumerate(edit.features) if place != index]
            yield "a feature", edit.model_copy(update={"features": features})
    if isinstance(edit, Knockout | Steer):
        for name in ("edges", "from_positions", "to_positions", "from_to"):
            for index in range(len(getattr(edit.spec, name))):
                kept = [entry for place, entry in enumerate(getattr(edit.spec, name)) if place != index]
                yield name, edit.model_copy(update={"spec": edit.spec.model_copy(update={name: kept})})


def _features(pair: Pair) -> Iterator[tuple[str, Pair]]:
    """A narrower SAE; removed features are replaced by others, and TopK keeps at most all."""
    for size in (2, 4, 8, 16, 32):
        if pair.case.sae is not None and size < pair.case.sae.d_sae:
            yield f"d_sae {size}", pair.both(partial(_on_features, size=size))


def _on_features(side: Input, size: int) -> Input:
    if side.sae is None:
        return side
    cfg = json.loads(
        json.dumps(side.sae.cfg), object_hook=lambda at: at | ({"k": min(at["k"], size)} if "k" in at else {})
    )
    edits = tuple(
        edit.model_copy(update={"features": [[index % size, strength] for index, strength in edit.features]})
        if isinstance(edit, Inject)
        else edit
        for edit in side.edits
    )
    return replace(side, sae=side.sae.model_copy(update={"d_sae": size, "cfg": cfg}), edits=edits)


def _fewer_sae_keys(pair: Pair) -> Iterator[tuple[str, Pair]]:
    """Without a key of ``cfg.json`` that is the same on both sides."""
    case, control = pair.case.sae, pair.control.sae if pair.control else None
    if case is None:
        return
    for key in case.cfg:
        if control is None or control.cfg.get(key) == case.cfg[key]:
            yield f"cfg.json without {key}", pair.both(partial(_without_sae_key, key=key))


def _without_sae_key(side: Input, key: str) -> Input:
    if side.sae is None:
        return side
    cfg = {name: value for name, value in side.sae.cfg.items() if name != key}
    return replace(side, sae=side.sae.model_copy(update={"cfg": cfg}))


def _vocabulary(pair: Pair) -> Iterator[tuple[str, Pair]]:
    for size in (8, 16, 32):
        if size < pair.case.config["vocab_size"]:
            tokens = tuple(token if token < 3 else 3 + token % (size - 3) for token in pair.case.tokens)
            yield f"vocabulary of {size}", _both(pair, {"vocab_size": size}, tokens)


def _heads(pair: Pair) -> Iterator[tuple[str, Pair]]:
    heads = pair.case.config["num_attention_heads"]
    for ours, theirs in ((1, 1), (2, 1), (2, 2), (4, 1)):
        if ours < heads:
            change = {"num_attention_heads": ours, "num_key_value_heads": theirs}
            yield f"{ours} heads, {theirs} for keys", _both(pair, change).both(partial(_on_heads, count=ours))


def _sizes(key: str, sizes: tuple[int, ...]) -> Callable[[Pair], Iterator[tuple[str, Pair]]]:
    def coordinate(pair: Pair) -> Iterator[tuple[str, Pair]]:
        for size in sizes:
            if isinstance(pair.case.config.get(key), int) and size < pair.case.config[key]:
                yield f"{key} {size}", _both(pair, {key: size})

    return coordinate


def _settings(pair: Pair) -> Iterator[tuple[str, Pair]]:
    """Smaller integers among the differing config keys, such as a window's length; in the case only."""
    for key in pair.differing:
        value = pair.case.config.get(key)
        for size in (0, 1, 2, 4):
            if isinstance(value, int) and not isinstance(value, bool) and size < value:
                case = replace(pair.case, config=pair.case.config | {key: size})
                yield f"{key} {size}", Pair(case, pair.control)


_POSITIONS = frozenset({"position", "edges", "from_positions", "to_positions", "query", "keys"})

STEPS: tuple[Step, ...] = (
    _fewer_edits,
    _layers,
    _sizes("intermediate_size", (2, 4, 8, 16)),
    _vocabulary,
    _settings,
    _tokens,
    _heads,
    _sizes("head_dim", (2, 4, 8)),
    _sizes("hidden_size", (2, 4, 8, 16, 32)),
    _features,
    _fewer_sae_keys,
)
