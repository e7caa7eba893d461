"""Judging an SAE's output: a feature is a decision, so it may flip only where its margin is inside the gate."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from candle_mi_parity.compare.gate import ELEMENT_GATE, TINY, UNIT, measure
from candle_mi_parity.compare.tensor_result import judged, malformed, nonfinite, selected
from candle_mi_parity.compare.verdict import Status, TensorResult, Worst
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.trace.trace import Emitted, Selection
from candle_mi_parity.trace.truth import SaeTruth, Truth, TruthTensor


@dataclass(frozen=True)
class Decisions:
    """The truth's decision on each feature, and its margin. All arrays are [B, T, d_sae].

    :ivar active: whether it fires.
    :ivar margin: ``|pre − θ|``. For TopK, θ of a kept feature is the largest value that is not kept, and θ of any
        other feature is the smallest kept value, at least 0.
    :ivar sigma: noise of the pre-activation.
    :ivar doubt: noise of the margin: TopK's θ is the value of another feature, with its own noise.
    :ivar paired: whether θ is the value of another feature, so that one can fire only instead of the other.
    """

    active: np.ndarray
    margin: np.ndarray
    sigma: np.ndarray
    doubt: np.ndarray
    paired: np.ndarray

    @property
    def turns(self) -> np.ndarray:
        """Where rounding may change the decision."""
        return np.asarray(self.margin < ELEMENT_GATE * self.doubt)

    def part(self, part: Selection | None) -> Decisions:
        return self if part is None else Decisions(*(selected(getattr(self, f.name), part) for f in fields(self)))


def decisions(sae: SaeTruth) -> Decisions:
    """The truth's decisions on all features."""
    pre = sae.pre.value
    sigma = measure(np.zeros_like(pre), pre, sae.pre.noise).sigma
    if not sae.k:
        return Decisions(pre > sae.threshold, np.abs(pre - sae.threshold), sigma, sigma, np.zeros(pre.shape, bool))
    # Of equal values the oracle keeps the first.
    order = np.argsort(-pre, axis=-1, kind="stable")
    width = pre.shape[-1]
    k = np.full((*pre.shape[:-1], 1), min(sae.k, width))
    if not sae.relu and sae.k < width:
        kth = np.take_along_axis(pre, np.take_along_axis(order, k - 1, -1), -1)
        ties, above = (pre == kth).sum(-1, keepdims=True), (pre >= kth).sum(-1, keepdims=True)
        k = np.where(kth < 0, above - np.minimum(ties, width - sae.k), k)  # see torch_sae
    kept = np.zeros(pre.shape, bool)
    np.put_along_axis(kept, order, np.arange(width) < k, -1)
    least = np.take_along_axis(order, np.maximum(k - 1, 0), -1)
    left = np.take_along_axis(order, np.minimum(k, width - 1), -1)
    # If all features are kept, none competes.
    whole = k >= width
    rival = np.where(kept & ~whole, left, least)
    theta, noise = np.take_along_axis(pre, rival, -1), np.take_along_axis(sigma, rival, -1)
    if not sae.relu:
        lonely = kept & whole
        return Decisions(kept, np.where(lonely, np.inf, np.abs(pre - theta)), sigma, sigma + noise, ~lonely)
    at_zero = (theta <= 0) | (kept & whole)
    theta, noise = np.where(at_zero, 0.0, theta), np.where(at_zero, 0.0, noise)
    return Decisions(kept & (pre > 0), np.abs(pre - theta), sigma, sigma + noise, ~at_zero)


@dataclass(frozen=True)
class Flips:
    """Features that are active on one side only.

    :ivar excused: boolean [B, T, d_sae], where the margin is less than 32 times its noise; for TopK also only if the
        number of kept features is the same.
    :ivar active: the candidate's active set, same shape.
    """

    excused: np.ndarray
    unexcused: np.ndarray
    active: np.ndarray
    truth: Decisions

    @property
    def ratio(self) -> np.ndarray:
        """Margin over its noise, [B, T, d_sae]."""
        return np.asarray(self.truth.margin / self.truth.doubt)

    def describe(self) -> str:
        if not (self.excused.any() or self.unexcused.any()):
            return f"no feature flipped; {int(self.active[:, -1].sum())} active at the last position"
        flipped = self.excused | self.unexcused
        worst = np.unravel_index(np.argmax(np.where(flipped, self.ratio, -1)), flipped.shape)
        ties = int((flipped & (self.truth.margin == 0)).sum())
        return (
            f"{int(flipped.sum())} features flipped, {int(self.excused.sum())} with |pre − θ| < 32σ"
            + (f", {ties} of them exact ties" if ties else "")
            + f"; largest margin {self.truth.margin[worst]:.3g} = {self.ratio[worst]:.3g}σ"
            + f" at {[int(i) for i in worst]}"
            + f"; active at the last position: got {int(self.active[:, -1].sum())},"
            f" expected {int(self.truth.active[:, -1].sum())}"
        )


def flips(truth: Decisions, features: np.ndarray) -> Flips:
    """The features that are active on one side only, and whether rounding explains it.

    :param features: the candidate's, float64 [B, T, d_sae].
    """
    active = features != 0
    differ = active != truth.active
    swapped = differ & truth.paired
    # A tie excuses which of two features fires, not that both do or neither.
    balance = np.where(active, 1, -1) * swapped
    excused = differ & truth.turns & ~(truth.paired & (balance.sum(-1, keepdims=True) != 0))
    return Flips(excused, differ & ~excused, active, truth)


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
    sae = truth.sae[chain]
    if kind == "features":
        pre = TruthTensor(selected(sae.pre.value, entry.part), selected(sae.pre.noise, entry.part))
        return _judge_features(name, pre, decisions(sae).part(entry.part), got, agreed)
    noise = selected(expected.noise, entry.part).astype(np.float64)
    if not _whole_features(trace, chain):
        result = judged(name, measure(got - value, value, noise), got, value, None, agreed)
        return _unless_doubtful(result, sae, -1)
    value, noise, detail = _with_excused(sae, trace, f"{chain}.features", decoder, value, noise)
    return judged(name, measure(got - value, value, noise), got, value, None, agreed, detail)


def _whole_features(trace: Emitted, chain: str) -> bool:
    """Whether the trace holds all features of the compared positions, so that every flip is visible."""
    entry = trace.entries.get(f"{chain}.features")
    return entry is not None and (entry.part is None or entry.part.columns is None)


def _unless_doubtful(result: TensorResult, sae: SaeTruth, position: int | None) -> TensorResult:
    """UNMEASURED for a failure that an invisible flip might explain."""
    turns = decisions(sae).turns
    doubtful = bool((turns if position is None else turns[:, position]).any())
    if result.status is not Status.FAIL or not doubtful:
        return result
    return replace(
        result, status=Status.UNMEASURED, reason="noisy", detail="a feature that weighs in it may have flipped"
    )


def _judge_features(
    name: str, pre: TruthTensor, truth: Decisions, got: np.ndarray, agreed: bool | None
) -> TensorResult:
    found = flips(truth, got)
    # The value is compared where both fire, and where only the candidate fires within the gate.
    compared = found.active & (truth.active | found.excused)
    expected = np.where(compared, pre.value, 0.0)
    measured = measure(got - pre.value, pre.value, pre.noise, compared)
    result = judged(name, measured, got, expected, compared, agreed, found.describe())
    # An inactive feature is compared as a decision.
    result = replace(result, compared=got.size, left_out=0)
    if not found.unexcused.any():
        return result
    ratio = np.where(found.unexcused, found.ratio, -1.0)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(ratio), ratio.shape))
    truth_value = float(pre.value[index]) if truth.active[index] else 0.0
    worst = Worst.of(list(index), float(got[index]), truth_value, float(truth.doubt[index]), float(ratio[index]))
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
    """The truth's reconstruction after the candidate's excused flips, its noise, and a remark.

    Decisions that rounding may change are taken from the candidate; all values are the truth's.
    """
    entry = trace.entries.get(features)
    if entry is None or decoder is None:
        return recon, noise, ""
    got = trace.tensor(features).astype(np.float64)
    pre, scale = selected(sae.pre.value, entry.part), sae.scale
    if entry.part is not None:
        scale = scale[..., entry.part.rows, :]
    if got.shape != pre.shape:
        return recon, noise, ""
    found = flips(decisions(sae).part(entry.part), got)
    if not found.excused.any():
        return recon, noise, ""
    sign = np.where(found.active, 1.0, -1.0) * found.excused
    recon = recon + ((sign * pre) @ decoder) * scale
    noise = np.sqrt(noise**2 + ((found.excused * found.truth.sigma**2) @ decoder**2) * scale**2)
    return recon, noise, f"{int(found.excused.sum())} excused flips granted to the reconstruction"


def attribute_sae_failures(results: list[TensorResult]) -> list[TensorResult]:
    """Say for each failure of an SAE whether the SAE also fails on the truth's residual."""
    alone = {r.name.removeprefix("sae_on_truth."): r.status for r in results if r.name.startswith("sae_on_truth.")}

    def attributed(result: TensorResult) -> TensorResult:
        twin = alone.get(result.name.removeprefix("sae."))
        if not result.name.startswith("sae.") or result.status is not Status.FAIL or twin is None:
            return result
        fault = (
            "the SAE alone, fed the truth's residual, agrees: the model is at fault"
            if twin is Status.PASS
            else "the SAE alone, fed the truth's residual, fails too"
        )
        return replace(result, detail=f"{result.detail}; {fault}" if result.detail else fault)

    return [attributed(result) for result in results]


def judge_sae_scalars(
    truth: Truth, trace: Emitted, decoder: np.ndarray | None, chains: list[str]
) -> list[TensorResult]:
    """MSE with its propagated noise; for ``sae`` also the last position's count, norms and top features.

    :param chains: those of ``sae`` and ``sae_on_truth`` that the trace must hold.
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


def _last_position(truth: Truth, trace: Emitted) -> list[TensorResult]:
    sae = truth.sae["sae"]
    decided = decisions(sae)
    pre = sae.pre.value[0, -1]
    # Where a negative threshold is kept, a feature that fires may have either sign.
    either_sign = decided.active[0, -1] & (np.abs(pre) < ELEMENT_GATE * decided.sigma[0, -1])
    doubtful = int((decided.turns[0, -1] | either_sign).sum())
    active = int((decided.active[0, -1] & (pre > 0)).sum())
    results = [_judge_count("sae.n_active_last_pos", active, doubtful, trace), _judge_top(truth, trace)]
    for name in ("sae.encoded_last_norm", "sae.decoded_last_norm", "sae.resid_last_norm"):
        result = _judge_scalar(name, *truth.scalars[name], trace)
        results.append(result if name == "sae.resid_last_norm" else _unless_doubtful(result, sae, -1))
    return results


def _judge_top(truth: Truth, trace: Emitted) -> TensorResult:
    """The strongest features of the last position: their values, and that no clearly stronger one is missing."""
    name = "sae.top_features_last_pos"
    decided = decisions(truth.sae["sae"])
    sigma, turns = decided.sigma[0, -1], decided.turns[0, -1]
    expected = truth.tensors["sae.features"].value[0, -1]
    value = truth.sae["sae"].pre.value[0, -1]
    found = {feature.index: feature.value for feature in trace.top_features}
    active = int(np.count_nonzero(expected))

    def result(problem: str) -> TensorResult:
        status = Status.FAIL if problem else Status.PASS
        detail = problem or f"top {len(found)} of {active} active features agree"
        return TensorResult(name, status, "values" if problem else "", compared=len(found), detail=detail)

    if len(found) != len(trace.top_features) or any(index >= len(value) for index in found):
        indices = one_line(str([feature.index for feature in trace.top_features]))
        return result(f"indices {indices} are not distinct features")
    if not found and active:
        return TensorResult(name, Status.FAIL, "missing", detail=f"no feature listed, {active} are active")
    for index, got in found.items():
        if not abs(got - value[index]) < ELEMENT_GATE * sigma[index]:
            return result(f"feature {index}: got {got:.9g}, expected {value[index]:.9g}, noise {sigma[index]:.3g}")
    if not found:
        return result("")
    weakest = min(found, key=lambda index: value[index])
    # A feature that rounding may switch off need not be listed.
    left = [int(i) for i in np.flatnonzero((expected != 0) & ~turns) if int(i) not in found]
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
