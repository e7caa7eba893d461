"""Shrinking: the smallest input whose first divergence is still the same one.

A candle-mi may differ from PyTorch for more than one reason, and a smaller config may fall into another of them. So
every step is judged twice: the input must diverge first at the same hook point in the same way, and its control, the
same input without what the case is about, must agree with PyTorch wherever the two are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from candle_mi_parity.spec.cases import SaelensDirectory
from candle_mi_parity.spec.edits import Edit

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
    :ivar sae: a generated one; its width follows from the model's.
    """

    config: Config
    tokens: tuple[int, ...]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    sae: SaelensDirectory | None = None
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class Divergence:
    """By what two divergences are the same one: the hook point, whichever the layer, and how it differs.

    :ivar reason: :attr:`candle_mi_parity.compare.verdict.TensorResult.reason`.
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

    def both(self, change: Callable[[Input], Input]) -> Pair:
        """The same change to both."""
        return Pair(change(self.case), change(self.control) if self.control else None)

    def drop(self, keys: Sequence[str]) -> Pair:
        """Both without some config keys."""
        return self.both(
            lambda side: replace(side, config={key: value for key, value in side.config.items() if key not in keys})
        )

    @property
    def differing(self) -> list[str]:
        """Config keys in which the two differ: what the case is about."""
        if self.control is None:
            return []
        ours, theirs = self.case.config, self.control.config
        keys = [*ours, *(key for key in theirs if key not in ours)]
        return [key for key in keys if key not in ours or key not in theirs or ours[key] != theirs[key]]


Step = Callable[[Pair], Iterator[tuple[str, Pair]]]
"""Smaller pairs, the smallest first, each with what was done to it."""


class Shrinker:
    """One shrinking.

    :ivar attempts: how many pairs were judged.
    :param judge: of one input.
    :param wanted: the divergence to keep.
    :param steps: tried in this order, round after round.
    :param tell: called with a line for every accepted step.
    """

    def __init__(self, judge: Judge, wanted: Divergence, steps: Sequence[Step], tell: Callable[[str], None]) -> None:
        self._judge, self._wanted, self._steps, self._tell = judge, wanted, steps, tell
        self.attempts = 0

    def shrink(self, pair: Pair) -> Pair:
        """The smallest pair that was found; the pair itself when no step is accepted."""
        for _ in range(ROUNDS):
            before = pair
            for step in self._steps:
                pair = self._first(pair, step(pair))
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
