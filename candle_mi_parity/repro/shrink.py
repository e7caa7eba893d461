"""Shrinking: the smallest input with the same first divergence.

A candle-mi may differ from PyTorch for several reasons, and a smaller config may expose another one. Therefore two
inputs are judged at every step: one must diverge first at the same hook point in the same way, and its control, the
same input without the cause, must agree with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from candle_mi_parity.compare.suspects import in_any_layer
from candle_mi_parity.spec.cases import Layout, SaelensDirectory, Statistic
from candle_mi_parity.spec.edits import Edit
from candle_mi_parity.spec.recurrent import Recurrent

Config = dict[str, Any]
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "head_size",
    *(f"{projection}_low_rank_dim" for projection in ("decay", "a", "v", "gate")),
)
"""Config keys that are made smaller; all others are left out if possible."""
RWKV = "rwkv"
"""The feature of candle-mi that a recurrent model needs however it is loaded."""
MOST_ATTEMPTS = 150
ROUNDS = 3


@dataclass(frozen=True)
class Input:
    """Input of both sides.

    :ivar config: ``config.json``; the weights are generated from it.
    :ivar tokens: one row of ids.
    :ivar sae: a generated SAE, as wide as the model.
    :ivar weights: what is unusual about the weights; ``layout``, ``shards`` and ``seed`` as in :class:`TinyModel`,
        ``loader`` and ``features`` as in :class:`Case`.
    """

    config: Config
    tokens: tuple[int, ...]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    sae: SaelensDirectory | None = None
    edits: tuple[Edit, ...] = ()
    recurrent: Recurrent | None = None
    weights: tuple[Statistic, ...] = ()
    layout: tuple[Layout, ...] = ()
    shards: int = 1
    seed: int = 0
    loader: Literal["hf", "pretrained"] = "hf"
    features: tuple[str, ...] = ()

    @property
    def unusual(self) -> list[str]:
        """What is unusual about the weights and their files."""
        files = [f"{self.shards} files"] if self.shards > 1 else []
        loader = ["MIModel::from_pretrained"] if self.loader == "pretrained" else []
        features = [f"feature {feature}" for feature in self.features if feature != RWKV]
        return [*self.weights, *self.layout, *files, *loader, *features]


@dataclass(frozen=True)
class Divergence:
    """A first divergence; two are the same if hook point (in any layer) and reason are.

    :ivar reason: :attr:`candle_mi_parity.compare.verdict.TensorResult.reason`.
    """

    point: str
    reason: str

    @staticmethod
    def at(tensor: str, reason: str) -> Divergence:
        return Divergence(in_any_layer(tensor), reason)


FirstDivergence = Callable[[Input], Divergence | None]
"""The first divergence of an input; None if everything agrees. Raises any exception if it cannot be judged."""


@dataclass(frozen=True)
class Pair:
    """An input that diverges and its control, which agrees; None if there is no control."""

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
        """Config keys in which the two differ."""
        if self.control is None:
            return []
        ours, theirs = self.case.config, self.control.config
        keys = [*ours, *(key for key in theirs if key not in ours)]
        return [key for key in keys if key not in ours or key not in theirs or ours[key] != theirs[key]]


Step = Callable[[Pair], Iterator[tuple[str, Pair]]]
"""Smaller pairs, the smallest first, each with a label."""


class Shrinker:
    """Shrinks one pair.

    :ivar attempts: number of pairs judged so far.
    :param wanted: the divergence to keep.
    :param steps: tried in this order, round after round.
    :param tell: called with a label for every accepted step.
    """

    def __init__(
        self, judge: FirstDivergence, wanted: Divergence, steps: Sequence[Step], tell: Callable[[str], None]
    ) -> None:
        self._judge, self._wanted, self._steps, self._tell = judge, wanted, steps, tell
        self.attempts = 0

    def shrink(self, pair: Pair) -> Pair:
        """The smallest pair that was found; the pair itself if no step is accepted."""
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
        except Exception:  # either library may refuse a shape with any error
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
    """The case with one config key as in its control."""
    assert pair.control is not None
    config = {name: value for name, value in pair.case.config.items() if name != key}
    if key in pair.control.config:
        config[key] = pair.control.config[key]
    yield f"{key} as in the control", Pair(replace(pair.case, config=config), pair.control)
