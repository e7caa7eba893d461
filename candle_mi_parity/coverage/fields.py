"""The config-field ledger: every field of ``config.json`` that transformers reads, and what covers it.

The fields are recorded while a model is built and run (:mod:`candle_mi_parity.oracle.fields_read`), so that an
upgrade of transformers adds its new fields. ``fixtures/config_fields.toml`` names for each field a case that covers
it, or why none is needed; :mod:`field_check` verifies every row. A key inside the rotary dictionary is a field of its
own, ``rope_parameters.<key>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.cases import Setting
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.spec.table import TableRow, read_toml


class FieldError(ParityError):
    """``fixtures/config_fields.toml`` is malformed, or cannot be checked."""


class CoveredField(TableRow):
    """A case has the field at a value that changes the truth.

    :ivar covered_by: case id; ``*`` stands for the family in a row of the common table.
    :ivar against: the value to compare with; without it the field is left out, so that its default applies.
    """

    covered_by: str
    against: Setting | None = None


class WaivedField(TableRow):
    """No case has to cover the field.

    :ivar kind: ``no_effect``: it does not change an inference. ``structural``: it changes shapes, so that a library
        that misreads it cannot load the weights. ``refused``: transformers or the oracle raises an error at any other
        value, so that there is no truth.
    :ivar other: a value at which this is verified.
    """

    kind: Literal["no_effect", "structural", "refused"]
    other: Setting
    reason: str


FieldRow = CoveredField | WaivedField


class FieldLedger(TableRow):
    """The whole file; the row of a family takes precedence over the common one.

    :ivar refused_ropes: family → rope types that transformers refuses there, so that no case can have them.
    :ivar common: field → row for every family that reads it.
    :ivar family: family → field → row.
    """

    format: Literal[1]
    refused_ropes: dict[str, list[str]]
    common: dict[str, FieldRow]
    family: dict[str, dict[str, FieldRow]]

    def row(self, family: str, field: str) -> FieldRow | None:
        """The row of a field in a family, with the family in its case id; None if it is not listed."""
        row = self.family.get(family, {}).get(field) or self.common.get(field)
        if isinstance(row, CoveredField):
            return row.model_copy(update={"covered_by": row.covered_by.replace("*", family)})
        return row


def load_fields(path: Path = FIXTURES / "config_fields.toml") -> FieldLedger:
    """:raises FieldError: unreadable, unknown or missing key, wrong type."""
    return read_toml(path, FieldLedger, FieldError)
