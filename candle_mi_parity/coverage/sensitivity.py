"""The effect of a change of ``config.json`` on the truth, in units of the truth's rounding noise."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from candle_mi_parity.compare.gate import measure
from candle_mi_parity.files.cache import cached
from candle_mi_parity.models.checkpoint import read_config, weight_files
from candle_mi_parity.models.generate import GENERATOR, generated_model
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.hooks import forward, load_model
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.spec.cases import Case, Setting
from candle_mi_parity.spec.counterfactual import with_field
from candle_mi_parity.trace.truth import Truth

Config = dict[str, Any]
ROTARY = "rope_parameters"


class Effect(BaseModel):
    """The effect of a change.

    :ivar outcome: ``moved``: the same hook points and shapes; ``structural``: others; ``refused``: transformers or
        the oracle cannot compute the changed model.
    :ivar ratio: largest of position ratio and element ratio / 4 over all tensors; 0 if nothing changed.
    :ivar detail: the tensor with that ratio or of another shape, or the error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    outcome: Literal["moved", "structural", "refused"]
    ratio: float = 0.0
    detail: str = ""


def effect(base: Case, change: Mapping[str, Setting | None], cache: Path) -> Effect:
    """The effect of other config values on the truth of a generated model with the same weights and tokens.

    :param change: field → its other value; None leaves the field out.
    :raises ParityError: the truth of ``base`` cannot be computed.
    """
    subject = prepare(base, cache)
    oracle = Oracle(subject, cache)
    config = read_config(subject.model_dir)
    for field, value in change.items():
        config = with_field(config, field, value)

    def compute() -> dict[str, Any]:
        truth = oracle.truth()
        try:
            shapes, values = _changed(config, torch.tensor(subject.tokens))
        except Exception as error:  # configs, loaders and modules each raise errors of their own
            return Effect(outcome="refused", detail=_first_line(error)).model_dump()
        before = _weight_shapes(subject.model_dir)
        reshaped = [name for name in sorted(set(before) & set(shapes)) if before[name] != shapes[name]]
        if reshaped:
            return Effect(outcome="structural", detail=reshaped[0]).model_dump()
        return _compare(truth, values, [*subject.captures, "logits"]).model_dump()

    source = Path(__file__).read_text(encoding="utf-8")
    key = [oracle.key, GENERATOR, source, list(config.items())]
    return Effect.model_validate(cached(cache, "effects", key, compute))


def _changed(config: Config, tokens: torch.Tensor) -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    """Weight shapes and, float64, every hook point of the generated model with this config."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = generated_model(config, "hub", Path(scratch))
        shapes, model = _weight_shapes(directory), load_model(directory)
    with Float64():  # type: ignore[no-untyped-call]
        return shapes, {name: tensor.numpy() for name, tensor in forward(model, tokens).tensors.items()}


def _weight_shapes(directory: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in weight_files(directory):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _compare(truth: Truth, changed: dict[str, np.ndarray], names: list[str]) -> Effect:
    worst = Effect(outcome="moved")
    if surplus := sorted(set(changed) - set(names)):
        return Effect(outcome="structural", detail=surplus[0])
    for name in names:
        expected = truth.tensors[name]
        if name not in changed or changed[name].shape != expected.value.shape:
            return Effect(outcome="structural", detail=name)
        found = measure(changed[name] - expected.value, expected.value, expected.noise)
        ratio = float(max(found.position.max(), found.element.max() / 4))
        if not ratio <= worst.ratio:
            worst = Effect(outcome="moved", ratio=ratio, detail=name)
    return worst


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
