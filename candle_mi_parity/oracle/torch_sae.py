"""Sparse autoencoders in torch.

``pre = x·W_enc + b_enc``; JumpReLU ``f = pre·(pre > θ)``, ReLU, or TopK, which keeps those of the k largest that are
positive; ``recon = f·W_dec + b_dec`` (Rajamanoharan et al. 2024, arXiv 2407.14435; Gao et al. 2024, arXiv
2406.04093).
SAELens may also subtract the decoder's bias from the input, normalise inputs, and select by decoder norm.
"""

from __future__ import annotations

import numpy as np
import torch

from candle_mi_parity.errors import SaeError
from candle_mi_parity.models.sae import Sae


class TorchSae:
    """An SAE's weights as torch tensors on a device, in the dtype of the arithmetic."""

    def __init__(self, sae: Sae, device: str = "cpu", dtype: torch.dtype = torch.float64) -> None:
        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device=device, dtype=dtype)

        self.W_enc, self.W_dec = tensor(sae.W_enc), tensor(sae.W_dec)
        self.b_enc, self.b_dec = tensor(sae.b_enc), tensor(sae.b_dec)
        self.threshold = None if sae.threshold is None else tensor(sae.threshold)
        self.k, self._relu, self._centred, self._normalize = sae.k, sae.relu, sae.centred, sae.normalize
        self._by_decoder_norm = sae.by_decoder_norm

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., d_in] → [..., d_sae]."""
        if self._normalize != "none":
            centre, scale = self._measure(x)
            # SAELens divides by std + 1e-5, and multiplies by std alone on the way out.
            x = (x - centre) / (scale + 1e-5 if self._normalize == "layer_norm" else scale)
        if self._centred:
            x = x - self.b_dec
        pre = x @ self.W_enc + self.b_enc
        return pre * self._norms() if self._by_decoder_norm else pre

    def active(self, pre: torch.Tensor) -> torch.Tensor:
        """Firing features, boolean [..., d_sae]: above θ, above 0, or among the k largest and above 0."""
        if self.k is None:
            return pre > (0.0 if self.threshold is None else self.threshold)
        chosen = torch.zeros_like(pre, dtype=torch.bool)
        # A stable order takes the first of equal values; the order of topk is unspecified.
        values, indices = torch.sort(pre, dim=-1, descending=True, stable=True)
        if self._relu:
            return chosen.scatter_(-1, indices[..., : self.k], True) & (pre > 0)
        if self.k >= pre.shape[-1]:
            return ~chosen
        kth = values[..., self.k - 1 : self.k]
        tied, kept = pre == kth, chosen.scatter_(-1, indices[..., : self.k], True)
        # The zeros of those that are left out count too where the k-th is negative: ties are dropped from the end.
        dropped = tied & (tied.flip(-1).cumsum(-1).flip(-1) <= pre.shape[-1] - self.k)
        return torch.where(kth < 0, (pre >= kth) & ~dropped, kept)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., d_in] → features [..., d_sae]."""
        pre = self.pre_activations(x)
        return torch.where(self.active(pre), pre, 0.0)

    def decode(self, features: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Features [..., d_sae] → reconstruction [..., d_in].

        :param x: the encoded input, from which a normalised input's reconstruction is scaled back.
        """
        if self._by_decoder_norm:
            features = features * (1 / self._norms())
        recon = features @ self.W_dec + self.b_dec
        if self._normalize == "none":
            return recon
        if x is None:
            raise SaeError(f"an SAE with {self._normalize} decodes relative to what it encoded")
        centre, scale = self._measure(x)
        return recon * scale + centre

    def out_scale(self, x: torch.Tensor) -> torch.Tensor:
        """The factor on the reconstruction at each position, [..., 1]."""
        return torch.ones_like(x[..., :1]) if self._normalize == "none" else self._measure(x)[1]

    def _measure(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The centre and scale of a normalised input, each [..., 1]."""
        width = x.shape[-1]
        if self._normalize == "constant_norm_rescale":
            return torch.zeros_like(x[..., :1]), (x.pow(2).sum(-1, keepdim=True) / width).sqrt()
        # A matmul, because the rounding error of its rule scales with the terms, not with a mean near zero.
        centre = x @ torch.full_like(x[..., :1].reshape(-1)[:1], 1 / width).expand(width, 1)
        return centre, ((x - centre).pow(2).sum(-1, keepdim=True) / (width - 1)).sqrt()

    def _norms(self) -> torch.Tensor:
        return self.W_dec.pow(2).sum(-1).sqrt()
