"""A generated network of AlgZoo, and the file that its weights lie in.

AlgZoo (https://github.com/alignment-research-center/alg-zoo) trains tiny networks on four tasks: ReLU RNNs on
``2nd_argmax``, ``argmedian`` and ``median``, and transformers without MLPs and norms on ``longest_cycle``. Tensors
have the names of its ``state_dict``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from candle_mi_parity.spec.table import TableRow
from candle_mi_parity.trace.formats import round_to_dtype

Task = Literal["2nd_argmax", "argmedian", "median", "longest_cycle"]
TRANSFORMER_LAYERS = 2
"""AlgZoo's default, and that of candle-mi's config."""


class NetworkRow(TableRow):
    """A network with normal numbers as weights.

    :ivar file: ``pth`` is ``torch.save``'s file of the state dict, ``pth-legacy`` its format before PyTorch 1.6,
        ``pkl`` and ``bin`` the first under another suffix.
    :ivar dtype: of the file.
    :ivar views: whether the file's matrices are transposed views of what is stored.
    :ivar bias: whether there are biases, which AlgZoo's networks may have.
    :ivar tensors: values of weights that are not drawn; one number for all of them.
    :ivar missing: tensors that the file does not have.
    """

    task: Task
    hidden: Annotated[int, Field(gt=0)]
    length: Annotated[int, Field(gt=0)]
    seed: int = 0
    file: Literal["safetensors", "pth", "pth-legacy", "pkl", "bin"] = "safetensors"
    dtype: Literal["float64", "float32", "float16", "bfloat16"] = "float32"
    views: bool = False
    bias: bool = False
    layers: Annotated[int, Field(gt=0)] = TRANSFORMER_LAYERS
    heads: Annotated[int, Field(gt=0)] = 1
    input_range: int | None = None
    tensors: dict[str, Any] = Field(default_factory=dict)
    missing: list[str] = Field(default_factory=list)

    @property
    def recurrent(self) -> bool:
        return self.task != "longest_cycle"

    @property
    def outputs(self) -> int:
        return 1 if self.task == "median" else self.length

    def weights(self) -> dict[str, np.ndarray]:
        """float32 with values of the file's dtype, by the names in AlgZoo's state dict."""
        draw = np.random.Generator(np.random.PCG64(self.seed)).standard_normal
        arrays = {name: draw(shape) / np.sqrt(shape[-1]) for name, shape in self._shapes().items()}
        for name, values in self.tensors.items():
            given = np.asarray(values, dtype=np.float64)
            arrays[name] = given if given.ndim else np.full(arrays[name].shape, given)
        singles = {name: array.astype(np.float32) for name, array in arrays.items()}
        if self.dtype in ("float16", "bfloat16"):
            return {name: round_to_dtype(array, self.dtype) for name, array in singles.items()}
        return singles

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        width, outputs = self.hidden, self.outputs
        if self.recurrent:
            shapes: dict[str, tuple[int, ...]] = {"rnn.weight_ih_l0": (width, 1), "rnn.weight_hh_l0": (width, width)}
            shapes["linear.weight"] = (outputs, width)
            biases = {"rnn.bias_ih_l0": (width,), "rnn.bias_hh_l0": (width,), "linear.bias": (outputs,)}
            return shapes | (biases if self.bias else {})
        shapes = {"embed.weight": (self.input_range or self.length, width), "pos_embed.weight": (self.length, width)}
        for layer in range(self.layers):
            shapes[f"attns.{layer}.in_proj_weight"] = (3 * width, width)
            shapes[f"attns.{layer}.out_proj.weight"] = (width, width)
            if self.bias:
                shapes[f"attns.{layer}.in_proj_bias"] = (3 * width,)
                shapes[f"attns.{layer}.out_proj.bias"] = (width,)
        shapes["unembed.weight"] = (outputs, width)
        return shapes | ({"unembed.bias": (outputs,)} if self.bias else {})

    def at(self, directory: Path) -> Path:
        """The file in the network's directory."""
        return directory / f"network.{self.file.partition('-')[0]}"

    def write(self, directory: Path) -> None:
        import torch  # neither numpy nor safetensors.numpy writes these formats
        from safetensors.torch import save_file

        directory.mkdir(exist_ok=True)
        dtype: torch.dtype = getattr(torch, self.dtype)
        tensors = {name: torch.from_numpy(array).to(dtype) for name, array in self.weights().items()}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in self.missing}
        if self.views:
            tensors = {name: each.t().contiguous().t() if each.dim() == 2 else each for name, each in tensors.items()}
        if self.file == "safetensors":
            save_file(tensors, self.at(directory))
        else:
            zipped = self.file != "pth-legacy"
            torch.save(tensors, self.at(directory), _use_new_zipfile_serialization=zipped)

    def request(self, directory: Path) -> dict[str, object]:
        """The network as the emitter is told of it; of an RNN, the config's own number of layers and heads."""
        told: dict[str, object] = {"path": str(self.at(directory)), "task": self.task}
        told |= {"hidden_size": self.hidden, "seq_len": self.length}
        if self.recurrent:
            return told
        told |= {"num_layers": self.layers, "num_heads": self.heads}
        return told | ({"input_range": self.input_range} if self.input_range else {})

    @model_validator(mode="after")
    def _can_be_written(self) -> NetworkRow:
        if self.hidden % self.heads:
            raise ValueError(f"{self.heads} heads of a width of {self.hidden}")
        if self.views and self.file == "safetensors":
            raise ValueError("safetensors stores no views")
        return self
