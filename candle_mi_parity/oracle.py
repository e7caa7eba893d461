"""The oracle: truth and its rounding noise from transformers in float64. The only source of expectations.

Truth does not depend on the candidate, so it is cached by content: model, tokens, SAE, transformers' own
source files, and the modules of this project that decide the numbers.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn

from candle_mi_parity import families, hooks, models, rounding, sae, truth
from candle_mi_parity.errors import OracleError, SaeError
from candle_mi_parity.hooks import Captured, Recorder, forward, load_model, modeling_files
from candle_mi_parity.rounding import MatmulScales, NoisePool, RoundingNoise, Truth64
from candle_mi_parity.sae import TorchSae, load_npz
from candle_mi_parity.subject import Subject
from candle_mi_parity.truth import SaeTruth, Truth, TruthTensor

SAMPLES = 16
"""K, the number of noise samples."""

Mode = Literal["free", "forced"]
"""``free``: the whole forward. ``forced``: the attention half of every layer starts from the truth's own
``hook_resid_pre`` and the MLP half from its ``hook_resid_mid``, so that a divergence belongs to its half-layer."""

FORCED = ("hook_resid_pre", "hook_resid_mid")

Then = Callable[[Captured], Captured]


class Oracle:
    """One subject's truths; the model is loaded when the first of them is not in the cache."""

    def __init__(self, subject: Subject, cache: Path) -> None:
        self.subject = subject
        self._directory = cache / "truth" / truth_key(subject)
        self._truths: dict[Mode, Truth] = {}

    @cached_property
    def model(self) -> nn.Module:
        return load_model(self.subject.model_dir)

    def truth(self, mode: Mode = "free") -> Truth:
        """The truth of a mode, from the cache or computed.

        :raises OracleError: an op without a noise rule, a non-finite truth, an unreadable cache file.
        """

        def compute(out: Path) -> None:
            self._compute(mode).save(out / "truth.safetensors")

        if mode not in self._truths:
            path = models.publish(self._directory / mode, compute) / "truth.safetensors"
            self._truths[mode] = Truth.load(path)
        return self._truths[mode]

    def inputs(self, mode: Mode) -> Path | None:
        """A safetensors file of float32 inputs taken from the truth; None where the mode needs none.

        ``free``: ``sae``, the residual for the SAE alone. ``forced``: each layer's :data:`FORCED` hooks under
        their own names. Both sides are given these very numbers, so they carry no noise of their own.
        """
        case = self.subject.case
        if mode == "free" and case.sae is None:
            return None

        def write(out: Path) -> None:
            free = self.truth().tensors
            keys = {name: name for name in free if name.endswith(FORCED)}
            if mode == "free" and case.sae is not None:
                keys = {"sae": case.sae.hook}
            save_file({key: coarse(free[name].value) for key, name in keys.items()}, out / "inputs.safetensors")

        return models.publish(self._directory / f"inputs.{mode}", write) / "inputs.safetensors"

    def _compute(self, mode: Mode) -> Truth:
        replace: Captured = {}
        chain: SaeChain | None = None
        if mode == "forced":
            given = load_file(str(self.inputs("forced")))
            replace = {name: torch.from_numpy(array).double() for name, array in given.items()}
        elif self.subject.sae_file is not None:
            chain = SaeChain(self.subject)
        then: Then = chain or (lambda captured: {})
        tokens = torch.tensor(self.subject.tokens)
        seed = int(self.subject.digest[:16], 16)
        recorder, values, squares = sample(self.model, tokens, seed, then, replace)
        return _as_truth(self.subject, mode, recorder, values, squares, chain)


def coarse(values: np.ndarray) -> np.ndarray:
    """Round to 16 significant bits, float32: near the truth, and the same bytes on every machine.

    The last bits of a float64 sum depend on the machine; at float32's 24 bits one element in 10⁸ would then round
    elsewhere and change the file's digest, at 16 bits one in 10¹¹.
    """
    mantissa, exponent = np.frexp(values)
    return np.ascontiguousarray(np.ldexp(np.round(mantissa * 2.0**16), exponent - 16), np.float32)


def sample(
    model: nn.Module, tokens: torch.Tensor, seed: int, then: Then, replace: Captured, samples: int = SAMPLES
) -> tuple[Recorder, Captured, Captured]:
    """The truth pass, and ``samples`` passes of Monte-Carlo arithmetic around it.

    :param tokens: int64 [B, T].
    :param then: what is computed from the captured tensors inside the same mode; called first for the truth.
    :param replace: hook → tensor fed in place of what arrives there.
    :returns: the truth's recorder, its tensors with those of ``then``, and of each s² (mean square over the
        samples of sample − truth), all float64.
    """
    scales = MatmulScales()
    with Truth64(scales), torch.no_grad():
        recorder = forward(model, tokens, replace)
        values = recorder.tensors | then(recorder.tensors)
    squares = {name: torch.zeros_like(value) for name, value in values.items()}
    pool = NoisePool(seed)
    done = 0
    while done < samples:
        # Samples as batch rows win while a pass is small (rows × tokens near 160) and lose after.
        rows = max(1, min(samples - done, 160 // tokens.numel()))
        with RoundingNoise(pool, scales), torch.no_grad():
            captured = forward(model, tokens.repeat(rows, 1), replace).tensors
            captured = captured | then(captured)
        for name, value in values.items():
            squares[name] += (captured[name].reshape(rows, *value.shape) - value).square_().sum(0)
        done += rows
    return recorder, values, {name: total.div_(samples) for name, total in squares.items()}


class SaeChain:
    """The SAE behind the model, on the model's own residual (``sae``) and on the truth's (``sae_on_truth``).

    The samples keep the truth's active set: a feature that rounding may flip is judged by its margin, and must
    not smear its decoder row over the noise of the reconstruction.

    :raises SaeError: when the SAE does not fit the model.
    """

    def __init__(self, subject: Subject) -> None:
        assert subject.case.sae is not None and subject.sae_file is not None
        weights = load_npz(subject.sae_file)
        width = models.read_config(subject.model_dir).get("hidden_size")
        if weights.d_in != width:
            raise SaeError(f"{subject.sae_file}: SAE has d_in {weights.d_in}, the model has hidden_size {width}")
        self._hook = subject.case.sae.hook
        self._batch = len(subject.tokens)
        self._sae = TorchSae(weights)
        self._active: dict[str, torch.Tensor] = {}
        self._fixed: torch.Tensor | None = None
        self.threshold = np.zeros(weights.d_sae) if weights.threshold is None else weights.threshold.astype(float)

    def __call__(self, captured: Captured) -> Captured:
        resid = captured[self._hook]
        if self._fixed is None:
            self._fixed = torch.from_numpy(coarse(resid.numpy()).astype(np.float64))
        rows = resid.shape[0] // self._batch
        return self._encode("sae", resid, rows) | self._encode("sae_on_truth", self._fixed.repeat(rows, 1, 1), rows)

    def _encode(self, name: str, resid: torch.Tensor, rows: int) -> Captured:
        pre = self._sae.pre_activations(resid)
        active = self._active.setdefault(name, self._sae.active(pre))
        features = torch.where(active.repeat(rows, 1, 1), pre, 0.0)
        recon = self._sae.decode(features)
        mse = (resid - recon).pow(2).view(rows, -1).mean(-1)
        return {
            f"{name}.pre": pre,
            f"{name}.features": features,
            f"{name}.recon": recon,
            f"{name}.reconstruction_mse": mse,
        }

    def residuals(self, values: Captured) -> dict[str, np.ndarray]:
        assert self._fixed is not None
        return {"sae": values[self._hook].numpy(), "sae_on_truth": self._fixed.numpy()}


def truth_key(subject: Subject) -> str:
    """Content key of a subject's truths.

    Everything that moves the numbers is in it: the case's digest, the sources of transformers' model and of
    this project's hooks, rules and SAE maths, torch's version and the processor (its kernels order the sums).
    """
    files = [Path(str(module.__file__)) for module in (families, hooks, rounding, sae, truth)]
    files += [Path(__file__), *modeling_files(subject.model_type)]
    content = [subject.digest, models.digest_files(files), torch.__version__, platform.machine()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _as_truth(
    subject: Subject,
    mode: Mode,
    recorder: Recorder,
    values: Captured,
    squares: Captured,
    chain: SaeChain | None,
) -> Truth:
    tensors, scalars = {}, {}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all() and torch.isfinite(squares[name]).all()):
            raise OracleError(f"{subject.case.id}: the truth's {name} holds NaN or Inf")
        noise = squares[name].sqrt()
        if name.endswith("reconstruction_mse"):
            scalars[name] = (float(value), float(noise))
            continue
        attention = name.endswith(("hook_scores", "hook_pattern"))
        allowed = recorder.allowed[int(name.split(".")[1])].numpy() if attention else None
        tensors[name] = TruthTensor(value.numpy(), noise.numpy(), allowed)
    pre = {name: tensors.pop(f"{name}.pre") for name in ("sae", "sae_on_truth") if chain}
    residuals = chain.residuals(values) if chain else {}
    return Truth(
        tokens=subject.tokens,
        tensors=_execution_order(subject, tensors, forced=mode == "forced"),
        sae={name: SaeTruth(pre[name], chain.threshold, residuals[name]) for name in pre if chain},
        scalars=scalars,
        meta={
            "case": subject.digest,
            "model": subject.model_digest,
            "mode": mode,
            "dtype": subject.case.dtype,
            **(
                {"sae": str(subject.sae_digest), "sae_hook": subject.case.sae.hook}
                if chain and subject.case.sae
                else {}
            ),
            "samples": str(SAMPLES),
            "modeling": models.digest_files(modeling_files(subject.model_type)),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _execution_order(subject: Subject, tensors: dict[str, TruthTensor], forced: bool) -> dict[str, TruthTensor]:
    """Hooks as candle-mi fires them, then logits and the SAE.

    Forced, what arrives at a layer is the output of the one before, which is compared under its own name.
    """
    names = [*subject.captures, "logits"]
    names += [name for name in tensors if name.startswith("sae")]
    if missing := [name for name in names if name not in tensors]:
        raise OracleError(f"{subject.case.id}: transformers never reached {', '.join(missing[:3])}")
    return {name: tensors[name] for name in names if not (forced and name.endswith("hook_resid_pre"))}
