"""The steps that make a model, its SAE and its edits smaller."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from candle_mi_parity.repro.shrink import RWKV, Input, Pair, Step
from candle_mi_parity.spec.cases import Layout, SaelensDirectory, SaeStatistic, Statistic
from candle_mi_parity.spec.edits import Edit, Inject, Knockout, StateKnockout, StateSteer, Steer
from candle_mi_parity.spec.families import RECURRENT

Change = Callable[..., Input]
"""``change(side, size)``: a side of that size; what no longer exists moves to the last that is left."""


def _sizes(label: str, sizes: Iterable[int], now: Callable[[Input], object], change: Change) -> Step:
    """Each smaller size, for both sides.

    :param now: the size of the case; a step is skipped where it is not a number.
    """

    def step(pair: Pair) -> Iterator[tuple[str, Pair]]:
        largest = now(pair.case)
        for size in sizes:
            if isinstance(largest, int) and size < largest:
                yield label.format(size), pair.both(partial(change, size=size))

    return step


def _key_sizes(key: str, sizes: Iterable[int], label: str = "", change: Change | None = None) -> Step:
    """The sizes of a key of ``config.json``."""
    set_key = lambda side, size: replace(side, config=side.config | {key: size})  # noqa: E731
    return _sizes(label or f"{key} {{}}", sizes, lambda side: side.config.get(key), change or set_key)


def _on_layers(side: Input, size: int) -> Input:
    """Move what is in a removed layer to the last remaining one."""

    def moved(text: str) -> str:
        return re.sub(r"\bblocks\.(\d+)\.", lambda at: f"blocks.{min(int(at[1]), size - 1)}.", text)

    config = side.config | {"num_hidden_layers": size}
    if kinds := config.get("layer_types"):
        config["layer_types"] = kinds[:size]
    sae = side.sae
    if sae is not None:
        sae = SaelensDirectory.model_validate_json(moved(sae.model_dump_json()))
        sae = sae.model_copy(update={"layer": min(sae.layer, size - 1)})
    hooked = (edit.model_copy(update={"hook": moved(edit.hook)}) for edit in side.edits)
    edits = tuple(_mapped(edit, frozenset({"layers"}), lambda layer: min(layer, size - 1)) for edit in hooked)
    recurrent = side.recurrent
    if recurrent is not None:
        recurrent = recurrent.model_copy(update={"layers": [min(layer, size - 1) for layer in recurrent.layers]})
    return replace(side, config=config, sae=sae, edits=edits, recurrent=recurrent)


def _on_tokens(side: Input, size: int) -> Input:
    """The first tokens; an edit at a later position moves to the last one."""
    edits = tuple(_mapped(edit, _POSITIONS, lambda position: min(position, size - 1)) for edit in side.edits)
    recurrent = side.recurrent
    if recurrent is not None:
        fed = [row.model_copy(update={"position": min(row.position, size - 1)}) for row in recurrent.feedback]
        recurrent = recurrent.model_copy(update={"feedback": fed})
    return replace(side, tokens=side.tokens[:size], edits=edits, recurrent=recurrent)


def _mapped(edit: Edit, names: frozenset[str], change: Callable[[int], int]) -> Edit:
    """An edit with the integers in some of its fields changed."""

    def walk(value: Any, named: bool) -> Any:
        if isinstance(value, dict):
            return {key: walk(inner, named or key in names) for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, named) for inner in value]
        return change(value) if named and isinstance(value, int) else value

    return type(edit).model_validate(walk(edit.model_dump(), False))


def _fewer_edits(pair: Pair) -> Iterator[tuple[str, Pair]]:
    """Without one edit, or without one entry of an edit."""
    edits = pair.case.edits
    for index, edit in enumerate(edits):
        before, after = edits[:index], edits[index + 1 :]
        if len(edits) > 1:
            yield f"without the {edit.kind}", _edited(pair, (*before, *after))
        for label, fewer in _fewer_entries(edit):
            yield f"{edit.kind} without {label}", _edited(pair, (*before, fewer, *after))


def _fewer_passes(pair: Pair) -> Iterator[tuple[str, Pair]]:
    """Without the recurrence, one of its vectors, a pass, or a layer of its range."""
    found = pair.case.recurrent
    if found is None:
        return
    yield "without the recurrence", pair.both(lambda side: replace(side, recurrent=None))
    changes: list[tuple[str, dict[str, object]]] = []
    for index in range(len(found.feedback)):
        changes.append(("without a feedback", {"feedback": found.feedback[:index] + found.feedback[index + 1 :]}))
    changes += [(f"{depth} passes", {"depth": depth}) for depth in range(1, found.depth)]
    changes += [("a layer alone", {"layers": [layer, layer]}) for layer in found.layers if len({*found.layers}) > 1]
    for label, change in changes:
        fewer = found.model_copy(update=change)
        control = pair.control
        if control is not None and control.recurrent is not None:
            control = replace(control, recurrent=fewer)
        yield label, Pair(replace(pair.case, recurrent=fewer), control)


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
    if isinstance(edit, StateKnockout | StateSteer):
        for position in edit.at if len(edit.at) > 1 else ():
            yield "a position", edit.model_copy(update={"at": [each for each in edit.at if each != position]})
        if edit.layers is not None:
            yield "other layers", edit.model_copy(update={"layers": None})


def _on_features(side: Input, size: int) -> Input:
    """A narrower SAE; removed features are replaced by others, and TopK keeps at most all."""
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


def _on_vocabulary(side: Input, size: int) -> Input:
    tokens = tuple(token if token < 3 else 3 + token % (size - 3) for token in side.tokens)
    return replace(side, config=side.config | {"vocab_size": size}, tokens=tokens)


def _heads(pair: Pair) -> Iterator[tuple[str, Pair]]:
    def fewer(side: Input) -> Input:
        change = {"num_attention_heads": ours, "num_key_value_heads": theirs}
        edits = tuple(_mapped(edit, frozenset({"heads"}), lambda head: min(head, ours - 1)) for edit in side.edits)
        return replace(side, config=side.config | change, edits=edits)

    for ours, theirs in ((1, 1), (2, 1), (2, 2), (4, 1)):
        if pair.case.config["model_type"] not in RECURRENT and ours < pair.case.config["num_attention_heads"]:
            yield f"{ours} heads, {theirs} for keys", pair.both(fewer)


def _head_width(side: Input) -> object:
    """Of RWKV-6, whose ``num_attention_heads`` is the width of a head; None for any other model."""
    return side.config["num_attention_heads"] if side.config["model_type"] == "rwkv6" else None


def _on_head_width(side: Input, size: int) -> Input:
    keys = [key for key in ("num_attention_heads", "head_size") if key in side.config]
    return replace(side, config=side.config | dict.fromkeys(keys, size))


def _usual(oddity: Statistic | Layout | SaeStatistic) -> Step:
    """Without a statistic of the weights or of the SAE's, or a layout of the files."""

    def step(pair: Pair) -> Iterator[tuple[str, Pair]]:
        case = pair.case
        if oddity in (*case.weights, *case.layout, *(case.sae.statistics if case.sae else ())):
            yield f"without {oddity}", pair.both(partial(_without_oddity, oddity=oddity))

    return step


def _plain_loader(pair: Pair) -> Iterator[tuple[str, Pair]]:
    """The model is loaded from its config and one file of weights, which a test in candle-mi's own crate can do."""
    if pair.case.loader == "pretrained":
        yield "not through from_pretrained", pair.both(loaded_plainly)


def loaded_plainly(side: Input) -> Input:
    """The same weights without from_pretrained, which alone reads pickles."""
    layout = tuple(held for held in side.layout if held is not Layout.PICKLE)
    features = tuple(held for held in side.features if held == RWKV)
    return replace(side, loader="hf", features=features, layout=layout)


def _without_oddity(side: Input, oddity: Statistic | Layout | SaeStatistic) -> Input:
    sae = side.sae
    if sae is not None:
        sae = sae.model_copy(update={"statistics": [held for held in sae.statistics if held is not oddity]})
    weights = tuple(held for held in side.weights if held is not oddity)
    return replace(side, sae=sae, weights=weights, layout=tuple(held for held in side.layout if held is not oddity))


def _settings(pair: Pair) -> Iterator[tuple[str, Pair]]:
    """Smaller integers among the differing config keys, such as a window's length; in the case only."""
    for key in pair.differing:
        value = pair.case.config.get(key)
        for size in (0, 1, 2, 4):
            if isinstance(value, int) and not isinstance(value, bool) and size < value:
                case = replace(pair.case, config=pair.case.config | {key: size})
                yield f"{key} {size}", Pair(case, pair.control)


_POSITIONS = frozenset({"at", "position", "edges", "from_positions", "to_positions", "query", "keys"})

STEPS: tuple[Step, ...] = (
    _plain_loader,
    _fewer_edits,
    _fewer_passes,
    *map(_usual, (*Statistic, *Layout, *SaeStatistic)),
    _sizes("{} files of weights", (1,), lambda side: side.shards, lambda side, size: replace(side, shards=size)),
    _key_sizes("num_hidden_layers", range(1, 1000), "{} layers", _on_layers),
    _key_sizes("intermediate_size", (2, 4, 8, 16)),
    _key_sizes("vocab_size", (8, 16, 32), "vocabulary of {}", _on_vocabulary),
    _settings,
    _sizes("{} tokens", (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128), lambda side: len(side.tokens), _on_tokens),
    _heads,
    _sizes("heads of {}", (2, 4, 8), _head_width, _on_head_width),
    _key_sizes("head_dim", (2, 4, 8)),
    *(_key_sizes(f"{projection}_low_rank_dim", (1, 2, 4, 8)) for projection in ("decay", "a", "v", "gate")),
    _key_sizes("hidden_size", (2, 4, 8, 16, 32)),
    _sizes("d_sae {}", (2, 4, 8, 16, 32), lambda side: side.sae and side.sae.d_sae, _on_features),
    _fewer_sae_keys,
)
