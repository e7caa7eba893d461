"""Tensors whose error the noise does not bound: they, and what is computed from them, are UNMEASURED if they fail.

- A value beyond the candidate's own format: the largest float16 is 65,504. If the truth is larger, any candidate in
  that format gets Inf or NaN.
- A softmax that rounding decides: where two scores of a row are as near as the gate on scores lets a candidate move
  them, and their noise is near 1 or more, the attention pattern may be at one key or at the other. The samples of the
  noise may all have it at the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from candle_mi_parity.compare.gate import POSITION_GATE
from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.spec.hook_points import place
from candle_mi_parity.trace.truth import Expected, Truth

UNMEASURABLE = "unmeasurable"
"""The reason of such a result."""

_SCORES, _PATTERN = "attn.hook_scores", "attn.hook_pattern"
_STRUCTURAL = ("missing", "unexpected", "shape", "dtype")
_LINEAR = 0.5
"""Up to this noise of two scores, a softmax changes by about probability times noise, as the samples show: scores
that are off by 4 times 0.5 multiply a probability by 7, which is within the gate of 8."""


def excuse_unmeasurable(
    results: list[TensorResult], truth: Truth, dtype: str, feeders: Callable[[str], list[str]]
) -> list[TensorResult]:
    """Make failures UNMEASURED if noise does not bound the error of the tensor, or of one that it is computed from.

    Tensors computed from one that passes are judged again.

    :param feeders: tensor → tensors that it is computed from.
    """
    if all(result.status is not Status.FAIL for result in results):
        return results
    reasons = dict(_decided_by_rounding(results, truth))
    for name, largest in truth.beyond.items():
        reasons[name] = f"the truth's largest value {largest:.2g} is beyond {dtype}'s range"
    if not reasons:
        return results
    judged = {result.name: result for result in results}
    origins: dict[str, str] = {}
    for name in truth.tensors:
        given = name.removeprefix("lens.")  # the logit lens is given the truth's own residual
        own = next((tensor for tensor in (name, given) if tensor in reasons), "")
        origin = own or next((origins[feeder] for feeder in feeders(name) if feeder in origins), "")
        result = judged.get(name)
        fails = result is None or (result.status is Status.FAIL and result.reason not in _STRUCTURAL)
        if origin and fails:
            origins[name] = origin
    return [_excused(result, reasons, _origin(result, truth, origins)) for result in results]


def _decided_by_rounding(results: list[TensorResult], truth: Truth) -> Iterator[tuple[str, str]]:
    """Attention patterns that fail while their scores do not, and whose worst entry is in a row that rounding
    decides."""
    status = {result.name: result.status for result in results}
    for result in results:
        scores = result.name.removesuffix(_PATTERN) + _SCORES
        if not result.name.endswith(_PATTERN) or result.status is not Status.FAIL or result.worst is None:
            continue
        if status.get(scores, Status.FAIL) is Status.FAIL:
            continue
        if tie := _tie(truth.tensors[scores], tuple(result.worst.index[:-1])):
            key, distance, noise = tie
            yield (
                result.name,
                (
                    f"rounding decides the softmax: the score at {place(scores, [*result.worst.index[:-1], key])} is "
                    f"{distance:.2g} below the row's largest, and the noise of the two is {noise:.2g}"
                ),
            )


def _tie(scores: Expected, row: tuple[int, ...]) -> tuple[int, float, float] | None:
    """A key of a row [batch, head, query] that may have its largest score, its distance to the largest and
    the noise of the two.

    Of several keys it is the one whose distance is the fewest times the noise; None if there is none.
    """
    value, noise = scores.value[row], scores.noise[row].astype(np.float64)
    allowed = True if scores.allowed is None else scores.allowed
    keys = np.flatnonzero(np.broadcast_to(allowed, scores.shape)[row])
    value, noise = value[keys], noise[keys]
    first = int(value.argmax())
    distance, both = value[first] - value, noise[first] + noise
    far = np.divide(distance, both, out=np.full(value.size, np.inf), where=both > _LINEAR)
    far[first] = np.inf
    key = int(far.argmin())
    return (int(keys[key]), float(distance[key]), float(both[key])) if far[key] < POSITION_GATE else None


def _origin(result: TensorResult, truth: Truth, origins: dict[str, str]) -> str:
    """The tensor at which a tensor, scalar or decision first cannot be measured; empty if there is none."""
    if result.name in truth.tensors:
        return origins.get(result.name, "")
    chain = result.name.partition(".")[0]
    made_from = {"logits": ["logits"], "sae": ["sae.recon", "sae.features", truth.meta.get("sae_hook", "")]}
    return next((origins[name] for name in made_from.get(chain, []) if name in origins), "")


def _excused(result: TensorResult, reasons: dict[str, str], origin: str) -> TensorResult:
    if not origin or result.status is not Status.FAIL or result.reason == "unexpected":
        return result
    detail = reasons[origin] + (f" at {origin}, which this is computed from" if origin != result.name else "")
    return replace(result, status=Status.UNMEASURED, reason=UNMEASURABLE, detail=detail, compared=0)
