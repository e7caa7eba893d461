"""The catalogue of faults: ``proof/faults.toml`` read into :class:`Fault`, one row of data each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.cases import Row, Setting, read_toml

FAULTS = Path(__file__).with_name("faults.toml")
NOWHERE = "nowhere"
"""The ``first`` of a fault that changes nothing but rounding."""

Kind = Literal[
    "config", "rotary", "mask", "norm", "activation", "scaling", "heads", "weights", "hook", "sae", "intervention",
    "tokens", "numerics", "io",
]  # fmt: skip


class CatalogueError(ParityError):
    """The catalogue does not say what a row must say, or a row cannot be planted as it says."""


class Change(Row):
    """What is done to one array, or with ``*`` to all; the changes are in :mod:`proof.changes`.

    :ivar at: index of an element or a slice, or for an exchange the two starts.
    :ivar by: a factor, a value, a step or a count.
    :ivar other: a second name.
    """

    name: str
    change: str
    at: list[int] = Field(default_factory=list)
    axis: int = 0
    by: float = 0.0
    other: str = ""


class SourceEdit(Row):
    """An edit of candle-mi's source.

    :ivar file: below the crate's root.
    :ivar find: is there exactly once.
    """

    file: str
    find: Annotated[str, Field(min_length=1)]
    replace: str


class Fault(Row):
    """One deliberate mistake.

    :ivar case: the row of ``fixtures/cases.toml`` that excites it.
    :ivar config: config values that the run has otherwise; with ``absent``, keys it does not have.
    :ivar weight: one weight that the run has otherwise.
    :ivar tensor: one captured tensor that is another.
    :ivar function: a function of :mod:`proof.functions` that disturbs the float32 run.
    :ivar io: a function of :mod:`proof.io_faults` that harms the written trace.
    :ivar source: an edit of candle-mi's own source.
    :ivar first: the tensor that must fail first; of a ``refused`` row what the error must say; or ``nowhere``.
    :ivar reason: for which of the reasons of :class:`TensorResult` it must fail; "" for any.
    :ivar refused: the trace is no trace, and the case must end in an error instead of a divergence.
    :ivar fast: whether the fast lane has it.
    :ivar written_before_run: it was written down, with its ``first``, before it was first run.
    :ivar predicted: what ``first`` was then, where it was wrong; ``why`` says why.
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
    fast: bool = False
    written_before_run: bool = False
    predicted: str = ""
    why: str = ""

    @model_validator(mode="after")
    def _one_plant(self) -> Fault:
        plants = [self.config or self.absent, self.weight, self.tensor, self.function, self.io, self.source]
        if sum(1 for plant in plants if plant) != 1:
            raise ValueError(
                f"{self.id}: give exactly one of config (or absent), weight, tensor, function, io, source"
            )
        if bool(self.predicted) != bool(self.why) or (self.predicted and not self.written_before_run):
            raise ValueError(f"{self.id}: `predicted` needs `why`, and a row that was written before it was run")
        if self.refused and self.io is None:
            raise ValueError(f"{self.id}: only a fault of the written trace can be refused")
        return self

    @property
    def scored(self) -> bool:
        """Whether it must be killed."""
        return self.first != NOWHERE

    @property
    def foretold(self) -> str:
        """What was written down first."""
        return self.predicted or self.first


class Catalogue(Row):
    format: Literal[1]
    fault: list[Fault]


def load_faults(path: Path = FAULTS) -> list[Fault]:
    """All rows.

    :raises CatalogueError: unreadable, an unknown key, a doubled id, no row.
    """
    faults = read_toml(path, Catalogue, CatalogueError).fault
    ids = [fault.id for fault in faults]
    if doubled := sorted({name for name in ids if ids.count(name) > 1}):
        raise CatalogueError(f"{path}: ids given twice: {', '.join(doubled)}")
    if not faults:
        raise CatalogueError(f"{path}: no fault; nothing would be proved")
    return faults
