"""The record of an auto-config census: ``rust_outputs/census/<version>.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from candle_mi_parity.errors import CensusError, TraceError
from candle_mi_parity.files.untrusted import read_json, validated
from candle_mi_parity.spec.paths import CENSUS
from candle_mi_parity.trace.trace import CandleMi

FORMAT: Literal["candle-mi-parity/census/1"] = "candle-mi-parity/census/1"
STORED = CENSUS

Reader = Literal["hf", "auto"]
CensusOutcome = Literal["refused", "same", "different", "not-asked"]
OUTCOMES: tuple[CensusOutcome, ...] = ("different", "same", "refused", "not-asked")


class Entry(BaseModel, extra="forbid", frozen=True):
    """One class.

    :ivar reason: why it is refused or not asked, or a remark about the comparison.
    :ivar dialect: of its ``config.json``; None if no model was made.
    :ivar reader: candle-mi's function that read it; None if it was not asked.
    :ivar compared: number of tensors compared; 1 is the logits alone.
    :ivar first: the first tensor past the gate, in execution order.
    :ivar ratio: its ratio, gate 8, three digits; None if it is not finite.
    :ivar logits_ratio: ratio of the logits.
    :ivar error: of ``first``, ‖candle-mi − truth‖ / ‖truth‖ in four digits, which depends on no noise.
    :ivar logits_error: the same of the logits.
    """

    model_type: str
    class_name: str
    outcome: CensusOutcome
    reason: str = ""
    dialect: Literal["hub", "v5"] | None = None
    reader: Reader | None = None
    compared: int = 0
    first: str | None = None
    ratio: float | None = None
    logits_ratio: float | None = None
    error: float | None = None
    logits_error: float | None = None

    def line(self, who: str) -> str:
        """What was found, for a user of a model of this type; empty where nothing was."""
        who, on = f"in the census, {who}", f"on a small {self.model_type} model"
        lines: dict[CensusOutcome, str] = {
            "refused": f"{who} refused a small {self.model_type} model: {self.reason}",
            "different": f"{who} did not compute PyTorch's numbers {on}, first at {self.first}",
            "same": f"{who} computed PyTorch's numbers {on} with default settings",
        }
        return lines.get(self.outcome, "")


class Census(BaseModel, extra="forbid", frozen=True):
    """``rust_outputs/census/<version>.json``: every mapped class once, sorted by model type.

    :ivar counts: outcome → number of classes.
    """

    format: Literal["candle-mi-parity/census/1"]
    candle_mi: CandleMi
    transformers: str
    counts: dict[CensusOutcome, int]
    classes: list[Entry]


def count(entries: list[Entry]) -> dict[CensusOutcome, int]:
    return {outcome: sum(entry.outcome == outcome for entry in entries) for outcome in OUTCOMES}


def read_census(path: Path) -> Census:
    """A stored census.

    :raises TraceError: unreadable JSON.
    :raises CensusError: not what the schema says.
    """
    return validated(Census, read_json(path, TraceError), path, CensusError)
