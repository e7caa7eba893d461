"""The config keys that transformers reads for a family, and the values that it takes where they are absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from candle_mi_parity.hunt.grammar import base_config
from candle_mi_parity.models.generate import generated_model
from candle_mi_parity.oracle.fields_read import cached_fields_read


def keys_read(family: str, cache: Path) -> set[str]:
    """Top-level keys; those in a rotary block are in the menu.

    :raises ParityError: transformers cannot run the family's plain config.
    """
    directory = generated_model(base_config(family), "hub", cache)
    return {key for key in cached_fields_read(directory, family, cache) if "." not in key}


def defaults_of(family: str) -> dict[str, list[Any]]:
    """transformers' default of each key of the family's config class."""
    import transformers

    plain = transformers.AutoConfig.for_model(family).to_dict()
    return {key: [value] for key, value in plain.items() if isinstance(value, bool | int | float | str)}
