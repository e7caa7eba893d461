"""Counterfactuals as data: what is changed in a case so that the truth equals a candidate's numbers."""

from __future__ import annotations

import fnmatch
import json
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from candle_mi_parity.errors import ExplanationError
from candle_mi_parity.spec.cases import Setting
from candle_mi_parity.spec.edits import Edit
from candle_mi_parity.spec.recurrent import Recurrent
from candle_mi_parity.spec.table import TableRow

Config = dict[str, Any]
ROTARY = "rope_parameters"


class Variant(StrEnum):
    """A change of the arithmetic that no config key expresses."""

    ROTARY_IN_MODEL_DTYPE = "rotary-in-model-dtype"
    """Angles, cosines and sines of the rotary tables are computed in the model's format, not in float32."""
    KNOCKOUT_BEFORE_SOFTCAP = "knockout-before-softcap"
    """The score of a knocked-out edge passes through the softcap, which turns -inf into -softcap."""
    STEERING_OVER_ALL_COLUMNS = "steering-over-all-columns"
    """``set_value`` takes the difference from all keys of the row, including masked ones."""
    STEERING_OF_REPEATED_EDGES = "steering-of-repeated-edges"
    """An attention edge that is given twice is steered twice."""
    RMS_NORM_FOR_LAYER_NORM = "rms-norm-for-layer-norm"
    """Every LayerNorm is an RMSNorm: no mean is subtracted and no bias added."""
    LAYER_NORM_IN_ONE_PASS = "layer-norm-in-one-pass"
    """The variance of every LayerNorm is mean(x²) − mean(x)², which loses precision where the mean is large."""
    NO_QUERY_KEY_NORM = "no-query-key-norm"
    """Queries and keys are not normalised before the rotation."""
    HEAD_IS_EMBEDDING = "head-is-embedding"
    """The matrix of the embedding is the head, whatever head the files hold."""
    NO_CAUSAL_MASK = "no-causal-mask"
    """Every position attends to every other."""
    CAUSAL_MASK = "causal-mask"
    """No position attends to a later one, also in a bidirectional model."""
    CAUSAL_MASK_FOR_NO_MASK = "causal-mask-for-no-mask"
    """In a layer whose mask forbids nothing no position attends to a later one."""
    RESID_MID_EDITS_REACH_THE_MLP_ALONE = "resid-mid-edits-reach-the-mlp-alone"
    """An edit at ``hook_resid_mid`` changes what the MLP reads; the MLP's output is added to the unedited stream."""
    KEYS_OF_OTHER_FAMILIES = "keys-of-other-families"
    """``sliding_window`` (of that many keys and one more), both softcaps and ``query_pre_attn_scalar`` of the config
    count, although the architecture does not read them."""
    KV_HEADS_TILED = "kv-heads-tiled"
    """Key and value heads are repeated as 0 1 0 1, not as 0 0 1 1."""
    TOPK_WITHOUT_RELU = "topk-without-relu"
    """The k largest pre-activations are kept, also negative ones, except the k-th where it is negative."""
    NEGATIVE_THRESHOLD_KEPT = "negative-threshold-kept"
    """A JumpReLU feature with a negative threshold fires with a negative value."""
    FEEDBACK_FROM_THE_FIRST_PASS = "feedback-from-the-first-pass"
    """The first pass of a recurrence is given the feedback too."""
    FEEDBACK_ON_THE_OUTPUT = "feedback-on-the-output"
    """Feedback is added to the output of the pass before, not to the input of the first."""
    STATE_EDITS_NOT_ATTENDED = "state-edits-not-attended"
    """RWKV's effective attention is that of a state into which every position writes in full."""
    VANISHED_DECAY_NOT_ATTENDED = "vanished-decay-not-attended"
    """RWKV-6's effective attention to an earlier source is 0 where float32 holds 0 for the decay of any channel of
    the head at the source or before it, as with the difference of two logarithms of 0."""
    KNOCKOUT_DROPS_STEERING = "knockout-drops-steering"
    """In a layer with a knockout of RWKV's state, steering of the state has no effect at any position."""
    HEAD_NORM_EPS_OF_LAYER_NORM = "head-norm-eps-of-layer-norm"
    """The eps of RWKV-6's norm of heads is ``layer_norm_epsilon``·divisor², not 1e-5·divisor²."""
    KEY_NORM_EPS_IN_ROOT = "key-norm-eps-in-root"
    """The keys that RWKV-7's state is cleared of are divided by √(|k|² + 1e-12), not by max(|k|, 1e-12)."""
    LAYER_NORM_IN_MODEL_DTYPE = "layer-norm-in-model-dtype"
    """Every step of a LayerNorm is rounded to the model's format. Where the sum of squares is beyond float16's
    largest number, all that is left of the norm is its bias."""

    @property
    def of_recurrence(self) -> bool:
        return self in (Variant.FEEDBACK_FROM_THE_FIRST_PASS, Variant.FEEDBACK_ON_THE_OUTPUT)


class Dequantization(StrEnum):
    """In what a quantised checkpoint is read otherwise than its format defines it."""

    ROUNDED_TO_BFLOAT16 = "rounded-to-bfloat16"
    """The dequantised weights are rounded to bfloat16."""
    NESTED_BLOCKS_EQUAL = "nested-blocks-equal"
    """The blocks are divided evenly among the scales of a double quantisation; the last scale has fewer blocks."""
    GPTQ_V2_AS_V1 = "gptq-v2-as-v1"
    """1 is added to the zero points of version 2 of GPTQ's format, which stores them as they are."""
    ZERO_POINTS_NOT_WRAPPED = "zero-points-not-wrapped"
    """A zero point of 0, which version 1 of GPTQ's format stores as the largest number, is read as that plus 1."""


class Counterfactual(TableRow):
    """What is changed; everything else stays the same.

    :ivar config_set: keys of ``config.json`` and their other value. A key of the rotary embedding is changed
        wherever the config has it.
    :ivar config_null: keys of ``config.json`` that are set to null.
    :ivar config_add: keys of ``config.json`` and what is added to their number.
    :ivar config_copy: keys of ``config.json`` and the key whose value they take, or with which they are left out;
        ``block.KEY`` is one of the rotary block that transformers reads, ``rope.KEY`` too, or else at the top level.
    :ivar config_drop: keys of ``config.json`` that are left out, so that transformers uses its default.
    :ivar weights_zero: globs over parameters that are set to 0.
    :ivar weights_one: globs over parameters that are set to 1, as a norm's weight that is left out.
    :ivar dequantize: in what a quantised checkpoint is read otherwise.
    :ivar sae_set: keys of the SAE's ``cfg.json`` and their other value; ``sae_drop`` are left out.
    :ivar edits_drop: kinds of edits that have no effect.
    :ivar edits_drop_at: globs over hooks at which no edit has an effect.
    :ivar edits: index of an edit in the case → its replacement; None for none.
    :ivar recurrent: in place of the case's; its feedback has vectors of the case's.
    """

    config_set: dict[str, Setting] = {}
    config_null: list[str] = []
    config_add: dict[str, int] = {}
    config_copy: dict[str, str] = {}
    config_drop: list[str] = []
    weights_zero: list[str] = []
    weights_one: list[str] = []
    variants: list[Annotated[Variant, Field(strict=False)]] = []
    dequantize: list[Annotated[Dequantization, Field(strict=False)]] = []
    sae_set: dict[str, Setting] = {}
    sae_drop: list[str] = []
    edits_drop: list[str] = []
    edits_drop_at: list[str] = []
    edits: dict[int, Edit | None] = {}
    recurrent: Recurrent | None = None

    @property
    def changes_config(self) -> bool:
        return bool(self.config_set or self.config_null or self.config_add or self.config_copy or self.config_drop)

    def has(self, variant: Variant) -> bool:
        return variant in self.variants

    def with_also(self, other: Counterfactual) -> Counterfactual:
        """Both changes at once.

        :raises ExplanationError: the two change one thing in different ways.
        """
        mine, theirs = self._places(), other._places()
        if clash := sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]):
            raise ExplanationError(f"two counterfactuals change {', '.join(clash)} in two ways")
        merged: dict[str, Any] = {}
        for name in type(self).model_fields:
            one, two = getattr(self, name), getattr(other, name)
            if name == "recurrent":
                merged[name] = one or two
            else:
                merged[name] = one | two if isinstance(one, dict) else list(dict.fromkeys([*one, *two]))
        return Counterfactual.model_construct(**merged)

    def _places(self) -> dict[str, str]:
        """What is changed → how; used to find conflicts."""
        found = {f"config.{key}": f"set {value!r}" for key, value in self.config_set.items()}
        found |= {f"config.{key}": f"add {value}" for key, value in self.config_add.items()}
        found |= {f"config.{key}": f"copy {source}" for key, source in self.config_copy.items()}
        found |= {f"config.{key}": "null" for key in self.config_null} | {
            f"config.{key}": "drop" for key in self.config_drop
        }
        found |= {f"sae.{key}": f"set {value!r}" for key, value in self.sae_set.items()}
        found |= {f"sae.{key}": "drop" for key in self.sae_drop}
        found |= {"recurrent": self.recurrent.model_dump_json()} if self.recurrent else {}
        return found | {f"edits[{index}]": repr(edit) for index, edit in self.edits.items()}

    def changed_config(self, config: Config) -> Config:
        """A copy of a ``config.json`` with the changes.

        :raises ExplanationError: a key of ``config_add`` holds no number.
        """
        changed: Config = json.loads(json.dumps(config))
        for key, value in self.config_set.items():
            changed = with_field(changed, _field(key, changed), value)
        for key, amount in self.config_add.items():
            number = changed.get(key)
            if not isinstance(number, int | float):
                raise ExplanationError(f"cannot add {amount} to {key}, which is {number!r}")
            changed[key] = number + amount
        for key, source in self.config_copy.items():
            target, name = _holder(changed, key)
            held = _holder(changed, source)
            if held[1] in held[0]:
                target[name] = held[0][held[1]]
            else:
                target.pop(name, None)
        for key in self.config_drop:
            changed = _without(changed, key)
        return changed | dict.fromkeys(self.config_null)

    def changed_sae_config(self, config: Config) -> Config:
        """A copy of an SAE's ``cfg.json`` with the changes."""
        return {key: value for key, value in config.items() if key not in self.sae_drop} | self.sae_set

    def edit_at(self, index: int, edit: Edit) -> Edit | None:
        """The edit that replaces an edit of the case; None where it has no effect."""
        found = self.edits.get(index, edit)
        if found is None or found.kind in self.edits_drop or matching([found.hook], self.edits_drop_at):
            return None
        return found

    def describe(self) -> str:
        """What is changed, in a few words, as ``rms_norm_eps = 1e-05``."""
        parts = [f"{key} = {json.dumps(value)}" for key, value in self.config_set.items()]
        parts += [f"{key} = null" for key in self.config_null]
        parts += [f"{key} {'+' if amount > 0 else '-'} {abs(amount)}" for key, amount in self.config_add.items()]
        parts += [f"{key} as {source}" for key, source in self.config_copy.items()]
        parts += [f"no {key}" for key in self.config_drop]
        parts += [
            f"{', '.join(names)} {value}"
            for names, value in ((self.weights_zero, "0"), (self.weights_one, "1"))
            if names
        ]
        parts += [variant.value for variant in self.variants]
        parts += [f"weights {reading.value}" for reading in self.dequantize]
        parts += [f"the SAE's {key} = {json.dumps(value)}" for key, value in self.sae_set.items()]
        parts += [f"no {key} of the SAE" for key in self.sae_drop]
        parts += [f"no {kind}" for kind in self.edits_drop]
        parts += [f"no edit at {glob}" for glob in self.edits_drop_at]
        parts += [
            f"edits[{index}] " + ("left out" if edit is None else f"{edit.kind} at {edit.hook}")
            for index, edit in self.edits.items()
        ]
        parts += (
            [f"recurrent = {json.dumps(self.recurrent.model_dump(exclude_defaults=True))}"] if self.recurrent else []
        )
        return " and ".join(parts)

    def key(self) -> str:
        """A part of cache keys; equal for equal changes."""
        return json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)


PLAIN = Counterfactual()
"""The counterfactual without a change."""


def _holder(config: Config, key: str) -> tuple[Config, str]:
    """The object of a config that holds a key, and its name there; see ``config_copy``."""
    root, _, name = key.rpartition(".")
    block = rotary_block(config)[1]
    return (config if not root or (root == "rope" and name not in block) else block), name


def places(config: Config, field: str) -> list[tuple[str, ...]]:
    """The paths of a field in a config; ``rope_parameters.<key>`` may be in the block, at the top level, or both."""
    if not field.startswith(f"{ROTARY}."):
        return [(field,)] if field in config else []
    key = field.partition(".")[2]
    name, block = rotary_block(config)
    return [*([(name, key)] if key in block else []), *([(key,)] if key in config else [])]


def rotary_block(config: Config) -> tuple[str, Config]:
    """The name and content of the rotary block that transformers reads: ``rope_scaling`` or ``rope_parameters``.

    Without one the content is empty, which is not a part of the config.
    """
    name = "rope_scaling" if config.get("rope_scaling") else ROTARY
    found = config.get(name)
    return name, found if isinstance(found, dict) else {}


def with_field(config: Config, field: str, value: object) -> Config:
    """A copy of a config with another value of a field wherever the config has it; None removes the field."""
    copy: Config = json.loads(json.dumps(config))
    for path in places(config, field) or [(field.rpartition(".")[2],)]:
        target = copy[path[0]] if len(path) == 2 else copy
        if value is None:
            target.pop(path[-1], None)
        else:
            target[path[-1]] = value
    return copy


def _field(key: str, config: Config) -> str:
    """The full name of a key, which for the rotary embedding may be in a block."""
    nested = f"{ROTARY}.{key}"
    return nested if key in rotary_block(config)[1] else key


def _without(config: Config, key: str) -> Config:
    """A config without a key; without ``rope_scaling``, the rotary embedding is unscaled."""
    if key == "rope_scaling" and isinstance(config.get(ROTARY), dict):
        kept = {name: value for name, value in config[ROTARY].items() if name == "rope_theta"}
        config = {**config, ROTARY: {"rope_type": "default", **kept}}
    config = with_field(config, _field(key, config), None)
    return {name: value for name, value in config.items() if name != key}


def matching(names: list[str], globs: list[str]) -> list[str]:
    """The names that one of the globs matches, in their order."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
