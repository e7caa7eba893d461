"""Interventions as data: the rows of a case's ``edits``, and the rows of the emitter's request.

An edit changes the tensor at a hook after it was captured. Several edits at one hook apply in the order of the rows.
:mod:`interventions` implements them in torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import Field, model_validator

from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.spec.hook_points import STATE
from candle_mi_parity.spec.table import TableRow
from candle_mi_parity.spec.transcoder import GeneratedTranscoder

E = TypeVar("E", bound="_Edit")
S = TypeVar("S", bound=TableRow)
Position = Annotated[int, Field(ge=0)]
Shape = Literal["[d]", "[1, d]", "[1, 1, d]", "[1, T, d]", "[B, 1, d]"]
_SHAPES: dict[str, tuple[str, ...]] = {
    "replace": (),
    "add": ("[d]", "[1, d]", "[1, 1, d]", "[1, T, d]", "[B, 1, d]"),
    "patch_at": ("[1, 1, d]", "[B, 1, d]"),
}
"""Kind → the shapes of its tensor besides the default, as candle-mi documents ``Intervention``."""


class _Edit(TableRow):
    """The common part; ``hook`` is candle-mi's name of the hook point."""

    hook: str

    def positions(self) -> Iterator[int]:
        """The positions in the edit; each must be inside the prompt."""
        yield from ()


class RandomTensorEdit(_Edit):
    """An edit with a tensor of uniform random numbers, or with a given vector.

    :ivar size: rms of the random tensor, relative to the rms of the hook's tensor in the unedited model.
    :ivar values: a vector [d] for every position, such as a steering vector, in place of the random tensor.
    :ivar shape: of the tensor that candle-mi is given and broadcasts to the hook's [B, T, d]; None for the hook's
        own shape, or for [d] with ``patch_at``.
    """

    seed: int = 0
    size: Annotated[float, Field(gt=0, le=1000)] = 1.0
    values: list[float] | None = Field(default=None, min_length=1, exclude_if=lambda values: values is None)
    shape: Shape | None = Field(default=None, exclude_if=lambda shape: shape is None)

    def drawn_shape(self, hook: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the edit's tensor at a hook of this shape."""
        if self.shape is None:
            return hook
        sizes = dict(zip(("B", "T", "d"), hook, strict=True)) | {"1": 1}
        return tuple(sizes[axis] for axis in self.shape.strip("[]").split(", "))

    @model_validator(mode="after")
    def _broadcasts(self) -> RandomTensorEdit:
        allowed = _SHAPES[str(getattr(self, "kind", ""))]
        if self.shape is not None and (".attn." in self.hook or self.shape not in allowed):
            raise ValueError(f"the edit at {self.hook} takes no tensor of shape {self.shape}")
        return self


class Replace(RandomTensorEdit):
    kind: Literal["replace"]


class Add(RandomTensorEdit):
    kind: Literal["add"]


class PatchAt(RandomTensorEdit):
    """Replaces one position of a hook [B, T, d] by a vector [d]."""

    kind: Literal["patch_at"]
    position: Position

    def positions(self) -> Iterator[int]:
        yield self.position

    def drawn_shape(self, hook: tuple[int, ...]) -> tuple[int, ...]:
        return hook[-1:] if self.shape is None else super().drawn_shape(hook)

    @model_validator(mode="after")
    def _has_positions(self) -> PatchAt:
        if ".attn." in self.hook:
            raise ValueError(f"patch_at needs a hook [B, T, d], and {self.hook} is not one")
        return self


class Scale(_Edit):
    kind: Literal["scale"]
    factor: float

    @model_validator(mode="after")
    def _is_short(self) -> Scale:
        return short(self, self.factor)


class Zero(_Edit):
    kind: Literal["zero"]


class FromTo(TableRow):
    """One query position and several keys."""

    query: Position
    keys: Annotated[list[Position], Field(min_length=1)]


class Attention(TableRow):
    """Entries of the attention matrix, as candle-mi's ``KnockoutSpec`` and ``SteeringSpec`` take them.

    :ivar layers: the first and last layer of the specification's range; outside of it the edit has no effect. None
        for the layer of the edit's hook.
    :ivar heads: None for all.
    :ivar edges: pairs [query, key].
    :ivar from_positions: queries, with every key.
    :ivar to_positions: keys, with every query.
    :ivar from_to: a query with several keys.
    """

    layers: Annotated[list[Position], Field(min_length=2, max_length=2)] | None = Field(
        default=None, exclude_if=lambda layers: layers is None
    )
    heads: Annotated[list[Position], Field(min_length=1)] | None = None
    edges: list[Annotated[list[Position], Field(min_length=2, max_length=2)]] = []
    from_positions: list[Position] = []
    to_positions: list[Position] = []
    from_to: list[FromTo] = []

    def positions(self) -> Iterator[int]:
        for edge in self.edges:
            yield from edge
        yield from self.from_positions
        yield from self.to_positions
        for fan in self.from_to:
            yield fan.query
            yield from fan.keys

    def applies_at(self, hook: str) -> bool:
        """Whether the hook's layer is in the range."""
        return self.layers is None or self.layers[0] <= int(hook.split(".")[1]) <= self.layers[1]

    def chosen(self, n_heads: int, width: int) -> np.ndarray:
        """The selected entries, boolean [H, T, T]: query × key."""
        return self.times(n_heads, width) > 0

    def times(self, n_heads: int, width: int) -> np.ndarray:
        """How often each entry is selected, [H, T, T]."""
        pairs = np.zeros((width, width), int)
        for query, key in self.edges:
            pairs[query, key] += 1
        for query in self.from_positions:
            pairs[query] += 1
        for key in self.to_positions:
            pairs[:, key] += 1
        for fan in self.from_to:
            for key in fan.keys:
                pairs[fan.query, key] += 1
        heads = np.isin(np.arange(n_heads), range(n_heads) if self.heads is None else self.heads)
        return np.where(heads[:, None, None], pairs, 0)

    @property
    def repeats(self) -> bool:
        """Whether an entry is selected more than once."""
        width = max(self.positions(), default=0) + 1
        return bool((self.times(1 + max(self.heads or [0]), width) > 1).any())


class Knockout(_Edit):
    """Attention weights set to 0: candle-mi's ``create_knockout_mask`` of a ``KnockoutSpec``."""

    kind: Literal["knockout"]
    spec: Attention

    def positions(self) -> Iterator[int]:
        return self.spec.positions()

    @model_validator(mode="after")
    def _is_at_scores(self) -> Knockout:
        return _at(self, "attn.hook_scores")


class Steer(_Edit):
    """Attention weights multiplied or set, the rows normalised again: ``apply_steering`` of a ``SteeringSpec``.

    :ivar how: ``scale`` multiplies by ``value``; ``set_value`` sets the weight and takes the difference in equal
        shares from the row's other weights.
    """

    kind: Literal["steer"]
    how: Literal["scale", "set_value"]
    value: Annotated[float, Field(ge=0)]
    spec: Attention

    def positions(self) -> Iterator[int]:
        return self.spec.positions()

    @property
    def sets_the_future(self) -> bool:
        """Whether a weight is set on a key after its query."""
        plain = not (self.spec.from_positions or self.spec.to_positions)
        pairs = self.spec.edges + [[fan.query, key] for fan in self.spec.from_to for key in fan.keys]
        return self.how == "set_value" and (not plain or any(key > query for query, key in pairs))

    @model_validator(mode="after")
    def _is_at_pattern(self) -> Steer:
        return short(_at(self, "attn.hook_pattern"), self.value)


class Inject(_Edit):
    """Decoder rows of the case's SAE added at one position: ``SparseAutoencoder::prepare_hook_injection``.

    :ivar features: pairs [feature, strength].
    """

    kind: Literal["inject"]
    position: Position
    features: Annotated[list[Annotated[list[float], Field(min_length=2, max_length=2)]], Field(min_length=1)]

    def positions(self) -> Iterator[int]:
        yield self.position

    @model_validator(mode="after")
    def _has_features(self) -> Inject:
        if bad := [index for index, _ in self.features if index != int(index) or index < 0]:
            raise ValueError(f"{bad[0]} is not the index of a feature")
        for _, strength in self.features:
            short(self, strength)
        return self


class CltInject(_Edit):
    """Decoder rows of a transcoder added at one position: ``CrossLayerTranscoder::prepare_hook_injection``.

    The rows are those of the hook's layer. circuit-tracer adds them to ``hook_mlp_out``, and candle-mi to the stream
    behind it, ``hook_resid_post``, which is the same for all that follows.

    :ivar transcoder: has as many layers as the model, and its width.
    :ivar features: pairs [source layer, feature], whose rows are summed.
    """

    kind: Literal["clt_inject"]
    transcoder: GeneratedTranscoder
    features: Annotated[list[Annotated[list[Position], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    position: Position
    strength: float

    @property
    def target(self) -> int:
        """The layer whose stream is changed."""
        return int(self.hook.split(".")[1])

    def positions(self) -> Iterator[int]:
        yield self.position

    @model_validator(mode="after")
    def _writes_to_the_hook(self) -> CltInject:
        short(_at(self, "hook_resid_post"), self.strength)
        for layer, index in self.features:
            if index >= self.transcoder.features:
                raise ValueError(f"there is no feature {index} among {self.transcoder.features}")
            if layer > self.target or (layer != self.target and not self.transcoder.crosses):
                raise ValueError(f"features of layer {layer} do not write to layer {self.target}")
        return self


class _StateWrite(_Edit):
    """Scales what positions write into RWKV's state; the hook is the state of a layer.

    :ivar at: positions; those outside of the prompt have no effect.
    :ivar layers: the first and last layer of a range, or ``all``; None for the layer of the hook.
    """

    at: Annotated[list[Position], Field(min_length=1)]
    layers: Literal["all"] | Annotated[list[Position], Field(min_length=2, max_length=2)] | None = None

    def holds(self, layer: int) -> bool:
        """Whether the edit applies to a layer."""
        first, last = (0, layer) if self.layers == "all" else self.layers or [int(self.hook.split(".")[1])] * 2
        return first <= layer <= last

    def factors(self, layer: int, width: int) -> np.ndarray:
        """What each position's write is multiplied by in a layer, [T]."""
        found = np.ones(width)
        if self.holds(layer):
            found[[position for position in self.at if position < width]] = getattr(self, "factor", 0.0)
        return found

    @model_validator(mode="after")
    def _is_at_state(self) -> _StateWrite:
        return _at(self, STATE)


class StateKnockout(_StateWrite):
    """Nothing is written: candle-mi's ``StateKnockoutSpec``."""

    kind: Literal["state_knockout"]


class StateSteer(_StateWrite):
    """What is written is multiplied by ``factor``: candle-mi's ``StateSteeringSpec``; a knockout takes priority."""

    kind: Literal["state_steer"]
    factor: float

    @model_validator(mode="after")
    def _is_short(self) -> StateSteer:
        return short(self, self.factor)


Edit = Annotated[
    Replace | Add | PatchAt | Scale | Zero | Knockout | Steer | Inject | CltInject | StateKnockout | StateSteer,
    Field(discriminator="kind"),
]


def short(edit: S, number: float) -> S:
    """Require a number that every format represents exactly, so that both sides multiply by the same."""
    mantissa = math.frexp(number)[0] * 256
    if not math.isfinite(number) or mantissa != int(mantissa):
        raise ValueError(f"{number} does not fit in bfloat16; take one such as 0.5, 1.5 or 0.8125")
    return edit


def _at(edit: E, point: str) -> E:
    if not edit.hook.endswith(point):
        raise ValueError(f"is at {edit.hook}, but is possible only at {point}")
    return edit


def check(
    edits: list[Edit], hooks: list[str], width: int, n_heads: int, sae_hook: str | None, causal: bool = True
) -> None:
    """Validate a case's edits against its model.

    :param hooks: the model's hook points.
    :param width: tokens of the prompt.
    :param sae_hook: the hook point of the case's SAE.
    :param causal: whether no position attends to a later one.
    :raises CaseTableError: an unknown hook, a position or head out of range, an edit at an unsuitable hook.
    """
    for index, edit in enumerate(edits):
        where = f"edits[{index}] ({edit.kind} at {edit.hook})"
        if edit.hook not in hooks:
            raise CaseTableError(f"{where}: the model has no such hook point")
        if isinstance(edit, StateKnockout | StateSteer):
            _check_state(edit, edits[:index], sum(name.endswith(STATE) for name in hooks), where)
            continue
        if ".rwkv." in edit.hook:
            raise CaseTableError(f"{where}: the hook is a read-out, which nothing is computed from")
        if outside := [position for position in edit.positions() if position >= width]:
            raise CaseTableError(f"{where}: position {outside[0]} is outside the prompt of {width} tokens")
        if isinstance(edit, Knockout | Steer):
            if outside := [head for head in edit.spec.heads or [] if head >= n_heads]:
                raise CaseTableError(f"{where}: head {outside[0]}, but the model has {n_heads}")
            n_layers = sum(name.endswith(".hook_resid_pre") for name in hooks)
            if edit.spec.layers and not edit.spec.layers[0] <= edit.spec.layers[1] < n_layers:
                raise CaseTableError(f"{where}: layers {edit.spec.layers}, but the model has {n_layers}")
            if not edit.spec.chosen(n_heads, width).any():
                raise CaseTableError(f"{where}: selects no entry of the attention matrix")
        if isinstance(edit, Steer) and edit.sets_the_future and causal:
            raise CaseTableError(f"{where}: set_value would put a weight on a key in the future")
        if isinstance(edit, Steer) and len(edits) > 1:
            # candle-mi steers the pattern of an earlier run, which would have to contain the other edits.
            raise CaseTableError(f"{where}: steering cannot be combined with other edits")
        cut = any(isinstance(other, Knockout) and other.hook == edit.hook for other in edits[:index])
        if cut and isinstance(edit, Scale) and edit.factor <= 0:
            raise CaseTableError(
                f"{where}: a factor of {edit.factor} after a knockout, which sets −inf, gives an invalid score"
            )
        if isinstance(edit, Inject) and edit.hook != sae_hook:
            raise CaseTableError(f"{where}: an injection must be at the hook of the case's SAE, {sae_hook}")


def _check_state(edit: StateKnockout | StateSteer, before: list[Edit], n_layers: int, where: str) -> None:
    """:raises CaseTableError: layers that the model does not have, or a second edit of the kind."""
    if isinstance(edit.layers, list) and not edit.layers[0] <= edit.layers[1] < n_layers:
        raise CaseTableError(f"{where}: layers {edit.layers}, but the model has {n_layers}")
    if any(other.kind == edit.kind for other in before):
        raise CaseTableError(f"{where}: candle-mi takes one {edit.kind} a forward pass")


def tensor_key(index: int) -> str:
    """The name of an edit's tensor in the inputs file."""
    return f"edit.{index}"


def for_emitter(edits: list[Edit], transcoders: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """The ``edits`` of a request to the emitter: the rows, with the name of the tensor in the inputs file.

    :param transcoders: the directory of each edit's transcoder, for those that have one.
    """
    directories = iter(transcoders)
    rows = []
    for index, edit in enumerate(edits):
        row = edit.model_dump(exclude={"seed", "size", "values", "shape"})
        if isinstance(edit, Inject):
            row["features"] = [[int(feature), strength] for feature, strength in edit.features]
        if isinstance(edit, CltInject):
            row["transcoder"] = str(next(directories))
        rows.append(row | ({"tensor": tensor_key(index)} if isinstance(edit, RandomTensorEdit) else {}))
    return rows
