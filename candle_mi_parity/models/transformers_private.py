"""What the suite takes from transformers beyond its documented API, which another version may rename or move.

Each is looked up when it is used, so that a version without it is one clear error of the cases that need it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

from candle_mi_parity.errors import LibraryError, OracleError
from candle_mi_parity.files.versions import version

TESTED = "5.4 to 5.24"
"""The versions of transformers with which the suite was run; all of them have every name. See docs/versions.md."""

LATER_ROPES = {"proportional": "5.5"}
"""Rope types that not every version of :data:`TESTED` has, and the first version that does."""


def private(name: str) -> Any:
    """An attribute of a module of transformers, as ``masking_utils.sdpa_mask``.

    :raises OracleError: the installed transformers does not have it.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(f"transformers.{module}"), attribute)
    except (ImportError, AttributeError) as error:
        raise _lacks(f"transformers.{name}") from error


def no_init_weights() -> AbstractContextManager[None]:
    """Models are built without drawing their weights."""
    manager: AbstractContextManager[None] = private("initialization.no_init_weights")()
    return manager


def tied_weights(model: Any) -> dict[str, str]:
    """Parameter → the one whose weights it shares.

    :raises OracleError: see :func:`private`.
    """
    if not hasattr(model, "all_tied_weights_keys"):
        raise _lacks("PreTrainedModel.all_tied_weights_keys")
    return dict(model.all_tied_weights_keys)


def config_fields(kind: Any) -> Mapping[str, dataclasses.Field[Any]]:
    """The declared fields of a class of configurations.

    :raises OracleError: see :func:`private`.
    """
    if not dataclasses.is_dataclass(kind):
        raise _lacks("configuration classes that are dataclasses")
    return {field.name: field for field in dataclasses.fields(kind)}


def require_rope(kind: object) -> None:
    """:raises LibraryError: a rope type that only a later transformers has."""
    if kind in LATER_ROPES and kind not in private("modeling_rope_utils.ROPE_INIT_FUNCTIONS"):
        raise LibraryError(
            f"transformers {version('transformers')} has no rope type {kind!r}; install transformers "
            f"{LATER_ROPES[str(kind)]} or later"
        )


def import_model(config: Any) -> None:
    """Import the module of a configuration's model; inside of a device or dispatch mode torch before 2.8 cannot."""
    import transformers

    transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _lacks(name: str) -> OracleError:
    return OracleError(
        f"transformers {version('transformers')} has no {name}, which this suite needs; transformers {TESTED} have "
        "it: install one of these"
    )
