"""The oracle: truth and its rounding noise from transformers in float64. The only source of expectations.

Truth does not depend on the candidate, so it is cached by content: model, tokens, SAE, transformers' own
source files, and the modules of this project that decide the numbers.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn

from candle_mi_parity.compare.gate import UNITS
from candle_mi_parity.errors import OracleError
from candle_mi_parity.files.cache import publish
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.models import sae, saelens
from candle_mi_parity.models.prepared_case import Subject
from candle_mi_parity.oracle import downstream as chains
from candle_mi_parity.oracle import hooks, interventions, rounding, streaming
from candle_mi_parity.oracle.downstream import Lens, SaeChain, coarse
from candle_mi_parity.oracle.hooks import Captured, Edits, Recorder, forward, load_model, modeling_files, replacing
from candle_mi_parity.oracle.rounding import (
    ACCUMULATION,
    Arithmetic,
    Float64,
    MatmulScales,
    NoisePool,
    RoundingNoise,
    Truth64,
)
from candle_mi_parity.spec import edits, families
from candle_mi_parity.spec.hook_points import FORCED, Mode, is_lens
from candle_mi_parity.trace import truth
from candle_mi_parity.trace.truth import Truth, TruthTensor

SAMPLES = 16
"""K, the number of noise samples."""

Then = Callable[[Captured], Captured]
Run = Callable[[nn.Module, torch.Tensor, Edits], Recorder]


class Oracle:
    """One subject's truths; the model is loaded when the first of them is not in the cache.

    :param device: of the candidate, whose rounding the noise is of; the truth is computed on the CPU all the same.
    """

    def __init__(self, subject: Subject, cache: Path, device: str = "cpu") -> None:
        self.subject = subject
        self.arithmetic = Arithmetic(UNITS[subject.case.dtype], ACCUMULATION[device.partition(":")[0]])
        self.key = truth_key(subject, self.arithmetic)
        self._directory = cache / "truth" / self.key
        self._truths: dict[Mode, Truth] = {}

    @cached_property
    def model(self) -> nn.Module:
        dtype: torch.dtype = getattr(torch, self.subject.case.dtype)
        if self._streamed:
            return streaming.load_streamed(self.subject.model_dir, dtype)
        model = load_model(self.subject.model_dir)
        round_weights(model, dtype)
        return model

    @cached_property
    def _streamed(self) -> bool:
        return streaming.is_streamed(self.subject.model_dir)

    def truth(self, mode: Mode = "free") -> Truth:
        """The truth of a mode, from the cache or computed.

        :raises OracleError: an op without a noise rule, a non-finite truth, an unreadable cache file, a case with
            edits teacher-forced.
        """
        if mode == "forced" and self.subject.case.edits:
            raise OracleError(f"{self.subject.case.id}: a case with edits has no teacher-forced truth")

        def compute(out: Path) -> None:
            self._compute(mode).save(out / "truth.safetensors")

        if mode not in self._truths:
            path = publish(self._directory / mode, compute) / "truth.safetensors"
            self._truths[mode] = Truth.load(path)
        return self._truths[mode]

    def inputs(self, mode: Mode) -> Path:
        """A safetensors file of float32 inputs taken from the truth.

        ``free``: every layer's output at the last position, [B, 1, d], for the logit lens, and ``sae``, the
        residual for the SAE alone, and the tensors of the case's edits. ``forced``: each layer's :data:`FORCED`
        hooks. Both sides are given these very numbers, so they carry no noise of their own.
        """
        case = self.subject.case

        def write(out: Path) -> None:
            free = {name: tensor.value for name, tensor in self.truth().tensors.items()}
            if mode == "forced":
                arrays = {name: value for name, value in free.items() if name.endswith(FORCED)}
            else:
                arrays = {name: value[:, -1:] for name, value in free.items() if is_lens(name)}
                arrays |= {"sae": free[case.sae.hook]} if case.sae else {}
            given = {name: coarse(value, case.dtype) for name, value in arrays.items()}
            given |= self._drawn() if mode == "free" else {}
            save_file(given, out / "inputs.safetensors")

        return publish(self._directory / f"inputs.{mode}", write) / "inputs.safetensors"

    def _drawn(self) -> dict[str, np.ndarray]:
        """The tensors of the case's edits, float32, from the cache or drawn."""
        if not self.subject.case.edits:
            return {}

        def write(out: Path) -> None:
            save_file(interventions.drawn_tensors(self.subject, self.model), out / "edits.safetensors")

        return load_file(publish(self._directory / "edits", write) / "edits.safetensors")

    def _compute(self, mode: Mode) -> Truth:
        changes: Edits
        chains: list[Then] = []
        sae: SaeChain | None = None
        if mode == "forced":
            given = load_file(self.inputs("forced"))
            changes = {name: [replacing(torch.from_numpy(array).double())] for name, array in given.items()}
        else:
            drawn = {key: torch.from_numpy(array).double() for key, array in self._drawn().items()}
            changes = interventions.edits_of(self.subject, drawn)
            chains.append(Lens(self.subject, self.model))
            if self.subject.sae_file is not None:
                sae = SaeChain(self.subject)
                chains.append(sae)

        def then(captured: Captured) -> Captured:
            return {name: tensor for chain in chains for name, tensor in chain(captured).items()}

        tokens = torch.tensor(self.subject.tokens)
        seed = int(self.subject.digest[:16], 16)
        recorder, values, squares = sample(self.model, tokens, seed, then, changes, self.arithmetic)
        meta = {"mode": mode, "weights": "streamed" if self._streamed else "whole"}
        return _as_truth(self.subject, meta, recorder, values, squares, sae)


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a float64 model's weights to a format, in place: what a candidate of that format is given."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def sample(
    model: nn.Module,
    tokens: torch.Tensor,
    seed: int,
    then: Then,
    edits: Edits,
    arithmetic: Arithmetic = Arithmetic(),  # noqa: B008 -- frozen
    samples: int = SAMPLES,
    run: Run = forward,
    batch: int = 160,
) -> tuple[Recorder, Captured, Captured]:
    """The truth pass, and ``samples`` passes of Monte-Carlo arithmetic around it.

    :param tokens: int64 [B, T].
    :param then: what is computed from the captured tensors inside the same mode; called first for the truth.
    :param edits: what is done at the hooks, see :class:`hooks.Recorder`.
    :param run: one recorded forward pass, as :func:`hooks.forward`.
    :param batch: rows × tokens that a pass of samples may have; 1 takes the samples one by one.
    :returns: the truth's recorder, its tensors with those of ``then``, and of each s² (mean square over the
        samples of sample − truth), all float64.
    """
    scales = MatmulScales()
    with Truth64(scales) if samples else Float64(), torch.no_grad():  # type: ignore[no-untyped-call]
        recorder = run(model, tokens, edits)
        values = recorder.tensors | then(recorder.tensors)
    squares = {name: torch.zeros_like(value) for name, value in values.items()}
    pool = NoisePool(seed)
    done = 0
    while done < samples:
        # Samples as batch rows win while a pass is small (rows × tokens near 160) and lose after.
        rows = max(1, min(samples - done, batch // tokens.numel()))
        with RoundingNoise(pool, scales, arithmetic), torch.no_grad():
            captured = run(model, tokens.repeat(rows, 1), edits).tensors
            captured = captured | then(captured)
        for name, value in values.items():
            squares[name] += (captured[name].reshape(rows, *value.shape) - value).square_().sum(0)
        done += rows
    return recorder, values, {name: total.div_(samples) for name, total in squares.items()}


# Read when the code is: a truth computed by code that was edited since must not pass for the new code's.
_RULES = digest_files(
    [
        Path(__file__),
        *(
            Path(str(module.__file__))
            for module in (chains, edits, families, hooks, interventions, rounding, sae, saelens, streaming, truth)
        ),
    ]
)


def truth_key(subject: Subject, arithmetic: Arithmetic) -> str:
    """Content key of a subject's truths.

    Everything that moves the numbers is in it: the case's digest, the sources of transformers' model and of
    this project's hooks, rules and SAE maths, torch's version, the processor (its kernels order the sums), and the
    arithmetic that the noise is of.
    """
    modeling = digest_files(modeling_files(subject.model_type))
    content = [subject.digest, _RULES, modeling, torch.__version__, platform.machine(), asdict(arithmetic)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _as_truth(
    subject: Subject,
    meta: dict[str, str],
    recorder: Recorder,
    values: Captured,
    squares: Captured,
    chain: SaeChain | None,
) -> Truth:
    """:param meta: what the truth is to say of itself beside the subject's own digests and the versions."""
    tensors, scalars = {}, {}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all() and torch.isfinite(squares[name]).all()):
            raise OracleError(f"{subject.case.id}: the truth's {name} holds NaN or Inf")
        noise = squares[name].sqrt()
        if name.endswith("reconstruction_mse"):
            scalars[name] = (float(value), float(noise))
            continue
        attention = name.endswith(("hook_scores", "hook_pattern"))
        allowed = _allowed(recorder, name).numpy() if attention else None
        tensors[name] = TruthTensor(value.numpy(), noise.numpy(), allowed)
    pre = {name: tensors.pop(f"{name}.pre") for name in ("sae", "sae_on_truth") if chain}
    return Truth(
        tokens=subject.tokens,
        tensors=_execution_order(subject, tensors, forced=meta["mode"] == "forced"),
        sae={name: chain.truth(name, pre[name], values) for name in pre if chain},
        scalars=scalars,
        meta={
            "case": subject.digest,
            "model": subject.model_digest,
            **meta,
            "dtype": subject.case.dtype,
            **(
                {"sae": str(subject.sae_digest), "sae_hook": subject.case.sae.hook}
                if chain and subject.case.sae
                else {}
            ),
            "samples": str(SAMPLES),
            "modeling": digest_files(modeling_files(subject.model_type)),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _allowed(recorder: Recorder, name: str) -> torch.Tensor:
    """What of scores, [T, T], or of a pattern, [T, T] or [H, T, T], is compared; the rest of a pattern is to be 0."""
    layer = int(name.split(".")[1])
    allowed = recorder.allowed[layer]
    return recorder.attended.get(layer, allowed) if name.endswith("hook_pattern") else allowed


def _execution_order(subject: Subject, tensors: dict[str, TruthTensor], forced: bool) -> dict[str, TruthTensor]:
    """Hooks as candle-mi fires them, then logits, the lens and the SAE.

    Forced, what arrives at a layer is the output of the one before, which is compared under its own name.
    """
    names = [*subject.captures, "logits"]
    names += [name for name in tensors if name.startswith(("lens", "sae"))]
    if missing := [name for name in names if name not in tensors]:
        raise OracleError(f"{subject.case.id}: transformers never reached {', '.join(missing[:3])}")
    return {name: tensors[name] for name in names if not (forced and name.endswith("hook_resid_pre"))}
