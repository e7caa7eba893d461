"""Conditions on a case, as in ``fixtures/explanations.toml``: ``tokens > config.sliding_window``.

A condition is a subject, an operator and a value; a value is JSON or another subject.

Subjects: ``config.KEY``, ``block.KEY`` (of the rotary block that transformers reads: ``rope_scaling``, or else
``rope_parameters``), ``rope.KEY`` (of the rotary embedding, at the top level or in a block), ``sae.KEY`` (of
``cfg.json``), ``edit.KEY``, ``family`` (the model type), ``dtype``, ``rope_type``, ``alternating`` (whether every
second layer, from the first, has the window), ``sae_weights``, ``sae_threshold``, ``tokens``, ``batch``,
``loader``, ``features``, ``files`` (number of files of weights), ``pickled``, ``shards_beside``
(whether candle-mi finds an index of shards beside a whole file), ``prefixed`` (whether tensors are named
``model.…``), ``stored_head``, ``weights.KEY`` (of a quantised checkpoint, see
:mod:`candle_mi_parity.models.quantized_facts`); a dot leads into a block.

Operators: ``absent`` (no such key), ``null`` (there, and null), ``present`` (there, and not null), ``number``,
``no number`` (absent, null, or of another JSON type), ``=``, ``!=``, ``<``, ``>``, ``in``, ``not in``, ``other than``
(absent, or not equal). A null is ``in`` a list that has it; every other comparison with an absent value or with null
is false.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from candle_mi_parity.errors import ExplanationError
from candle_mi_parity.spec.counterfactual import rotary_block

_SUBJECT = (
    r"(?:config|block|rope|sae|edit|weights)\.[A-Za-z0-9_.]+|family|dtype|rope_type|alternating|sae_weights|sae_threshold"
    r"|tokens|batch|loader|features|files|pickled|shards_beside|prefixed|stored_head"
)
_CONDITION = re.compile(
    rf"({_SUBJECT}) (?:(absent|null|present|number|no number)|(=|!=|other than|<|>|in|not in) (.+))"
)
_NO_KEY = object()


@dataclass(frozen=True)
class Facts:
    """The properties of a case that conditions refer to.

    :ivar config: ``config.json`` of the model.
    :ivar sae: ``cfg.json`` of the SAE; empty for an NPZ or without an SAE.
    :ivar edits: rows of the case's interventions.
    :ivar weights: of a quantised checkpoint's files; empty for plain weights.
    :ivar tokens: length of the prompt.
    :ivar batch: number of prompts.
    :ivar sae_weights: format of the SAE's stored tensors; empty without an SAE.
    :ivar sae_threshold: smallest θ of a JumpReLU, or None.
    :ivar loader: as ``features``, of the case.
    :ivar files: number of files of weights that the candidate is given.
    :ivar pickled: whether they are pickles.
    :ivar shards_beside: whether a loader that prefers an index finds shards beside ``model.safetensors``.
    :ivar prefixed: whether any tensor's name starts with ``model.``, as in a checkpoint with a head.
    :ivar stored_head: whether there is an ``lm_head.weight``.
    """

    config: dict[str, Any]
    tokens: int
    dtype: str = "float32"
    sae: dict[str, Any] = field(default_factory=dict)
    sae_weights: str = ""
    sae_threshold: float | None = None
    edits: list[dict[str, Any]] = field(default_factory=list)
    batch: int = 1
    loader: str = "hf"
    features: list[str] = field(default_factory=list)
    files: int = 1
    pickled: bool = False
    shards_beside: bool = False
    prefixed: bool = True
    stored_head: bool = False
    weights: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def rope_type(self) -> str:
        """The kind of rotary scaling in the config, in either spelling; ``default`` for none."""
        return str(self.block.get("rope_type") or self.block.get("type") or "default")

    @property
    def block_name(self) -> str:
        """The key of the rotary block that transformers reads."""
        return rotary_block(self.config)[0]

    @property
    def block(self) -> dict[str, Any]:
        """The rotary block that transformers reads; empty without one."""
        return rotary_block(self.config)[1]

    @property
    def alternating(self) -> bool | None:
        """Whether ``layer_types`` says of the layers in turn that they have the window; None without it."""
        types = self.config.get("layer_types")
        turns = ["sliding_attention", "full_attention"]
        return [turns[i % 2] for i in range(len(types))] == types if isinstance(types, list) else None

    @property
    def rope(self) -> dict[str, Any]:
        """The keys of the rotary embedding, wherever the config has them."""
        blocks = [self.config.get(name) for name in ("rope_scaling", "rope_parameters")]
        return {
            key: value for block in [*blocks, self.config] if isinstance(block, dict) for key, value in block.items()
        }


@dataclass(frozen=True)
class Condition:
    """One condition, parsed.

    :ivar value: None where the operator takes no value, or where ``other`` is a subject.
    """

    subject: str
    operator: str
    value: Any = None
    other: str = ""

    @staticmethod
    def parse(text: str) -> Condition:
        """:raises ExplanationError: the text is not a condition."""
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise ExplanationError(f"{text!r} is not a condition such as 'tokens > config.sliding_window'")
        subject, unary, operator, value = found.groups()
        if unary:
            return Condition(subject, unary)
        if re.fullmatch(_SUBJECT, value):
            return Condition(subject, operator, other=value)
        try:
            parsed = json.loads(value)
        except ValueError as error:
            raise ExplanationError(f"{text!r}: {value!r} is neither JSON nor a subject") from error
        if operator in ("in", "not in") and not isinstance(parsed, list):
            raise ExplanationError(f"{text!r}: expected a list after '{operator}'")
        return Condition(subject, operator, parsed)

    @property
    def of_edit(self) -> bool:
        return self.subject.startswith("edit.")

    def holds(self, facts: Facts, edit: dict[str, Any] | None = None) -> bool:
        """:param edit: the intervention to which ``edit.`` subjects refer."""
        left = look_up(self.subject, facts, edit, _NO_KEY)
        if self.operator in ("number", "no number"):
            return _is_number(left) == (self.operator == "number")
        if self.operator in ("absent", "null", "present"):
            return self.operator == ("absent" if left is _NO_KEY else "null" if left is None else "present")
        if left is None and self.operator == "in":
            return None in self.value
        left = None if left is _NO_KEY else left
        right = look_up(self.other, facts, edit) if self.other else self.value
        if self.operator == "other than":
            return bool(left != right)
        if left is None or (self.other and right is None):
            return False
        if self.operator in ("<", ">"):
            numbers = _is_number(left) and _is_number(right)
            return numbers and bool(left < right if self.operator == "<" else left > right)
        if self.operator in ("in", "not in"):
            return (left in right) == (self.operator == "in")
        return bool(left == right) == (self.operator == "=")


def all_hold(conditions: list[Condition], facts: Facts) -> bool:
    """Whether all conditions hold; those of an edit must hold for one and the same edit of the case."""
    of_edit = [condition for condition in conditions if condition.of_edit]
    rest = [condition for condition in conditions if not condition.of_edit]
    one_edit = not of_edit or any(all(condition.holds(facts, edit) for condition in of_edit) for edit in facts.edits)
    return one_edit and all(condition.holds(facts) for condition in rest)


def look_up(subject: str, facts: Facts, edit: dict[str, Any] | None, otherwise: Any = None) -> Any:
    """:param otherwise: returned where there is no such key; a null is returned as None."""
    if "." not in subject:
        return getattr(facts, subject)
    root, *path = subject.split(".")
    roots = {"config": facts.config, "block": facts.block, "rope": facts.rope, "sae": facts.sae, "edit": edit or {}}
    roots["weights"] = facts.weights
    found: Any = roots[root]
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return otherwise
        found = found[key]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
