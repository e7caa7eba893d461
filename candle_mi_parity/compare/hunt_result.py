"""The result of ``candle-mi-parity hunt``: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

HUNT_FORMAT = "candle-mi-parity/hunt/1"
Kind = Literal["forward", "call", "text"]


@dataclass
class Cause:
    """Inputs that diverge in one way that no explanation of the release covers.

    :ivar what: the family, the function or the tokenizer.
    :ivar first: the first diverging tensor or result.
    :ivar reason: in which way, as ``values`` or ``panic``.
    :ivar smallest: the smallest input that was found, as a row of its table.
    :ivar explained: what the candidate computes instead; empty if no search found it.
    :ivar count: number of inputs with this divergence.
    """

    kind: Kind
    what: str
    first: str
    reason: str
    detail: str
    smallest: dict[str, Any]
    explained: str = ""
    count: int = 1


@dataclass
class Tally:
    """What became of the inputs of one kind.

    :ivar tried: number of inputs that were generated.
    :ivar agree: number in which every result passes the gate.
    :ivar known: id of an explanation → number of inputs that it explains.
    :ivar refused: message of the candidate, with its numbers left out → number of inputs.
    :ivar no_truth: message of PyTorch or of the oracle, likewise → number of inputs.
    :ivar unmeasured: number of inputs that rounding makes too noisy to judge.
    """

    tried: int = 0
    agree: int = 0
    known: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    no_truth: dict[str, int] = field(default_factory=dict)
    unmeasured: int = 0
