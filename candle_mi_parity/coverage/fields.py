"""The config-field ledger: every field of ``config.json`` that transformers reads, and what covers it.

Which fields there are is recorded, not remembered: :func:`fields_read` watches the config object while a model is
built and run, so that an upgrade of transformers adds its new fields by itself. ``fixtures/config_fields.toml``
says of each field which case excites it, or why none has to; :mod:`field_check` holds every row against the truth.
A key inside the rotary dictionary is a field of its own, ``rope_parameters.<key>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.cases import Setting, TableRow, read_toml
from candle_mi_parity.spec.paths import FIXTURES


class FieldError(ParityError):
    """``fixtures/config_fields.toml`` is malformed, or its check cannot be made."""


class Excited(TableRow):
    """A case has the field at a value that moves the truth.

    :ivar excited_by: case id; ``*`` stands for the family in a row of the common table.
    :ivar against: the value it is compared with; without one the field is left out, so that the default holds.
    """

    excited_by: str
    against: Setting | None = None


class Excused(TableRow):
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


class FieldLedger(TableRow):
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
