"""Shrinking: the smallest input whose first divergence is still the same one.

A candle-mi may differ from PyTorch for more than one reason, and a smaller config may fall into another of them. So
every step is judged twice: the input must diverge first at the same hook point in the same way, and its control, the
same input without what the case is about, must agree with PyTorch wherever the two are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

Config = dict[str, Any]
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Config keys that are made smaller; every other one is left out if it can be."""
MOST_ATTEMPTS = 150
ROUNDS = 3


@dataclass(frozen=True)
class Input:
    """What both sides are given.

    :ivar config: ``config.json``; the weights follow from it.
    :ivar tokens: one row of ids.
    """

    config: Config
    tokens: tuple[int, ...]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class Divergence:
    """By what two divergences are the same one: the hook point, whichever the layer, and how it differs.

    :ivar reason: :attr:`candle_mi_parity.verdict.TensorResult.reason`.
    """

    point: str
    reason: str

    @staticmethod
    def at(tensor: str, reason: str) -> Divergence:
        return Divergence(re.sub(r"^blocks\.\d+\.", "blocks.*.", tensor), reason)


Judge = Callable[[Input], Divergence | None]
"""The first divergence of an input, None when all of it agrees; raises whatever there is when it cannot be judged."""


@dataclass(frozen=True)
class Pair:
    """An input that diverges and its control, which agrees; None where there is none."""

    case: Input
    control: Input | None

    def change(self, config: Config, tokens: tuple[int, ...] | None = None) -> Pair:
        """The same change to both."""

        def changed(side: Input) -> Input:
            return replace(side, config=side.config | config, tokens=tokens or side.tokens)

        return Pair(changed(self.case), changed(self.control) if self.control else None)

    def drop(self, keys: list[str]) -> Pair:
        """Both without some config keys."""

        def without(side: Input) -> Input:
            return replace(side, config={key: value for key, value in side.config.items() if key not in keys})

        return Pair(without(self.case), without(self.control) if self.control else None)

    @property
    def differing(self) -> list[str]:
        """Config keys in which the two differ: what the case is about."""
        if self.control is None:
            return []
        ours, theirs = self.case.config, self.control.config
        keys = [*ours, *(key for key in theirs if key not in ours)]
        return [key for key in keys if key not in ours or key not in theirs or ours[key] != theirs[key]]


class Shrinker:
    """One shrinking.

    :ivar attempts: how many pairs were judged.
    :param judge: of one input.
    :param wanted: the divergence to keep.
    :param tell: called with a line for every accepted step.
    """

    def __init__(self, judge: Judge, wanted: Divergence, tell: Callable[[str], None]) -> None:
        self._judge, self._wanted, self._tell = judge, wanted, tell
        self.attempts = 0

    def shrink(self, pair: Pair) -> Pair:
        """The smallest pair that was found; the pair itself when no step is accepted."""
        for _ in range(ROUNDS):
            before = pair
            for coordinate in _COORDINATES:
                pair = self._first(pair, coordinate(pair))
            for key in pair.differing:
                pair = self._first(pair, _undone(pair, key))
            pair = self._without_keys(pair)
            if pair == before:
                break
        return pair

    def holds(self, pair: Pair) -> bool:
        """Whether the case diverges as wanted and its control agrees."""
        if self.attempts >= MOST_ATTEMPTS:
            return False
        self.attempts += 1
        try:
            kept = self._judge(pair.case) == self._wanted
            return kept and (pair.control is None or self._judge(pair.control) is None)
        except Exception:  # a shape that either library refuses, in as many ways as there are checks
            return False

    def _first(self, pair: Pair, candidates: Iterator[tuple[str, Pair]]) -> Pair:
        for label, candidate in candidates:
            if self.holds(candidate):
                self._tell(label)
                return candidate
        return pair

    def _without_keys(self, pair: Pair) -> Pair:
        """As few config keys as possible: all at once, else halves of them, down to one."""
        kept = {"model_type", *SHAPE, *pair.differing}
        queue = [[key for key in pair.case.config if key not in kept]]
        while queue:
            keys = queue.pop()
            if not keys:
                continue
            smaller = pair.drop(keys)
            if self.holds(smaller):
                self._tell(f"without {', '.join(keys)}")
                pair = smaller
            elif len(keys) > 1:
                queue += [keys[len(keys) // 2 :], keys[: len(keys) // 2]]
        return pair


def _undone(pair: Pair, key: str) -> Iterator[tuple[str, Pair]]:
    """The case with one key as its control has it: what it is about, without what it is not."""
    assert pair.control is not None
    config = {name: value for name, value in pair.case.config.items() if name != key}
    if key in pair.control.config:
        config[key] = pair.control.config[key]
    yield f"{key} as in the control", Pair(replace(pair.case, config=config), pair.control)


def _layers(pair: Pair) -> Iterator[tuple[str, Pair]]:
    for count in range(1, pair.case.config["num_hidden_layers"]):
        smaller = pair.change({"num_hidden_layers": count})

        def cut(side: Input, count: int = count) -> Input:
            kinds = side.config.get("layer_types")
            return replace(side, config=side.config | {"layer_types": kinds[:count]}) if kinds else side

        control = cut(smaller.control) if smaller.control else None
        yield f"{count} layers", Pair(cut(smaller.case), control)


def _tokens(pair: Pair) -> Iterator[tuple[str, Pair]]:
    tokens = pair.case.tokens
    for count in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128):
        if count < len(tokens):
            yield f"{count} tokens", pair.change({}, tokens[:count])


def _vocabulary(pair: Pair) -> Iterator[tuple[str, Pair]]:
    for size in (8, 16, 32):
        if size < pair.case.config["vocab_size"]:
            tokens = tuple(token if token < 3 else 3 + token % (size - 3) for token in pair.case.tokens)
            yield f"vocabulary of {size}", pair.change({"vocab_size": size}, tokens)


def _heads(pair: Pair) -> Iterator[tuple[str, Pair]]:
    heads = pair.case.config["num_attention_heads"]
    for ours, theirs in ((1, 1), (2, 1), (2, 2), (4, 1)):
        if ours < heads:
            change = {"num_attention_heads": ours, "num_key_value_heads": theirs}
            yield f"{ours} heads, {theirs} for keys", pair.change(change)


def _sizes(key: str, sizes: tuple[int, ...]) -> Callable[[Pair], Iterator[tuple[str, Pair]]]:
    def coordinate(pair: Pair) -> Iterator[tuple[str, Pair]]:
        for size in sizes:
            if isinstance(pair.case.config.get(key), int) and size < pair.case.config[key]:
                yield f"{key} {size}", pair.change({key: size})

    return coordinate


def _settings(pair: Pair) -> Iterator[tuple[str, Pair]]:
    """Whole numbers among what the case is about, as a window's length; of the case alone."""
    for key in pair.differing:
        value = pair.case.config.get(key)
        for size in (0, 1, 2, 4):
            if isinstance(value, int) and not isinstance(value, bool) and size < value:
                case = replace(pair.case, config=pair.case.config | {key: size})
                yield f"{key} {size}", Pair(case, pair.control)


_COORDINATES = (
    _layers,
    _sizes("intermediate_size", (2, 4, 8, 16)),
    _vocabulary,
    _settings,
    _tokens,
    _heads,
    _sizes("head_dim", (2, 4, 8)),
    _sizes("hidden_size", (2, 4, 8, 16, 32)),
)
