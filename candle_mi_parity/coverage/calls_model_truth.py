"""The reference of the functions that run a model or decode with its tokenizer, in torch.

Each takes the arguments of a row and returns what is computed under a mode of :mod:`rounding`: for a number of equal
rows the results, each with an axis of the rows in front. The rows of a mode with noise are its samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from candle_mi_parity.coverage.calls import CallRow
from candle_mi_parity.coverage.calls_measures import Named, softmax
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.models.prepared_case import tokenizer
from candle_mi_parity.oracle.compute import SAMPLES
from candle_mi_parity.oracle.hooks import Edits, forward, load_model
from candle_mi_parity.oracle.recurrence import Recurrence
from candle_mi_parity.oracle.rounding import Float64, MatmulScales, NoisePool, RoundingNoise, Truth64
from candle_mi_parity.oracle.torch_state import TORCH
from candle_mi_parity.spec.recurrent import Feedback, Recurrent
from candle_mi_parity.trace.truth import TruthTensor

Rows = Callable[[int], Named]
load_tokenizer = lru_cache(maxsize=4)(tokenizer)


@lru_cache(maxsize=1)
def _model(directory: Path) -> nn.Module:
    return load_model(directory)


def _ids(directory: Path, text: str) -> list[int]:
    ids: list[int] = load_tokenizer(directory)(text)["input_ids"]
    return ids


def _position(directory: Path, ids: list[int], strategy: str | int) -> int:
    """:raises ValueError: no token is a line break; ``IndexError`` where there is no such token."""
    if strategy == "first_newline":
        return [load_tokenizer(directory).decode([token]) for token in ids].index("\n")
    return range(len(ids))[-1 if strategy == "last" else int(strategy)]


def _direction(
    model: Any,
    directory: Path,
    positive: list[str],
    negative: list[str],
    layer: int,
    strategy: str | int,
    normalise: bool,
) -> Callable[[int], torch.Tensor]:
    """Mean residual of the positive prompts minus that of the negative ones, [rows, d].

    :raises IndexError: no such layer or position.
    :raises ValueError: no prompt, or no line break.
    """
    if not positive or not negative:
        raise ValueError("torch.stack of no tensors")
    hook = f"blocks.{range(len(model.model.layers))[layer]}.hook_resid_post"
    prompts = [[_ids(directory, text) for text in texts] for texts in (positive, negative)]
    places = [[_position(directory, ids, strategy) for ids in texts] for texts in prompts]

    def mean(rows: int, texts: list[list[int]], at: list[int]) -> torch.Tensor:
        streams = [forward(model, torch.tensor([ids] * rows)).tensors[hook] for ids in texts]
        return torch.stack([stream[:, place] for stream, place in zip(streams, at, strict=True)]).mean(0)

    def compute(rows: int) -> torch.Tensor:
        vector = mean(rows, prompts[0], places[0]) - mean(rows, prompts[1], places[1])
        length = (vector * vector).sum(-1, keepdim=True).sqrt()
        return vector / torch.where(length == 0, 1.0, length) if normalise else vector

    return compute


def _build(directory: Path, prompts: dict[str, Any]) -> Rows:
    direction = _direction(_model(directory), directory, **prompts)
    return lambda rows: {"value": direction(rows)}


def _intervention(directory: Path, prompts: dict[str, Any], text: str, strength: float) -> Rows:
    """The vector that is added, and the logits of a prompt's last position with it."""
    model, ids = _model(directory), _ids(directory, text)
    direction = _direction(model, directory, **prompts)

    def compute(rows: int) -> Named:
        value = direction(rows) * strength
        edits: Edits = {f"blocks.{prompts['layer']}.hook_resid_post": [lambda stream: stream + value[:, None]]}
        logits = forward(model, torch.tensor([ids] * rows), edits).tensors["logits"]
        return {"value": value, "logits": logits[:, -1]}

    return compute


def _text(directory: Path, text: str, layer: int) -> Rows:
    """Ids, a residual, and the logits of the last position."""
    ids, model = _ids(directory, text), _model(directory)

    def compute(rows: int) -> Named:
        tokens = torch.tensor([ids] * rows)
        found = forward(model, tokens).tensors
        resid = found[f"blocks.{layer}.hook_resid_post"]
        return {"ids": tokens.double(), "resid": resid[:, None], "logits": found["logits"][:, -1]}

    return compute


def _generate(
    directory: Path,
    tokens: list[int],
    max_tokens: int,
    stop: list[int],
    layers: list[int],
    depth: int,
    feedback: Sequence[tuple[int, float, torch.Tensor]],
    sustained: bool,
) -> Rows:
    """Logits [steps, V] of the last position along PyTorch's own greedy continuation; each step runs all tokens.

    The token of the last step may be the one that ends the continuation. ``sustained`` adds the feedback at the
    current last token too.

    :raises IndexError: no such layer or position.
    :raises ValueError: no pass.
    """
    model: Any = _model(directory)

    def step(rows: int, ids: list[int]) -> torch.Tensor:
        given = [*feedback, *((len(ids) - 1, strength, vector) for _, strength, vector in feedback if sustained)]
        fed = [(Feedback(position=at, strength=strength), vector) for at, strength, vector in given]
        spec = Recurrent(layers=layers, depth=depth, feedback=[row for row, _ in fed])
        if fault := spec.fault(len(model.model.layers), len(ids)):
            raise IndexError(fault)
        found = forward(model, torch.tensor([ids] * rows), recurrence=Recurrence(spec, fed))
        return found.tensors["logits"][:, -1]

    path = [list(tokens)]
    with Float64():  # type: ignore[no-untyped-call]
        while len(path) < max_tokens and (token := int(step(1, path[-1])[0].argmax())) not in stop:
            path.append([*path[-1], token])
    return lambda rows: {"logits": torch.stack([step(rows, ids) for ids in path], dim=1)}


def _lens(directory: Path, logits: torch.Tensor, k: int, token: str, layers: list[int] | None = None) -> Rows:
    """Of each layer's logits [L, V]: the largest probability and its token, and the first layer with a token.

    A token is in the top k of a layer if one of its k likeliest has it as a part. ``text`` are the bytes of the
    layers' likeliest tokens, each ended by 0; ``first`` is -1 where there is none.

    :param layers: of the rows of ``logits``; None for all from 0.
    """
    spelt = load_tokenizer(directory)
    ranked = np.argsort(-logits.numpy(), axis=-1, kind="stable")
    texts = [[spelt.decode([int(place)]) for place in row] for row in ranked]
    named = zip(layers or range(len(texts)), texts, strict=True)
    first = next((layer for layer, row in named if any(token in text for text in row[:k])), -1)
    text = [float(byte) for row in texts for byte in (*row[0].encode(), 0)]
    best = torch.from_numpy(ranked[:, :1].copy())

    def compute(rows: int) -> Named:
        alike = logits.repeat(rows, 1, 1)
        top = softmax(alike).gather(-1, best.repeat(rows, 1, 1))
        return {
            "top": top.reshape(rows, -1),
            "text": torch.tensor([text] * rows).double(),
            "first": torch.tensor([float(first)] * rows),
        }

    return compute


def _embedding(directory: Path, token: int) -> Rows:
    """A row of the embedding matrix, without the scale that a Gemma applies.

    :raises IndexError: no such token.
    """
    model: Any = _model(directory)
    vector = model.get_input_embeddings().weight[token].double()
    return lambda rows: {"value": vector.repeat(rows, 1)}


MODEL_FUNCTIONS: dict[str, Callable[..., Rows]] = {
    "build_contrastive_direction": _build,
    "contrastive_intervention": _intervention,
    "embedding_vector": _embedding,
    "forward_text": _text,
    "generate_recurrent": _generate,
    "logit_lens": _lens,
}


def model_truth(row: CallRow, arrays: dict[str, np.ndarray], directory: Path) -> dict[str, TruthTensor]:
    """The expected results of a call; the noise is the rms of 16 samples of float32 rounding.

    :param arrays: the tensors of the table.
    :param directory: of the model.
    :raises CaseTableError: the function has no reference.
    :raises IndexError: PyTorch raises it, or a ``ValueError``.
    """

    def given(value: Any) -> Any:
        """An argument, or the tensor that it names."""
        if isinstance(value, list):
            return [given(each) for each in value]
        return torch.from_numpy(arrays[value]).double() if isinstance(value, str) and value in arrays else value

    if row.fn not in MODEL_FUNCTIONS:
        raise CaseTableError(f"{row.id}: {row.fn} has no reference")
    with TORCH:
        compute = MODEL_FUNCTIONS[row.fn](directory, **{key: given(value) for key, value in row.args.items()})
        scales = MatmulScales()
        with Truth64(scales):
            values = compute(1)
        squares = {name: torch.zeros_like(value[0]) for name, value in values.items()}
        if not row.exact:
            with RoundingNoise(NoisePool(zlib.crc32(row.id.encode())), scales):
                noisy = compute(SAMPLES)
            squares = {name: (noisy[name] - value).square().mean(0) for name, value in values.items()}
    return {name: TruthTensor(value[0].numpy(), squares[name].sqrt().numpy()) for name, value in values.items()}
