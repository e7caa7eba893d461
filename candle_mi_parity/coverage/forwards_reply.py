"""What the emitter answers to a request for other forwards of a case."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from candle_mi_parity.trace.trace import Digest, Header, Part, TensorEntry, Text


class Answered(Part):
    """SHA-256 of the bytes of the logits and of each capture; ``error`` for a forward that failed."""

    name: Text
    logits: Digest | None
    captures: dict[Text, Digest]
    error: Text | None

    @model_validator(mode="after")
    def _one_outcome(self) -> Answered:
        if (self.logits is None) == (self.error is None):
            raise ValueError("give exactly one of `logits` and `error`")
        return self


class Document(Part):
    """What the emitter wrote; ``tensors`` are the logits that the trace does not hold."""

    format: Literal["candle-mi-parity/forwards/1"]
    header: Header
    forwards: list[Answered]
    tensors: list[TensorEntry]
