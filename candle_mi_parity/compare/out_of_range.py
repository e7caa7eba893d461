"""Values beyond the range of the candidate's own format: they, and what is computed from them, are UNMEASURED.

The largest float16 is 65,504. If the truth is larger, any candidate in that format gets Inf or NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.trace.truth import Truth

OUT_OF_RANGE = "range"
"""The reason of such a result."""

_STRUCTURAL = ("missing", "unexpected", "shape", "dtype")


def excuse_out_of_range(
    results: list[TensorResult], truth: Truth, dtype: str, feeders: Callable[[str], list[str]]
) -> list[TensorResult]:
    """Make failures UNMEASURED if the truth of the tensor, or of one that it is computed from, is beyond the format.

    Tensors computed from one that passes are judged again.

    :param feeders: tensor → tensors that it is computed from.
    """
    if not truth.beyond:
        return results
    judged = {result.name: result for result in results}
    origins: dict[str, str] = {}
    for name in truth.tensors:
        given = name.removeprefix("lens.")  # the logit lens is given the truth's own residual
        far = next((tensor for tensor in (name, given) if tensor in truth.beyond), "")
        origin = far or next((origins[feeder] for feeder in feeders(name) if feeder in origins), "")
        result = judged.get(name)
        fails = result is None or (result.status is Status.FAIL and result.reason not in _STRUCTURAL)
        if origin and fails:
            origins[name] = origin
    return [_excused(result, truth, dtype, _origin(result, truth, origins)) for result in results]


def _origin(result: TensorResult, truth: Truth, origins: dict[str, str]) -> str:
    """The tensor beyond the range that a tensor, scalar or decision is computed from; empty if there is none."""
    if result.name in truth.tensors:
        return origins.get(result.name, "")
    chain = result.name.partition(".")[0]
    made_from = {"logits": ["logits"], "sae": ["sae.recon", "sae.features", truth.meta.get("sae_hook", "")]}
    return next((origins[name] for name in made_from.get(chain, []) if name in origins), "")


def _excused(result: TensorResult, truth: Truth, dtype: str, origin: str) -> TensorResult:
    if not origin or result.status is not Status.FAIL or result.reason == "unexpected":
        return result
    detail = f"the truth's largest value {truth.beyond[origin]:.2g} is beyond {dtype}'s range"
    detail += f" at {origin}, which this is computed from" if origin != result.name else ""
    return replace(result, status=Status.UNMEASURED, reason=OUT_OF_RANGE, detail=detail, compared=0)
