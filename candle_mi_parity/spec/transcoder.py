"""A generated transcoder as data: its file layout and what its weights are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from candle_mi_parity.spec.table import TableRow

Layout = Literal["clt", "clt-index", "plt", "gemma-scope"]


class GeneratedTranscoder(TableRow):
    """A transcoder for each layer of a model.

    :ivar layout: ``clt`` are circuit-tracer's files of a cross-layer transcoder, ``W_enc_{l}.safetensors`` and
        ``W_dec_{l}.safetensors``; ``clt-index`` has ``features/index.json.gz`` beside them, as the repositories of
        BlueLightAI; ``plt`` is ``layer_{l}.safetensors`` of per-layer transcoders; ``gemma-scope`` a ``config.yaml``
        that lists an NPZ for each layer in another repository.
    :ivar threshold: of JumpReLU, the same in each layer; empty for ReLU.
    :ivar dtype: of the files.
    :ivar identity: whether ``W_enc`` is the identity and ``b_enc`` 0, so that a pre-activation is the input.
    :ivar dead: features whose decoder rows are 0.
    :ivar skip: whether there is a skip connection, ``W_skip``.
    """

    layout: Layout
    features: Annotated[int, Field(gt=0)]
    seed: int
    threshold: list[float] = Field(default_factory=list)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    identity: bool = False
    dead: list[int] = Field(default_factory=list)
    skip: bool = False

    @property
    def crosses(self) -> bool:
        """Whether a feature writes to all layers from its own on, and not to its own alone."""
        return self.layout in ("clt", "clt-index")

    def targets(self, layer: int, layers: int) -> int:
        """How many layers a feature writes to."""
        return layers - layer if self.crosses else 1

    @model_validator(mode="after")
    def _can_be_written(self) -> GeneratedTranscoder:
        if self.threshold and len(self.threshold) != self.features:
            raise ValueError(f"{len(self.threshold)} thresholds for {self.features} features")
        if self.layout == "gemma-scope" and (self.dtype != "float32" or not self.threshold):
            raise ValueError("Gemma Scope's transcoders are float32 and have thresholds")
        if self.skip and self.layout != "plt":
            raise ValueError("only the layout plt has a file for a skip connection")
        return self
