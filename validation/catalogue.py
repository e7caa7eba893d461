"""The rows of ``faults.toml``, read into :class:`Fault`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.cases import Setting
from candle_mi_parity.spec.table import TableRow, read_toml

FAULTS = Path(__file__).with_name("faults.toml")
NOWHERE = "nowhere"
"""The ``first`` of a change without an effect beyond rounding."""

Kind = Literal[
    "config", "rotary", "mask", "norm", "activation", "scaling", "heads", "weights", "hook", "sae", "intervention",
    "tokens", "numerics", "recurrence", "io",
]  # fmt: skip


class CatalogueError(ParityError):
    """The catalogue is malformed, or a row cannot be planted as it says."""


class Change(TableRow):
    """A change of one array, or of all with ``*``; see :mod:`validation.array_changes`.

    :ivar at: index of an element or a slice; for an exchange, the two starts.
    :ivar by: a factor, a value, a step or a count.
    :ivar other: a second name.
    """

    name: str
    change: str
    at: list[int] = Field(default_factory=list)
    axis: int = 0
    by: float = 0.0
    other: str = ""


class SourceEdit(TableRow):
    """An edit of candle-mi's source.

    :ivar file: relative to the root of the crate.
    :ivar find: text that must occur exactly once.
    """

    file: str
    find: Annotated[str, Field(min_length=1)]
    replace: str


class Fault(TableRow):
    """One deliberate mistake.

    :ivar case: the row of ``fixtures/cases.toml`` in which it has an effect.
    :ivar config: config values that the run reads instead; ``absent`` lists missing keys.
    :ivar weight: a change of one weight of the model.
    :ivar tensor: a change of one captured tensor.
    :ivar function: a registered function, see :mod:`validation.disturb`, that disturbs the float32 run.
    :ivar io: a function of :mod:`validation.trace_faults` that damages the written trace.
    :ivar source: an edit of candle-mi's own source.
    :ivar first: the tensor that must fail first; part of the error of a ``refused`` row; or :data:`NOWHERE`.
    :ivar reason: the required ``TensorResult.reason``; "" accepts any.
    :ivar refused: the trace must be refused with an error.
    :ivar known: whether the case is one in which 0.2.2 is known to diverge.
    :ivar fast: whether ``make test`` runs it.
    """

    id: str
    kind: Kind
    says: str
    case: str
    config: dict[str, Setting] = Field(default_factory=dict)
    absent: list[str] = Field(default_factory=list)
    weight: Change | None = None
    tensor: Change | None = None
    function: str | None = None
    io: str | None = None
    source: SourceEdit | None = None
    first: str
    reason: str = ""
    refused: bool = False
    known: bool = False
    fast: bool = False

    @model_validator(mode="after")
    def _one_plant(self) -> Fault:
        plants = [self.config or self.absent, self.weight, self.tensor, self.function, self.io, self.source]
        if sum(1 for plant in plants if plant) != 1:
            raise ValueError(
                f"{self.id}: give exactly one of config (or absent), weight, tensor, function, io, source"
            )
        if self.refused and self.io is None:
            raise ValueError(f"{self.id}: only a fault of the written trace can be refused")
        return self


class Catalogue(TableRow):
    """The whole file."""

    format: Literal[1]
    fault: Annotated[list[Fault], Field(min_length=1)]


def load_faults(path: Path = FAULTS) -> list[Fault]:
    """All rows.

    :raises CatalogueError: an unreadable file, an unknown key, an id given twice, no row.
    """
    faults = read_toml(path, Catalogue, CatalogueError).fault
    ids = [fault.id for fault in faults]
    if doubled := sorted({name for name in ids if ids.count(name) > 1}):
        raise CatalogueError(f"{path}: ids given twice: {', '.join(doubled)}")
    return faults
