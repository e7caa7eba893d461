"""What the suite's own proof measured, as tables: shown by the report, and the source of the numbers in the README.

``python -m proof.record`` writes ``fixtures/proof.json`` from the results of ``make faults``, ``make alarms``,
``make rivals`` and ``make bench``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from candle_mi_parity.errors import ProofError
from candle_mi_parity.files.untrusted import read_json
from candle_mi_parity.spec.paths import FIXTURES

RECORD = FIXTURES / "proof.json"
_RULES = (
    *("oracle/rounding", "oracle/oracle", "oracle/hooks"),
    *("compare/gate", "compare/tensor_result", "compare/compare", "compare/compare_sae"),
)
"""The modules that decide what is seen."""


class Table(BaseModel):
    """One table; every row has as many cells as there are columns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        if not self.columns or any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table {self.name} is not rectangular")
        return self

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows)])


class ProofRecord(BaseModel):
    """What was measured.

    :ivar rules: digest of the modules that decide what is seen, when all of it was measured; a word where that is not
        one digest.
    :ivar claims: sentences with the numbers in them, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["candle-mi-parity/proof/1"]
    versions: dict[str, str]
    rules: str
    claims: dict[str, str]
    tables: list[Table]

    @property
    def current(self) -> bool:
        """Whether the rules are those that were proven, to the byte."""
        return self.rules == rules_digest()


def rules_digest() -> str:
    digest = hashlib.sha256()
    for name in _RULES:
        digest.update((Path(__file__).parents[1] / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def load_proof(path: Path = RECORD) -> ProofRecord:
    """Read the record.

    :raises ProofError: missing, unreadable, or another format.
    """
    try:
        return ProofRecord.model_validate(read_json(path, ProofError))
    except (ProofError, ValidationError) as error:
        raise ProofError(f"{path}: {error}; python -m proof.record writes it") from error
