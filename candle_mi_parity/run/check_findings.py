"""What a check reports beside the verdict: divergences that its prompts do not show, and unknown config keys."""

from __future__ import annotations

from pathlib import Path

from candle_mi_parity.coverage.fields import WaivedField, load_fields
from candle_mi_parity.judge.known import facts_of
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle.fields_read import cached_fields_built
from candle_mi_parity.spec.cases import TinyModel, load_cases
from candle_mi_parity.spec.counterfactual import places
from candle_mi_parity.spec.explanations import Explanations
from candle_mi_parity.spec.families import RECURRENT, transformers_type
from candle_mi_parity.spec.forecast import LENGTHS, Forecast


def not_exercised(foretold: list[Forecast], table: Explanations, subjects: list[PreparedCase]) -> list[str]:
    """Known divergences that no prompt shows, and lengths in the config that no prompt exceeds."""
    facts = [facts_of(subject) for subject in subjects]
    rows = {row.id: row for row in table.explanation}
    longest = max(one.tokens for one in facts)
    lines, covered = [], set()
    for found in foretold:
        covered |= set(found.keys)
        if found.needs and not any(rows[found.id].applies(one) for one in facts):
            too_short = found.longer_than is not None and longest <= found.longer_than
            short = f"the longest prompt has {longest} tokens, and " if too_short else ""
            about = f"{found.about}: " if found.about else ""
            lines.append(f"{about}{short}it takes {found.needs} to see this: {found.says} ({found.id})")
    for key in LENGTHS:
        value = facts[0].config.get(key)
        if type(value) is int and value >= longest and key not in covered:
            lines.append(f"{key} {value}: the longest prompt has {longest} tokens; no divergence beyond is known.")
    return lines


def unknown_keys(directory: Path, model_type: str, cache: Path) -> list[str]:
    """Keys of the config that PyTorch's model reads and that were never compared.

    Compared are those of the config-field ledger, or of RWKV, which it does not have, those that a case changes and
    those by which the weights are shaped in every family.

    :raises ParityError: transformers cannot build the model.
    """
    ledger, config, family = load_fields(), read_config(directory), transformers_type(model_type)
    read = sorted(cached_fields_built(directory, model_type, cache))
    if model_type in RECURRENT:
        shapes = {
            key for key, row in ledger.common.items() if isinstance(row, WaivedField) and row.kind == "structural"
        }
        compared = _changed_by_cases(model_type) | shapes
        return [key for key in read if config.get(key) is not None and key not in compared]
    return [key for key in read if places(config, key) and ledger.row(family, key) is None]


def _changed_by_cases(model_type: str) -> set[str]:
    models = [case.model for case in load_cases()]
    own = [model for model in models if isinstance(model, TinyModel) and model.config == f"models/{model_type}.json"]
    return {key for model in own for key in (*model.change, *model.null, *model.absent)}
