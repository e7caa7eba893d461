"""The config-field ledger: every field of ``config.json`` that transformers reads, and what covers it.

Which fields there are is recorded, not remembered: :func:`fields_read` watches the config object while a model is
built and run, so that an upgrade of transformers adds its new fields by itself. ``fixtures/config_fields.toml``
says of each field which case excites it, or why none has to; :mod:`field_check` holds every row against the truth.
A key inside the rotary dictionary is a field of its own, ``rope_parameters.<key>``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from candle_mi_parity.coverage.sensitivity import ROTARY
from candle_mi_parity.errors import ParityError
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.oracle.hooks import forward, load_model
from candle_mi_parity.spec.cases import Row, Setting, read_toml
from candle_mi_parity.spec.paths import FIXTURES

LISTING = frozenset({"to_dict", "to_diff_dict", "dict_dtype_to_str", "validate_token_ids"})
"""Functions of transformers that visit every attribute there is, without acting on any: they print or copy the
config, or look for names that end in ``_token_id`` to warn of one outside the vocabulary."""


class FieldError(ParityError):
    """``fixtures/config_fields.toml`` is malformed, or its check cannot be made."""


class Excited(Row):
    """A case has the field at a value that moves the truth.

    :ivar excited_by: case id; ``*`` stands for the family in a row of the common table.
    :ivar against: the value it is compared with; without one the field is left out, so that the default holds.
    """

    excited_by: str
    against: Setting | None = None


class Excused(Row):
    """No case has to excite the field.

    :ivar kind: ``inert``: it cannot change an inference. ``structural``: it changes the shapes of tensors, and a
        library that misreads it cannot load the weights. ``refused``: a value other than the present one ends in
        an error of transformers or of the oracle, so there is no truth to compare with.
    :ivar other: a value at which the program verifies that.
    """

    kind: Literal["inert", "structural", "refused"]
    other: Setting
    reason: str


FieldRow = Excited | Excused


class FieldLedger(Row):
    """The whole file; a family's own row goes before the common one.

    :ivar refused_ropes: family → rope types that transformers refuses there, so that no case can have them.
    :ivar common: field → row of every family that reads it.
    :ivar family: family → field → row.
    """

    format: Literal[1]
    refused_ropes: dict[str, list[str]]
    common: dict[str, FieldRow]
    family: dict[str, dict[str, FieldRow]]

    def row(self, family: str, field: str) -> FieldRow | None:
        """The row that covers a field of a family, its case id made concrete; None when nobody listed it."""
        row = self.family.get(family, {}).get(field) or self.common.get(field)
        if isinstance(row, Excited):
            return row.model_copy(update={"excited_by": row.excited_by.replace("*", family)})
        return row


def load_fields(path: Path = FIXTURES / "config_fields.toml") -> FieldLedger:
    """The ledger.

    :raises FieldError: unreadable, unknown or missing key, wrong type.
    """
    return read_toml(path, FieldLedger, FieldError)


def fields_read(directory: Path) -> set[str]:
    """Fields that transformers reads while it loads a model directory and runs it on eight tokens.

    Counted are attribute reads by transformers' own code, keys read from the rotary dictionary, and keys of
    ``config.json`` that configuration code consumed, so that no attribute of that name is left. Not counted are
    names with an underscore, what the class itself defines (methods, parallel plans), and :data:`LISTING`.
    """
    config = read_config(directory)
    kind = type(transformers.AutoConfig.from_pretrained(directory))
    read: set[str] = set()
    with _recorded(kind, read):
        model: Any = load_model(directory)
        forward(model, torch.arange(8)[None])
    consumed = set(config) - set(vars(model.config)) - {"model_type"}
    return {name for name in read if _is_field(kind, name)} | consumed


@contextmanager
def _recorded(kind: type[Any], read: set[str]) -> Iterator[None]:
    """Names read from any config of a class, and from its rotary dictionary, by transformers' code."""
    plain: Any = kind.__getattribute__
    library = str(Path(str(transformers.__file__)).parent)

    def note(name: str, frame: Any) -> None:
        if frame.f_code.co_filename.startswith(library) and frame.f_code.co_name not in LISTING:
            read.add(name)

    class Rotary(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            note(f"{ROTARY}.{key}", sys._getframe(1))
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            note(f"{ROTARY}.{key}", sys._getframe(1))
            return super().get(key, default)

    def getattribute(self: object, name: str) -> Any:
        note(name, sys._getframe(1))
        value = plain(self, name)
        if name == ROTARY and type(value) is dict:
            value = plain(self, "__dict__")[name] = Rotary(value)
        return value

    kind.__getattribute__ = getattribute  # type: ignore[assignment]
    try:
        yield
    finally:
        del kind.__getattribute__


def _is_field(kind: type[Any], name: str) -> bool:
    """Whether ``config.json`` may carry a name: a declared field, a settable property, or nothing of the class."""
    if name.startswith("_"):
        return False
    if name in {field.name for field in dataclasses.fields(kind)} or not hasattr(kind, name) or "." in name:
        return True
    return getattr(getattr(kind, name), "fset", None) is not None
