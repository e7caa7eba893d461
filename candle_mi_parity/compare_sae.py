"""Judging an SAE's output: a feature is a decision, so it may flip only where its margin is inside the gate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from candle_mi_parity.gate import ELEMENT_GATE, TINY, UNIT, measure
from candle_mi_parity.judge import judged, malformed, nonfinite, selected
from candle_mi_parity.trace import Emitted
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


def judge_sae(
    name: str, truth: Truth, trace: Emitted, decoder: np.ndarray | None, agreed: bool | None
) -> TensorResult:
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
        sae = part_of(truth.sae[chain], trace, name)
        return _judge_features(name, sae, got, agreed)
    noise = selected(expected.noise, entry.part).astype(np.float64)
    if not _whole_features(trace, chain):
        result = judged(name, measure(got - value, value, noise), got, value, None, agreed)
        return _unless_doubtful(result, truth.sae[chain], -1)
    value, noise, detail = _with_excused(truth.sae[chain], trace, f"{chain}.features", decoder, value, noise)
    return judged(name, measure(got - value, value, noise), got, value, None, agreed, detail)


def _whole_features(trace: Emitted, chain: str) -> bool:
    """Whether all features of the compared positions are there, so that a flip can be seen and granted."""
    entry = trace.entries.get(f"{chain}.features")
    return entry is not None and (entry.part is None or entry.part.columns is None)


def _unless_doubtful(result: TensorResult, sae: SaeTruth, position: int | None) -> TensorResult:
    """A failure that a flip nobody can see might explain is not measured; a pass stays a pass."""
    ratio = _margin_ratio(sae)
    doubtful = bool(((ratio if position is None else ratio[:, position]) < ELEMENT_GATE).any())
    if result.status is not Status.FAIL or not doubtful:
        return result
    return replace(
        result, status=Status.UNMEASURED, reason="noisy", detail="a feature that weighs in it may have flipped"
    )


def part_of(sae: SaeTruth, trace: Emitted, name: str) -> SaeTruth:
    """The truth at the entries of a features tensor that a stored trace kept."""
    part = trace.entries[name].part
    if part is None:
        return sae
    pre = type(sae.pre)(selected(sae.pre.value, part), selected(sae.pre.noise, part))
    threshold = sae.threshold if part.columns is None else sae.threshold[part.columns]
    return SaeTruth(pre, threshold, sae.residual[..., part.rows, :])


def _judge_features(name: str, sae: SaeTruth, got: np.ndarray, agreed: bool | None) -> TensorResult:
    found = flips(sae, got)
    both = found.active & (sae.pre.value > sae.threshold)
    # Where both fire, the value counts; where the candidate alone does, its value still has to be pre.
    compared = both | (found.active & found.excused)
    expected = np.where(compared, sae.pre.value, 0.0)
    measured = measure(got - sae.pre.value, sae.pre.value, sae.pre.noise, compared)
    result = judged(name, measured, got, expected, compared, agreed, found.describe())
    # An inactive feature is compared too: as a decision.
    result = replace(result, compared=got.size, left_out=0)
    if not found.unexcused.any():
        return result
    ratio = np.where(found.unexcused, found.margin / found.sigma, -1.0)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(ratio), ratio.shape))
    truth_value = float(sae.pre.value[index]) if sae.pre.value[index] > sae.threshold[index[-1]] else 0.0
    worst = Worst.of(list(index), float(got[index]), truth_value, float(found.sigma[index]), float(ratio[index]))
    past = result.past + int(found.unexcused.sum())
    return replace(
        result, status=Status.FAIL, reason="flips", element_ratio=float(ratio.max()), past=past, worst=worst
    )


def _with_excused(
    sae: SaeTruth,
    trace: Emitted,
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
    sae = part_of(sae, trace, features)
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


def judge_sae_scalars(
    truth: Truth, trace: Emitted, decoder: np.ndarray | None, chains: list[str]
) -> list[TensorResult]:
    """MSE with its propagated noise; for ``sae`` the last position's count, norms and top features too.

    :param chains: those of ``sae`` and ``sae_on_truth`` that the trace is to hold.
    """
    results = []
    for chain in chains:
        name = f"{chain}.reconstruction_mse"
        value, noise = truth.scalars[name]
        entry = trace.entries.get(f"{chain}.features")
        sae = truth.sae[chain]
        if entry is None or entry.part is not None:
            results.append(_unless_doubtful(_judge_scalar(name, value, noise, trace), sae, None))
            continue
        recon = truth.tensors[f"{chain}.recon"].value
        recon, _, granted = _with_excused(sae, trace, entry.name, decoder, recon, np.zeros(()))
        if granted:
            value = float(np.square(sae.residual - recon).mean())
        results.append(_judge_scalar(name, value, noise, trace))
    return results + (_last_position(truth, trace) if "sae" in chains else [])


def _margin_ratio(sae: SaeTruth) -> np.ndarray:
    """``|pre − θ|/σ`` of every feature, [B, T, d_sae]."""
    sigma = measure(np.zeros_like(sae.pre.value), sae.pre.value, sae.pre.noise).sigma
    return np.asarray(np.abs(sae.pre.value - sae.threshold) / sigma)


def _last_position(truth: Truth, trace: Emitted) -> list[TensorResult]:
    sae = truth.sae["sae"]
    last: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "sae.encoded_last_norm": (truth.tensors["sae.features"].value, truth.tensors["sae.features"].noise),
        "sae.decoded_last_norm": (truth.tensors["sae.recon"].value, truth.tensors["sae.recon"].noise),
        "sae.resid_last_norm": (sae.residual, truth.tensors[truth.meta["sae_hook"]].noise),
    }
    doubtful = int((_margin_ratio(sae)[0, -1] < ELEMENT_GATE).sum())
    active = int((sae.pre.value > sae.threshold)[0, -1].sum())
    results = [_judge_count("sae.n_active_last_pos", active, doubtful, trace), _judge_top(truth, trace)]
    for name, (value, noise) in last.items():
        # The error of a norm is the error along one unit vector: an average over the elements.
        size = float(np.sqrt(np.square(noise[0, -1], dtype=np.float64).mean()))
        result = _judge_scalar(name, float(np.linalg.norm(value[0, -1])), size, trace)
        results.append(result if name == "sae.resid_last_norm" else _unless_doubtful(result, sae, -1))
    return results


def _judge_top(truth: Truth, trace: Emitted) -> TensorResult:
    """The strongest features of the last position: right values, none missing that is clearly stronger."""
    name = "sae.top_features_last_pos"
    pre = truth.sae["sae"].pre
    sigma = measure(np.zeros_like(pre.value), pre.value, pre.noise).sigma[0, -1]
    expected = truth.tensors["sae.features"].value[0, -1]
    value = pre.value[0, -1]
    found = {feature.index: feature.value for feature in trace.top_features}
    active = int(np.count_nonzero(expected))

    def result(problem: str) -> TensorResult:
        status = Status.FAIL if problem else Status.PASS
        detail = problem or f"top {len(found)} of {active} active features agree"
        return TensorResult(name, status, "values" if problem else "", compared=len(found), detail=detail)

    if len(found) != len(trace.top_features) or any(index >= len(value) for index in found):
        return result(f"indices {[feature.index for feature in trace.top_features]} are not distinct features")
    if not found and active:
        return TensorResult(name, Status.FAIL, "missing", detail=f"no feature listed, {active} are active")
    for index, got in found.items():
        if not abs(got - value[index]) < ELEMENT_GATE * sigma[index]:
            return result(f"feature {index}: got {got:.9g}, expected {value[index]:.9g}, noise {sigma[index]:.3g}")
    if not found:
        return result("")
    weakest = min(found, key=lambda index: value[index])
    # A feature that rounding may turn off need not be listed, however strong it is when on.
    certain = np.abs(value - truth.sae["sae"].threshold) >= ELEMENT_GATE * sigma
    left = [int(i) for i in np.flatnonzero((expected != 0) & certain) if int(i) not in found]
    tie = ELEMENT_GATE * (sigma + sigma[weakest])
    stronger = [index for index in left if value[index] - value[weakest] >= tie[index]]
    return result(f"feature {stronger[0]} is stronger than {weakest} and not listed" if stronger else "")


def _judge_count(name: str, active: int, doubtful: int, trace: Emitted) -> TensorResult:
    got = trace.scalars.get(name)
    if got is None:
        return TensorResult(name, Status.FAIL, "missing", detail="the trace has no such scalar")
    fine = abs(got - active) <= doubtful
    detail = f"got {got:g}, expected {active}" + (f" ± {doubtful} with |pre − θ| < 32σ" if doubtful else "")
    return TensorResult(
        name, Status.PASS if fine else Status.FAIL, "" if fine else "values", compared=1, detail=detail
    )


def _judge_scalar(name: str, value: float, noise: float, trace: Emitted) -> TensorResult:
    got = trace.scalars.get(name)
    if got is None:
        return TensorResult(name, Status.FAIL, "missing", detail="the trace has no such scalar")
    sigma = noise + (UNIT / 4) * abs(value) + TINY
    ratio = abs(got - value) / sigma if got != value else 0.0
    fine = ratio < ELEMENT_GATE
    status, reason = (Status.PASS, "") if fine else (Status.FAIL, "values")
    worst = Worst.of([], got, value, sigma, ratio)
    return TensorResult(name, status, reason, element_ratio=ratio, compared=1, past=int(not fine), worst=worst)
