"""Judging an SAE's output: a feature is a decision, so it may flip only where its margin is inside the gate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from candle_mi_parity.gate import ELEMENT_GATE, TINY, UNIT, measure
from candle_mi_parity.judge import judged, malformed, nonfinite, selected
from candle_mi_parity.trace import Trace
from candle_mi_parity.truth import SaeTruth, Truth
from candle_mi_parity.verdict import Status, TensorResult, Worst


@dataclass(frozen=True)
class Flips:
    """Features that are active on one side only.

    :ivar excused: boolean [B, T, d_sae], where ``|pre − θ| < 32·σ``.
    :ivar active: the candidate's active set, same shape.
    """

    excused: np.ndarray
    unexcused: np.ndarray
    active: np.ndarray
    margin: np.ndarray
    sigma: np.ndarray

    def describe(self) -> str:
        if not (self.excused.any() or self.unexcused.any()):
            return f"no feature flipped; {int(self.active[:, -1].sum())} active at the last position"
        flipped = self.excused | self.unexcused
        worst = np.unravel_index(np.argmax(np.where(flipped, self.margin / self.sigma, -1)), flipped.shape)
        return (
            f"{int(flipped.sum())} features flipped, {int(self.excused.sum())} with |pre − θ| < 32σ; largest margin "
            f"{self.margin[worst]:.3g} = {self.margin[worst] / self.sigma[worst]:.3g}σ at {[int(i) for i in worst]}"
        )


def flips(sae: SaeTruth, features: np.ndarray) -> Flips:
    """Which features differ in being active, and whether rounding explains it.

    :param features: the candidate's, float64 [B, T, d_sae].
    """
    sigma = measure(np.zeros_like(features), sae.pre.value, sae.pre.noise).sigma
    margin = np.abs(sae.pre.value - sae.threshold)
    active = features != 0
    differ = active != (sae.pre.value > sae.threshold)
    inside = margin < ELEMENT_GATE * sigma
    return Flips(differ & inside, differ & ~inside, active, margin, sigma)


def judge_sae(name: str, truth: Truth, trace: Trace, decoder: np.ndarray | None, agreed: bool | None) -> TensorResult:
    """``sae.features``, ``sae.recon`` and their ``sae_on_truth`` twins.

    :raises TraceError: a tensor whose bytes are not what the trace declares.
    """
    entry, expected = trace.entries[name], truth.tensors[name]
    if broken := malformed(entry, expected.value.shape, "float32", agreed):
        return broken
    got = trace.tensor(name).astype(np.float64)
    value = selected(expected.value, entry.part)
    if broken := nonfinite(name, got, value, agreed):
        return broken
    chain, kind = name.split(".")
    if kind == "features":
        sae = _part_of(truth.sae[chain], trace, name)
        return _judge_features(name, sae, got, agreed)
    noise = selected(expected.noise, entry.part).astype(np.float64)
    value, noise, detail = _with_excused(truth.sae[chain], trace, f"{chain}.features", decoder, value, noise)
    return judged(name, measure(got - value, value, noise), got, value, None, agreed, detail)


def _part_of(sae: SaeTruth, trace: Trace, name: str) -> SaeTruth:
    part = trace.entries[name].part
    if part is None:
        return sae
    pre = type(sae.pre)(selected(sae.pre.value, part), selected(sae.pre.noise, part))
    return SaeTruth(pre, sae.threshold, sae.residual[..., part.rows, :])


def _judge_features(name: str, sae: SaeTruth, got: np.ndarray, agreed: bool | None) -> TensorResult:
    found = flips(sae, got)
    both = found.active & (sae.pre.value > sae.threshold)
    # Where both fire, the value counts; where the candidate alone does, its value still has to be pre.
    compared = both | (found.active & found.excused)
    expected = np.where(compared, sae.pre.value, 0.0)
    measured = measure(got - sae.pre.value, sae.pre.value, sae.pre.noise, compared)
    result = judged(name, measured, got, expected, compared, agreed, found.describe())
    if not found.unexcused.any():
        return result
    ratio = np.where(found.unexcused, found.margin / found.sigma, -1.0)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(ratio), ratio.shape))
    truth_value = float(sae.pre.value[index]) if sae.pre.value[index] > sae.threshold[index[-1]] else 0.0
    worst = Worst.of(list(index), float(got[index]), truth_value, float(found.sigma[index]), float(ratio[index]))
    return TensorResult(
        name, Status.FAIL, "flips", result.position_ratio, float(ratio.max()), result.rms_ratio, result.compared,
        result.left_out, result.past + int(found.unexcused.sum()), inputs_agreed=agreed, worst=worst,
        detail=found.describe(),
    )  # fmt: skip


def _with_excused(
    sae: SaeTruth,
    trace: Trace,
    features: str,
    decoder: np.ndarray | None,
    recon: np.ndarray,
    noise: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, str]:
    """The truth's reconstruction once the candidate's excused flips are granted, and its noise.

    The decisions that rounding may turn are taken from the candidate; every number stays the truth's.
    """
    if features not in trace.entries or decoder is None:
        return recon, noise, ""
    sae = _part_of(sae, trace, features)
    got = trace.tensor(features).astype(np.float64)
    if got.shape != sae.pre.value.shape:
        return recon, noise, ""
    found = flips(sae, got)
    if not found.excused.any():
        return recon, noise, ""
    sign = np.where(found.active, 1.0, -1.0) * found.excused
    W_dec = decoder.astype(np.float64)
    recon = recon + (sign * sae.pre.value) @ W_dec
    noise = np.sqrt(noise**2 + (found.excused * found.sigma**2) @ W_dec**2)
    return recon, noise, f"{int(found.excused.sum())} excused flips granted to the reconstruction"


def judge_sae_scalars(truth: Truth, trace: Trace, decoder: np.ndarray | None) -> list[TensorResult]:
    """MSE with its propagated noise, the last position's count and norms, and the top features.

    A stored part has the scalars of the whole; they are compared all the same.
    """
    results = []
    for name, (value, noise) in truth.scalars.items():
        chain = name.split(".")[0]
        entry = trace.entries.get(f"{chain}.features")
        if entry is not None and entry.part is None and f"{chain}.recon" in truth.tensors:
            recon, _, _ = _with_excused(
                truth.sae[chain], trace, f"{chain}.features", decoder, truth.tensors[f"{chain}.recon"].value,
                np.zeros(()),
            )  # fmt: skip
            value = float(np.square(truth.sae[chain].residual - recon).mean())
        # Where the features are not all here, a flip cannot be granted: then the MSE cannot be judged either.
        partial = entry is None or entry.part is not None
        doubtful = partial and bool((_margin_ratio(truth.sae[chain]) < ELEMENT_GATE).any())
        results.append(_judge_scalar(name, value, noise, trace, doubtful))
    if "sae" in truth.sae:
        results += _last_position(truth, trace)
    return results


def _margin_ratio(sae: SaeTruth) -> np.ndarray:
    """``|pre − θ|/σ`` of every feature, [B, T, d_sae]."""
    sigma = measure(np.zeros_like(sae.pre.value), sae.pre.value, sae.pre.noise).sigma
    return np.asarray(np.abs(sae.pre.value - sae.threshold) / sigma)


def _last_position(truth: Truth, trace: Trace) -> list[TensorResult]:
    sae = truth.sae["sae"]
    last: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "sae.encoded_last_norm": (truth.tensors["sae.features"].value, truth.tensors["sae.features"].noise),
        "sae.decoded_last_norm": (truth.tensors["sae.recon"].value, truth.tensors["sae.recon"].noise),
        "sae.resid_last_norm": (sae.residual, truth.tensors[truth.meta["sae_hook"]].noise),
    }
    doubtful = int((_margin_ratio(sae)[0, -1] < ELEMENT_GATE).sum())
    active = int((sae.pre.value > sae.threshold)[0, -1].sum())
    results = [_judge_count("sae.n_active_last_pos", active, doubtful, trace)]
    for name, (value, noise) in last.items():
        # The error of a norm is the error along one unit vector: an average over the elements.
        size = float(np.sqrt(np.square(noise[0, -1], dtype=np.float64).mean()))
        # A feature that may flip moves the norms by as much as it weighs.
        results.append(_judge_scalar(name, float(np.linalg.norm(value[0, -1])), size, trace, doubtful > 0))
    return results


def _judge_count(name: str, active: int, doubtful: int, trace: Trace) -> TensorResult:
    got = trace.document.scalars.get(name)
    if got is None:
        return TensorResult(name, Status.FAIL, "missing", detail="the trace has no such scalar")
    fine = abs(got - active) <= doubtful
    detail = f"got {got:g}, expected {active}" + (f" ± {doubtful} with |pre − θ| < 32σ" if doubtful else "")
    return TensorResult(
        name, Status.PASS if fine else Status.FAIL, "" if fine else "values", compared=1, detail=detail
    )


def _judge_scalar(name: str, value: float, noise: float, trace: Trace, doubtful: bool = False) -> TensorResult:
    got = trace.document.scalars.get(name)
    if got is None:
        return TensorResult(name, Status.FAIL, "missing", detail="the trace has no such scalar")
    sigma = noise + (UNIT / 4) * abs(value) + TINY
    size = abs(got - value)
    ratio = size / sigma if size else 0.0
    fine = ratio < ELEMENT_GATE
    status = Status.PASS if fine else Status.UNMEASURED if doubtful else Status.FAIL
    worst = Worst.of([], got, value, sigma, ratio)
    return TensorResult(
        name, status, "" if fine else "noisy" if doubtful else "values", element_ratio=ratio,
        rms_ratio=0.0, compared=1, past=int(not fine), worst=worst,
        detail="a feature that weighs in it may flip" if doubtful else "",
    )  # fmt: skip
