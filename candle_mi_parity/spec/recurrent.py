"""Layers that are run several times in one forward pass, as ``GenericTransformer::forward_recurrent`` does."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from candle_mi_parity.spec.edits import Position, short
from candle_mi_parity.spec.table import TableRow

Layer = Annotated[int, Field(ge=0)]


class Feedback(TableRow):
    """A random vector [d] that is added to the stream at one position, before every pass but the first.

    :ivar strength: factor of the vector.
    :ivar size: rms of the vector, relative to that of the stream before the first layer of the range.
    """

    position: Position
    strength: float = 1.0
    seed: int = 0
    size: Annotated[float, Field(gt=0, le=1000)] = 1.0

    @model_validator(mode="after")
    def _is_short(self) -> Feedback:
        return short(self, self.strength)


class Recurrent(TableRow):
    """``RecurrentPassSpec``.

    Without feedback every pass is given the output of the one before. With feedback every pass after the first is
    given the input of the first, with the vectors added. A hook fires in every pass, and its tensor is that of the
    last one.

    :ivar layers: the first and last layer of the range.
    :ivar depth: how often the range is run.
    """

    layers: Annotated[list[Layer], Field(min_length=2, max_length=2)]
    depth: Annotated[int, Field(ge=1, le=8)] = 2
    feedback: list[Feedback] = []

    @property
    def hook(self) -> str:
        """The stream to which the feedback is added."""
        return f"blocks.{self.layers[0]}.hook_resid_pre"

    def fault(self, n_layers: int, width: int) -> str:
        """Why a model of ``n_layers`` layers cannot run it on a prompt of ``width`` tokens; empty if it can."""
        first, last = self.layers
        if not first <= last < n_layers:
            return f"layers {self.layers}, but the model has {n_layers}"
        outside = [row.position for row in self.feedback if row.position >= width]
        return f"position {outside[0]} is outside the prompt of {width} tokens" if outside else ""

    def for_emitter(self) -> dict[str, Any]:
        """The ``recurrent`` of a request to the emitter, with the names of the vectors in the inputs file."""
        rows = [
            {"position": row.position, "strength": row.strength, "tensor": feedback_key(index)}
            for index, row in enumerate(self.feedback)
        ]
        return {"layers": self.layers, "depth": self.depth, "feedback": rows}


def feedback_key(index: int) -> str:
    """The name of a feedback vector in the inputs file."""
    return f"feedback.{index}"
