"""Models that do not fit into memory in float64: weights are read from the files one layer at a time.

The modules are on the meta device, except for buffers. A layer's weights become float64 just before its forward and
are dropped after it. Of the embedding only the rows of the prompt's tokens are read, and the unembedding runs in
chunks of the vocabulary. Values and noise are the same as for a model that is loaded whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from candle_mi_parity.errors import ModelError, ParityError
from candle_mi_parity.files.untrusted import memory_bytes
from candle_mi_parity.models.checkpoint import weight_bytes, weight_tensors
from candle_mi_parity.models.quiet import quiet
from candle_mi_parity.models.transformers_private import no_init_weights, tied_weights
from candle_mi_parity.oracle.hooks import ignore_tensors, in_format, model_config, our_attention, require_weights
from candle_mi_parity.oracle.plain import parameters_on_meta, require_runs
from candle_mi_parity.oracle.rounding import Float64

SHARE = 4
"""A model is streamed when its float64 weights exceed the machine's memory divided by this."""
CHUNK = 1 << 13
"""Rows of the unembedding that are in memory at a time."""

_BARE = "model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_streamed(directory: Path) -> bool:
    """Whether a model directory is read layer by layer.

    :raises ModelError: weights that cannot be read.
    """
    return weight_bytes(directory, torch.float64.itemsize) * SHARE > memory_bytes()


class Weights:
    """The tensors of a model directory's files, read on demand.

    :param dtype: the format to which they are rounded before they become float64.
    :raises ModelError: an unreadable file, or a tensor in two files.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        tensors = weight_tensors(directory)
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._files = {name: tensor.file for name, tensor in tensors.items()}
        self._dtype, self._device = dtype, device

    def read(self, name: str, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """A tensor, or rows of it, float64 on the device, outside of any dispatch mode.

        :raises ModelError: the tensor is not floating.
        :raises OutOfRangeError: a value is beyond the format's range.
        """
        # Opened each time: the pages of a mapping count as memory until it is closed.
        with _disable_current_modes(), _opened(self._files[name]) as file:
            whole = file.get_tensor(name)
            if not whole.is_floating_point():
                raise ModelError(f"{self._files[name]}: {name} is {whole.dtype}, expected floating numbers")
            part = whole if rows is None else whole[rows]
            return in_format(name, part, self._dtype).to(self._device, torch.float64, copy=True)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not readable safetensors: {error}") from error


def load_streamed(directory: Path, dtype: torch.dtype, device: str = "cpu", chunk: int = CHUNK) -> nn.Module:
    """As :func:`hooks.load_model` in float64, with streamed weights.

    :param dtype: the format to which the weights are rounded.
    :param device: where each layer runs: ``cpu`` or ``cuda:N``.
    :param chunk: see :data:`CHUNK`.
    :raises ModelError: the files lack weights of the model, or the model cannot be streamed.
    """
    model = _skeleton(directory)
    weights = Weights(directory, dtype, device)
    held = _names(directory, model, weights)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    for index, layer in enumerate(model.model.layers):
        _stream(layer, f"model.layers.{index}.", weights, held)
    _stream(model.model.norm, "model.norm.", weights, held)
    _gather(model.model.embed_tokens, held[_EMBEDDING], weights)
    bias = held["lm_head.bias"] if model.lm_head.bias is not None else None
    model.lm_head = Unembedding(weights, held[_HEAD], bias, chunk)
    return cast(nn.Module, model.eval())


def _skeleton(directory: Path) -> Any:
    """The model with float64 buffers and without weights."""
    attention = our_attention()
    config = model_config(directory, attention)
    try:
        with Float64(), quiet(), no_init_weights(), parameters_on_meta():  # type: ignore[no-untyped-call]
            return transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.float64, attn_implementation=attention
            )
    except ParityError:
        raise
    except Exception:
        require_runs(directory)
        raise


def _names(directory: Path, model: Any, weights: Weights) -> dict[str, str]:
    """Parameter → its tensor in the files, which for tied parameters may have the other's name."""
    tied = tied_weights(model)
    tied |= {source: target for target, source in tied.items()}
    held = {name: _spelt(name, tied.get(name), weights) for name in model.state_dict()}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    there = {name: weights.shapes[held[name]] for name in held if held[name] in weights.shapes}
    mismatched = {name: (there[name], shapes[name]) for name in there if there[name] != shapes[name]}
    require_weights(directory, held.keys() - there.keys(), mismatched)
    ignored = weights.shapes.keys() - held.values()
    ignore_tensors(model, [name for name in ignored if "rotary_emb.inv_freq" not in name])
    streamed = ("model.layers.", "model.norm.", "lm_head.", _EMBEDDING)
    if other := [name for name in held if not name.startswith(streamed)]:
        raise ModelError(f"{directory}: {other[0]} is outside of the layers; a model of this kind cannot be streamed")
    if buffers := set(held) - {name for name, _ in model.named_parameters(remove_duplicate=False)}:
        raise ModelError(f"{directory}: {min(buffers)} is a stored buffer; a model of this kind cannot be streamed")
    return held


def _spelt(name: str, tied: str | None, weights: Weights) -> str:
    """A parameter's name in the files, with the prefix of the bare model missing, once or twice, as transformers
    accepts; its own name if there is none."""
    spellings = [(one, one.removeprefix(_BARE), _BARE + one) for one in (name, tied) if one]
    return next((spelling for each in spellings for spelling in each if spelling in weights.shapes), name)


def _stream(module: nn.Module, prefix: str, weights: Weights, held: dict[str, str]) -> None:
    """Give a module its weights while it runs."""
    names = [name for name, _ in module.named_parameters()]
    empty = {name: module.get_parameter(name) for name in names}

    def put(values: dict[str, nn.Parameter]) -> None:
        for name, value in values.items():
            owner, _, key = name.rpartition(".")
            module.get_submodule(owner)._parameters[key] = value

    def before(_module: nn.Module, _args: Any) -> None:
        put({name: nn.Parameter(weights.read(held[prefix + name]), requires_grad=False) for name in names})

    def after(_module: nn.Module, _args: Any, _out: Any) -> None:
        put(empty)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def _gather(embedding: nn.Embedding, name: str, weights: Weights) -> None:
    """Give an embedding only the rows of the prompt's tokens, and renumber the tokens."""
    empty = embedding.weight
    embedding.padding_idx = None  # unused without gradients, and not among these rows

    def before(_module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        with _disable_current_modes():
            rows, places = torch.unique(args[0], return_inverse=True)
        embedding.weight = nn.Parameter(weights.read(name, rows.cpu()), requires_grad=False)
        return (places,)

    def after(_module: nn.Module, _args: Any, _out: Any) -> None:
        embedding.weight = empty

    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after, always_call=True)


class Unembedding(nn.Module):
    """A linear layer [.., d] → [.., V] that reads ``chunk`` of its V rows at a time."""

    def __init__(self, weights: Weights, weight: str, bias: str | None, chunk: int) -> None:
        super().__init__()
        self._weights, self._weight, self._bias, self._chunk = weights, weight, bias, chunk

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        parts = []
        for rows in chunks(self._weights.shapes[self._weight][0], self._chunk):
            bias = None if self._bias is None else self._weights.read(self._bias, rows)
            parts.append(functional.linear(hidden, self._weights.read(self._weight, rows), bias))
        return torch.cat(parts, dim=-1)


def chunks(size: int, step: int) -> list[slice]:
    """Slices of length ``step`` that cover ``size`` entries."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
