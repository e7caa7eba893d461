"""Logit lens and SAE, in the same float64 mode and with the same noise as the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from candle_mi_parity.errors import SaeError
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle.hooks import Captured
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual
from candle_mi_parity.spec.hook_points import is_lens
from candle_mi_parity.trace.formats import round_to_dtype
from candle_mi_parity.trace.truth import SaeTruth, TruthTensor


def unembed(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Final norm and unembedding without the final softcap, [B, T, d] → [B, T, V], as ``project_to_vocab`` is
    documented."""
    logits: torch.Tensor = model.lm_head(model.model.norm(hidden))
    return logits


def project(model: Any, streams: np.ndarray) -> np.ndarray:
    """:func:`unembed` in float64, without its noise: [B, T, d] → [B, T, V]."""
    with Float64(), torch.no_grad():  # type: ignore[no-untyped-call]
        found: np.ndarray = unembed(model, torch.from_numpy(streams.astype(np.float64))).numpy()
    return found


class Lens:
    """The logit lens: every layer's output at the last position, projected onto the vocabulary.

    The first call, for the truth, fixes the inputs that are not given; the samples use the same.

    :param given: layer's output → its last position, [B, 1, d].
    """

    def __init__(self, subject: PreparedCase, model: nn.Module, given: Mapping[str, np.ndarray]) -> None:
        self._model, self._batch, self._dtype = model, len(subject.tokens), subject.case.dtype
        self._inputs: Captured = {
            name: torch.from_numpy(value).double() for name, value in given.items() if is_lens(name)
        }

    def __call__(self, captured: Captured) -> Captured:
        for name in captured:
            if is_lens(name) and name not in self._inputs:
                last = round_to_dtype(captured[name][:, -1:].numpy(), self._dtype)
                self._inputs[name] = torch.from_numpy(last.astype(np.float64))
        rows = captured["logits"].shape[0] // self._batch
        return {f"lens.{name}": unembed(self._model, x.repeat(rows, 1, 1)) for name, x in self._inputs.items()}


class SaeChain:
    """The SAE behind the model, on the model's own residual (``sae``) and on the truth's (``sae_on_truth``).

    The samples keep the truth's active set: a feature that rounding may flip is judged by its margin, and must not
    add its decoder row to the noise of the reconstruction.

    :param given: ``sae``, the input of the SAE alone, [B, T, d]; without it, the first call, for the truth, fixes it.
    :raises SaeError: the SAE does not fit the model.
    """

    def __init__(
        self, subject: PreparedCase, given: Mapping[str, np.ndarray], change: Counterfactual = PLAIN
    ) -> None:
        assert subject.case.sae is not None and subject.sae_file is not None
        weights = load_sae(subject.sae_file, change)
        width = read_config(subject.model_dir).get("hidden_size")
        if weights.d_in != width:
            raise SaeError(f"{subject.sae_file}: SAE has d_in {weights.d_in}, the model has hidden_size {width}")
        self._hook = subject.case.sae.hook
        self._batch = len(subject.tokens)
        self._dtype = subject.case.dtype
        self._sae = TorchSae(weights)
        self._active: dict[str, torch.Tensor] = {}
        self._fixed = torch.from_numpy(given["sae"]).double() if "sae" in given else None
        self._k, self._relu = weights.k or 0, weights.relu
        self._threshold = np.zeros(weights.d_sae) if weights.threshold is None else weights.threshold.astype(float)

    def __call__(self, captured: Captured) -> Captured:
        resid = captured[self._hook]
        if self._fixed is None:
            self._fixed = torch.from_numpy(round_to_dtype(resid.numpy(), self._dtype).astype(np.float64))
        rows = resid.shape[0] // self._batch
        return self._encode("sae", resid, rows) | self._encode("sae_on_truth", self._fixed.repeat(rows, 1, 1), rows)

    def _encode(self, name: str, resid: torch.Tensor, rows: int) -> Captured:
        # An SAE is float32 in every model: the cast sets the size of the noise.
        pre = self._sae.pre_activations(resid.float())
        active = self._active.setdefault(name, self._sae.active(pre))
        features = torch.where(active.repeat(rows, 1, 1), pre, 0.0)
        recon = self._sae.decode(features, resid.float())
        mse = (resid - recon).pow(2).view(rows, -1).mean(-1)
        found = {"pre": pre, "features": features, "recon": recon, "reconstruction_mse": mse}
        if name == "sae":
            # Both sides compute norms in float64, which adds no noise; that of the elements may be common to all.
            with _disable_current_modes():
                for of, tensor in (("resid", resid), ("encoded", features), ("decoded", recon)):
                    last = tensor.view(rows, self._batch, *tensor.shape[1:])[:, 0, -1]
                    found[f"{of}_last_norm"] = last.norm(dim=-1)
        return {f"{name}.{of}": tensor for of, tensor in found.items()}

    def truth(self, name: str, pre: TruthTensor, values: Captured) -> SaeTruth:
        """What the comparison of a chain's features needs besides the tensors."""
        assert self._fixed is not None
        residual = values[self._hook] if name == "sae" else self._fixed
        scale = self._sae.out_scale(residual).numpy()
        return SaeTruth(pre, self._threshold, residual.numpy(), self._k, scale, self._relu)
