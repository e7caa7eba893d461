"""The known divergences that a model can show, from its config alone, before anything is built or computed.

The conditions of an explanation on the config decide whether the model can show it; those on the prompt and on the
interventions say which prompt does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from candle_mi_parity.spec.conditions import Condition, Facts, all_hold, look_up
from candle_mi_parity.spec.explanations import Explanation, Explanations

LENGTHS = ("sliding_window", "original_max_position_embeddings")
"""Config keys that are lengths of a prompt beyond which the arithmetic changes."""
_EDITS = {
    "knockout": "a knockout",
    "inject": "an injection of SAE features",
    "clt_inject": "an injection of transcoder features",
    "steer": "attention steering",
}


@dataclass(frozen=True)
class Forecast:
    """One known divergence or refusal that a model can show.

    :ivar id: of the explanation.
    :ivar refused: whether the candidate refuses, rather than compute other numbers.
    :ivar keys: the keys of ``config.json`` and ``cfg.json`` that cause it, with their values.
    :ivar lacking: absent keys for which the candidate has another default.
    :ivar needs: the prompt that shows it; empty where every prompt does.
    :ivar longer_than: the number of tokens beyond which a prompt shows it; None where length does not matter.
    """

    id: str
    says: str
    remedy: str
    refused: bool
    keys: dict[str, Any] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    needs: str = ""
    longer_than: float | None = None

    @property
    def about(self) -> str:
        """``sliding_window 4096``, ``no rms_norm_eps``."""
        return ", ".join(
            [*(f"{key} {value}" for key, value in self.keys.items()), *(f"no {k}" for k in self.lacking)]
        )


def forecast(table: Explanations, release: str, facts: Facts) -> list[Forecast]:
    """The rows of a release that a model can show, in the table's order.

    :param facts: of the model and the SAE; the number of tokens and the edits do not matter.
    """
    rows = [row for row in table.explanation if release in row.releases]
    return [_forecast_of(row, facts) for row in rows if _can_show(row, facts)]


def _is_about_the_input(condition: Condition) -> bool:
    return condition.of_edit or condition.subject in ("tokens", "batch")


def _can_show(row: Explanation, facts: Facts) -> bool:
    aside = [condition for condition in row.conditions if _is_about_the_input(condition)]
    if not row.families and all(
        _is_about_the_input(condition) and not condition.other for condition in row.conditions
    ):
        return False  # about an intervention alone
    if any(condition.other and look_up(condition.other, facts, None) is None for condition in aside):
        return False
    rest = [condition for condition in row.conditions if not _is_about_the_input(condition)]
    return (not row.families or facts.family in row.families) and all_hold(rest, facts)


def _forecast_of(row: Explanation, facts: Facts) -> Forecast:
    keys: dict[str, Any] = {}
    lacking, needs, longer_than = [], [], None
    for condition in row.conditions:
        for subject in (condition.subject, condition.other):
            root, _, key = subject.partition(".")
            if root == "alternating":
                root, key, subject = "config", "layer_types", "config.layer_types"
            if root not in ("config", "block", "rope", "sae"):
                continue
            key = f"{facts.block_name}.{key}" if root == "block" else key
            if (value := look_up(subject, facts, None)) is not None:
                keys[key] = "…" if isinstance(value, dict | list) else value
            else:
                lacking.append(key)
        if _is_about_the_input(condition):
            needs.append(_needed(condition, facts))
        if condition.subject == "tokens" and isinstance(length := _length(condition, facts), int | float):
            longer_than = length
    # "rope_theta absent" with "rope_parameters.rope_theta present" means a nested key, not an absent one.
    lacking = [key for key in lacking if not any(other.endswith(f".{key}") for other in keys)]
    refused, needed = row.refuses is not None, " and ".join(needs)
    return Forecast(row.id, row.says, row.remedy, refused, keys, lacking, needed, longer_than)


def _length(condition: Condition, facts: Facts) -> Any:
    return look_up(condition.other, facts, None) if condition.other else condition.value


def _needed(condition: Condition, facts: Facts) -> str:
    if condition.subject == "tokens":
        length = _length(condition, facts)
        return f"a prompt longer than {length} token{'' if length == 1 else 's'}"
    if condition.subject == "batch":
        return "several prompts at a time"
    if condition.subject == "edit.kind":
        return _EDITS.get(str(condition.value), f"the edit {condition.value}")
    return f"an edit with {condition.subject.removeprefix('edit.')} {condition.operator} {condition.value}"
