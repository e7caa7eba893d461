"""The control: transformers in float32, judged like a candidate.

It shows that the gate passes correct float32 arithmetic, also on CUDA. Models and SAEs stay on the device until the
source is closed.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from candle_mi_parity.candidate import cuda
from candle_mi_parity.candidate.tokens import TextIds
from candle_mi_parity.models.checkpoint import weight_bytes
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle.downstream import unembed
from candle_mi_parity.oracle.hooks import Captured, Edits, forward, load_model, replacing
from candle_mi_parity.oracle.interventions import edits_of
from candle_mi_parity.oracle.recurrence import recurrence_of
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.oracle.torch_state import torch_state
from candle_mi_parity.spec.hook_points import WEIGHTS, Mode, is_lens
from candle_mi_parity.trace.trace import Feature, InMemory
from candle_mi_parity.trace.truth import Truth

TOP_FEATURES = 10


class TorchSource:
    """Float32 on one device.

    :param device: ``cpu`` or ``cuda``.
    :ivar models: the models that are loaded, by directory and format.
    """

    identity = None

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.models: dict[tuple[Path, torch.dtype], nn.Module] = {}
        self._saes: dict[Path, TorchSae] = {}

    def model(self, directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model of a directory on the device, loaded once."""
        key = directory, dtype
        if key not in self.models:
            what = f"loading {directory.name}"
            with cuda.explain_out_of_memory(self.device, what, lambda: weight_bytes(directory, dtype.itemsize)):
                self.models[key] = load_model(directory, dtype, self.device)
        return self.models[key]

    def sae(self, file: Path) -> TorchSae:
        """The float32 SAE of a file on the device, loaded once."""
        if file not in self._saes:
            with cuda.explain_out_of_memory(self.device, f"loading {file.name}", lambda: file.stat().st_size):
                self._saes[file] = TorchSae(load_sae(file), self.device, torch.float32)
        return self._saes[file]

    def text_ids(self, subject: PreparedCase) -> TextIds:
        """No ids: the tokenizer is transformers' own."""
        return TextIds()

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        """Run the model, and the SAE on its residual and on the truth's.

        :raises DeviceError: the device has too little memory, or does not compute in float32.
        """

        def needed() -> int:
            return sum(math.prod(tensor.shape) for tensor in truth.tensors.values()) * torch.float32.itemsize

        with (
            torch_state(torch.float32),
            cuda.strict_float32(self.device),
            cuda.explain_out_of_memory(self.device, subject.case.id, needed),
        ):
            return self._trace(subject, mode, truth, inputs)

    def _trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        given = load_file(inputs, device=self.device)
        tokens = torch.tensor(subject.tokens, device=self.device)
        dtype: torch.dtype = getattr(torch, subject.case.dtype)
        fed = {name: tensor.to(dtype) for name, tensor in given.items()}
        edits: Edits = edits_of(subject, fed)
        if mode == "forced":
            edits = {name: [replacing(tensor)] for name, tensor in fed.items()}
        model = self.model(subject.model_dir, dtype)
        captured = forward(model, tokens, edits, recurrence=recurrence_of(subject, fed)).tensors
        if mode == "free":
            lens = {name: x.to(dtype) for name, x in given.items() if is_lens(name)}
            captured |= {f"lens.{name}": unembed(model, x) for name, x in lens.items()}
            captured |= {f"{WEIGHTS}{name}": model.get_parameter(name)[None].detach() for name in subject.quantized}
        scalars: dict[str, float] = {}
        top: list[Feature] = []
        if subject.sae_file is not None and subject.case.sae is not None and mode == "free":
            sae, resid = self.sae(subject.sae_file), captured[subject.case.sae.hook].float()
            captured |= _encode(sae, "sae", resid, scalars)
            captured |= _encode(sae, "sae_on_truth", given["sae"], scalars)
            features = captured["sae.features"][0, -1]
            scalars["sae.n_active_last_pos"] = float((features > 0).sum())
            for name, last in {
                "resid": resid[0, -1],
                "encoded": features,
                "decoded": captured["sae.recon"][0, -1],
            }.items():
                scalars[f"sae.{name}_last_norm"] = float(last.double().norm())
            values, indices = features.topk(min(TOP_FEATURES, int(scalars["sae.n_active_last_pos"])))
            top = [Feature(index=int(i), value=float(v)) for i, v in zip(indices, values, strict=True)]
        arrays = {name: (as_numpy(tensor), None) for name, tensor in captured.items() if name in truth.tensors}
        return InMemory(dict(arrays), subject.case.dtype, scalars, top)

    def __enter__(self) -> Self:
        return self

    def forget(self) -> None:
        """Drop the models and SAEs that are loaded."""
        self.models.clear()
        self._saes.clear()

    def __exit__(self, *_: object) -> None:
        self.forget()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A numpy array; bfloat16, which numpy does not have, becomes float32."""
    tensor = tensor.cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _encode(sae: TorchSae, name: str, resid: torch.Tensor, scalars: dict[str, float]) -> Captured:
    features = sae.encode(resid)
    recon = sae.decode(features, resid)
    scalars[f"{name}.reconstruction_mse"] = float((resid - recon).pow(2).mean())
    return {f"{name}.features": features, f"{name}.recon": recon}
