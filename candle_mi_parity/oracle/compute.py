"""Compute a truth: one forward pass in float64, and passes with rounding noise.

Cached truths are read without this module and without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

from candle_mi_parity.compare.gate import ELEMENT_GATE
from candle_mi_parity.errors import OracleError, ParityError
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.dequantize import write_plain
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle import interventions, remarks, streaming
from candle_mi_parity.oracle.arithmetic import CPU_FLOAT32, Arithmetic
from candle_mi_parity.oracle.downstream import Lens, SaeChain
from candle_mi_parity.oracle.hooks import (
    Captured,
    Edits,
    Recorder,
    forward,
    ignored_tensors,
    in_format,
    load_model,
    replacing,
)
from candle_mi_parity.oracle.plain import require_runs
from candle_mi_parity.oracle.recurrence import recurrence_of
from candle_mi_parity.oracle.rounding import Float64, MatmulScales, NoisePool, RoundingNoise, Truth64
from candle_mi_parity.oracle.rwkv_hooks import alike
from candle_mi_parity.oracle.variants import apply_to_model
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual
from candle_mi_parity.spec.families import RECURRENT
from candle_mi_parity.spec.hook_points import SIGNED, WEIGHTS, Mode
from candle_mi_parity.trace.truth import Truth, TruthTensor

SAMPLES = 16
"""K, the number of noise samples."""

Given = Mapping[str, np.ndarray]
"""Inputs of both sides besides the tokens, float32 by name; see :meth:`Oracle.inputs`."""

Then = Callable[[Captured], Captured]
Run = Callable[[nn.Module, torch.Tensor, Edits], Recorder]
R = TypeVar("R")


class Computation:
    """The truths of one case; the model is loaded once.

    :param change: the counterfactual; :data:`PLAIN` for the truth itself.
    :param load: makes the float64 model of a directory that is not streamed; None for :func:`load_model`.
    :raises ModelError: transformers cannot load the model.
    """

    def __init__(
        self,
        subject: PreparedCase,
        arithmetic: Arithmetic,
        change: Counterfactual = PLAIN,
        load: Callable[[Path], nn.Module] | None = None,
    ) -> None:
        self._subject, self._arithmetic, self._change = subject, arithmetic, change
        self._load = load or load_model
        self._scratch: TemporaryDirectory[str] | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The model in float64, with weights rounded to the case's format."""
        dtype: torch.dtype = getattr(torch, self._subject.case.dtype)
        directory = self._directory()
        if streamed := streaming.is_streamed(self._subject.model_dir):
            model = streaming.load_streamed(directory, dtype)
        else:
            model = self._load(directory)
            round_weights(model, dtype)
        apply_to_model(model, self._change, dtype, streamed)
        return model

    def _directory(self) -> Path:
        """The model's directory, or one that is made of it with a changed config or other weights."""
        source, quantized = self._subject.model_dir, self._subject.quantized_dir
        readings = self._change.dequantize if quantized is not None else []
        if not (self._change.changes_config or readings):
            return source
        if self._scratch is not None:
            return Path(self._scratch.name)
        self._scratch = TemporaryDirectory(prefix="parity-counterfactual-")
        changed = Path(self._scratch.name)
        if quantized is not None and readings:
            write_plain(quantized, changed, readings)
        else:
            for path in source.iterdir():
                if path.name != "config.json":
                    (changed / path.name).symlink_to(path.resolve())
        config = self._change.changed_config(read_config(source))
        (changed / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return changed

    def drawn(self) -> dict[str, np.ndarray]:
        """The random tensors of the case's edits and feedback, float32.

        :raises ModelError: transformers cannot run the model.
        """
        return self._or_refused(lambda: interventions.drawn_tensors(self._subject, self.model))

    def truth(self, mode: Mode, given: Given, samples: int = SAMPLES) -> Truth:
        """The truth of a mode.

        :param given: for ``forced``, the tensors that replace the residual stream; for ``free``, the tensors of the
            edits and feedback, and for a counterfactual also the inputs of the logit lens and of the SAE alone.
        :param samples: of the noise; 0 for a noise of 0.
        :raises OracleError: an operation without a noise rule, or a truth that is not finite.
        :raises ModelError: transformers cannot run the model.
        """
        return self._or_refused(lambda: self._truth(mode, given, samples))

    def _or_refused(self, compute: Callable[[], R]) -> R:
        """:raises ModelError: the computation failed, and transformers alone cannot run the model either."""
        try:
            return compute()
        except ParityError:
            raise
        except Exception:
            require_runs(self._directory(), self._subject.tokens)  # otherwise it is a bug here
            raise

    def _truth(self, mode: Mode, given: Given, samples: int) -> Truth:
        changes: Edits
        recurrence = None
        chains: list[Then] = []
        sae: SaeChain | None = None
        if mode == "forced":
            changes = {name: [replacing(torch.from_numpy(array).double())] for name, array in given.items()}
        else:
            drawn = {key: torch.from_numpy(array).double() for key, array in given.items()}
            changes = interventions.edits_of(self._subject, drawn, self._change)
            recurrence = recurrence_of(self._subject, drawn, self._change)
            chains.append(Lens(self._subject, self.model, given))
            if self._subject.sae_file is not None:
                sae = SaeChain(self._subject, given, self._change)
                chains.append(sae)

        def then(captured: Captured) -> Captured:
            return {name: tensor for chain in chains for name, tensor in chain(captured).items()}

        tokens = torch.tensor(self._subject.tokens)
        seed = int(self._subject.digest[:16], 16)
        run = partial(forward, variants=frozenset(self._change.variants), recurrence=recurrence)
        recorder, values, squares = sample(
            self.model, tokens, seed, then, changes, self._arithmetic, samples=samples, run=run
        )
        if self._subject.model_type in RECURRENT:
            squares = {name: square * alike(self._subject.tokens) for name, square in squares.items()}
        streamed = streaming.is_streamed(self._subject.model_dir)
        meta = {"mode": mode, "weights": "streamed" if streamed else "whole"}
        truth = _as_truth(self._subject, meta, recorder, values, squares, sae)
        if mode == "free":
            truth = replace(truth, tensors=self._weights() | dict(truth.tensors))
        inner = self._inner_values(tokens, changes, run)
        return replace(
            truth,
            ignored=ignored_tensors(self.model),
            constant=remarks.constant(truth.tensors),
            beyond=remarks.beyond(truth.tensors, inner, self._subject.case.dtype),
        )

    def _weights(self) -> dict[str, TruthTensor]:
        """The weights that the checkpoint stores quantised, exact, [1, out, in]."""
        if not self._subject.quantized:
            return {}
        stored = load_file(self._directory() / "model.safetensors")
        weights = {name: stored[name][None].astype(np.float64) for name in self._subject.quantized}
        return {f"{WEIGHTS}{name}": TruthTensor(value, np.zeros_like(value)) for name, value in weights.items()}

    def _inner_values(self, tokens: torch.Tensor, changes: Edits, run: Run) -> dict[str, float]:
        """See :func:`remarks.inner_values`; only float16 has a range that is reached."""
        if self._subject.case.dtype != "float16":
            return {}
        with remarks.inner_values(self.model) as largest, Float64():  # type: ignore[no-untyped-call]
            run(self.model, tokens, changes)
        return largest


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a float64 model's weights in place to the format that a candidate is given.

    :raises OutOfRangeError: a weight is beyond the format's range.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(in_format(name, parameter, dtype))


def sample(
    model: nn.Module,
    tokens: torch.Tensor,
    seed: int,
    then: Then,
    edits: Edits,
    arithmetic: Arithmetic = CPU_FLOAT32,
    samples: int = SAMPLES,
    run: Run = forward,
    batch: int = 160,
) -> tuple[Recorder, Captured, Captured]:
    """The truth pass, and ``samples`` passes of Monte-Carlo arithmetic around it.

    :param tokens: int64 [B, T].
    :param then: computes more from the captured tensors in the same mode; called first for the truth.
    :param edits: see :class:`hooks.Recorder`.
    :param run: one recorded forward pass, as :func:`hooks.forward`.
    :param batch: limit of rows × tokens in a pass of samples; 1 for one sample a pass.
    :returns: the truth's recorder, its tensors with those of ``then``, and the mean square of sample − truth of each,
        all float64.
    """
    scales = MatmulScales()
    with Truth64(scales) if samples else Float64():  # type: ignore[no-untyped-call]
        recorder = run(model, tokens, edits)
        values = recorder.tensors | then(recorder.tensors)
    squares = {name: torch.zeros_like(value) for name, value in values.items()}
    pool = NoisePool(seed)
    done = 0
    while done < samples:
        # Samples as batch rows are faster only while a pass is small (rows × tokens near 160).
        rows = max(1, min(samples - done, batch // tokens.numel()))
        with RoundingNoise(pool, scales, arithmetic):
            captured = run(model, tokens.repeat(rows, 1), edits).tensors
            captured = captured | then(captured)
        for name, value in values.items():
            squares[name] += (captured[name].reshape(rows, *value.shape) - value).square_().sum(0)
        done += rows
    squares = {name: total.div_(max(samples, 1)) for name, total in squares.items()}
    for name in [name for name in values if name.endswith(SIGNED)]:
        signed, square, clipped = values.pop(name), squares.pop(name), name.removesuffix(SIGNED)
        near_zero = signed.square() < square * ELEMENT_GATE**2
        squares[clipped] = torch.where(near_zero, square, squares[clipped])
    return recorder, values, squares


def _as_truth(
    subject: PreparedCase,
    meta: dict[str, str],
    recorder: Recorder,
    values: Captured,
    squares: Captured,
    chain: SaeChain | None,
) -> Truth:
    """:param meta: entries besides the digests of the subject."""
    tensors, scalars = {}, {}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all() and torch.isfinite(squares[name]).all()):
            raise OracleError(f"{subject.case.id}: the truth's {name} holds NaN or Inf in float64")
        noise = squares[name].sqrt()
        if name.endswith(("reconstruction_mse", "_last_norm")):
            scalars[name] = (float(value), float(noise))
            continue
        attention = name.endswith(("hook_scores", "hook_pattern"))
        allowed = _allowed(recorder, name).numpy() if attention else None
        tensors[name] = TruthTensor(value.numpy(), noise.numpy(), allowed)
    pre = {name: tensors.pop(f"{name}.pre") for name in ("sae", "sae_on_truth") if chain}
    hook = {"sae": str(subject.sae_digest), "sae_hook": subject.case.sae.hook} if chain and subject.case.sae else {}
    return Truth(
        tokens=subject.tokens,
        tensors=_execution_order(subject, tensors, forced=meta["mode"] == "forced"),
        sae={name: chain.truth(name, pre[name], values) for name in pre if chain},
        scalars=scalars,
        meta={
            "case": subject.digest,
            "model": subject.model_digest,
            "dtype": subject.case.dtype,
            "samples": str(SAMPLES),
            **hook,
            **meta,
        },
    )


def _allowed(recorder: Recorder, name: str) -> torch.Tensor:
    """The compared entries of scores, [T, T], or of a pattern, [T, T] or [H, T, T], whose other entries must be 0."""
    layer = int(name.split(".")[1])
    allowed = recorder.allowed[layer]
    return recorder.attended.get(layer, allowed) if name.endswith("hook_pattern") else allowed


def _execution_order(subject: PreparedCase, tensors: dict[str, TruthTensor], forced: bool) -> dict[str, TruthTensor]:
    """Hooks in candle-mi's order, then logits, the lens and the SAE.

    Teacher-forced, ``hook_resid_pre`` is the output of the layer before, which is compared under its own name.
    """
    names = [*subject.captures, "logits"]
    names += [name for name in tensors if name.startswith(("lens", "sae"))]
    if missing := [name for name in names if name not in tensors]:
        raise OracleError(f"{subject.case.id}: transformers never reached {', '.join(missing[:3])}")
    return {name: tensors[name] for name in names if not (forced and name.endswith("hook_resid_pre"))}
