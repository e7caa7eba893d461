"""The config keys that transformers reads for a family, and the values that it takes where they are absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from candle_mi_parity.candidate.source_keys import Keys, SourceKeys
from candle_mi_parity.hunt.grammar import base_config
from candle_mi_parity.models.generate import generated_model
from candle_mi_parity.models.quiet import quiet
from candle_mi_parity.oracle.fields_read import cached_fields_read
from candle_mi_parity.spec.families import RECURRENT, transformers_type


def keys_read(family: str, cache: Path) -> set[str]:
    """Top-level keys; those in a rotary block are in the menu.

    :raises ParityError: transformers cannot run the family's plain config.
    """
    directory = generated_model(base_config(family), "hub", cache)
    return {key for key in cached_fields_read(directory, family, cache) if "." not in key}


def keys_of(family: str, candidate: SourceKeys | None) -> Keys:
    """The keys of a family's ``config.json`` that the candidate's source reads; none for the control, None."""
    if candidate is None:
        return {}
    return candidate.rwkv if family in RECURRENT else candidate.config


def defaults_of(family: str, candidate: SourceKeys | None) -> dict[str, list[Any]]:
    """Key → transformers' default in the family's config class, and the defaults in the candidate's source.

    :param candidate: None for the control.
    """
    import transformers

    if family in RECURRENT:
        from candle_mi_parity.models.rwkv_auto import register

        register()
    with quiet():
        plain = transformers.AutoConfig.for_model(transformers_type(family)).to_dict()
    found = {key: [value] for key, value in plain.items() if isinstance(value, bool | int | float | str)}
    for key, values in keys_of(family, candidate).items():
        found.setdefault(key, []).extend(sorted(values, key=repr))
    return found
