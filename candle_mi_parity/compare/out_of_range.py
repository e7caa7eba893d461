"""Values that the candidate's own format cannot hold: what fails there, or is computed from it, was not measured.

float16 ends at 65,504. Where the truth goes further no candidate of that format can follow, and what comes after
is Inf or NaN through no fault of its own.
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
    """The same results, but UNMEASURED where the truth or something on the way to it is beyond the format.

    A tensor that passes in spite of it ends the excuse: what is computed from it is judged.

    :param feeders: tensor → those that it is computed from.
    """
    if not truth.beyond:
        return results
    judged = {result.name: result for result in results}
    origins: dict[str, str] = {}
    for name in truth.tensors:
        given = name.removeprefix("lens.")  # the logit lens is given the truth's own residual
        far = next((one for one in (name, given) if one in truth.beyond), "")
        origin = far or next((origins[feeder] for feeder in feeders(name) if feeder in origins), "")
        result = judged.get(name)
        fails = result is None or (result.status is Status.FAIL and result.reason not in _STRUCTURAL)
        if origin and fails:
            origins[name] = origin
    return [_excused(result, truth, dtype, _origin(result, truth, origins)) for result in results]


def _origin(result: TensorResult, truth: Truth, origins: dict[str, str]) -> str:
    """Of a number beside the tensors, a scalar or a decision, that of the tensor that it is made from."""
    if result.name in truth.tensors:
        return origins.get(result.name, "")
    chain = result.name.partition(".")[0]
    made_from = {"logits": ["logits"], "sae": ["sae.recon", "sae.features", truth.meta.get("sae_hook", "")]}
    return next((origins[name] for name in made_from.get(chain, []) if name in origins), "")


def _excused(result: TensorResult, truth: Truth, dtype: str, origin: str) -> TensorResult:
    if not origin or result.status is not Status.FAIL or result.reason == "unexpected":
        return result
    said = f"the truth's largest value {truth.beyond[origin]:.2g} is beyond {dtype}'s range"
    said += f" at {origin}, which this is computed from" if origin != result.name else ""
    return replace(result, status=Status.UNMEASURED, reason=OUT_OF_RANGE, detail=said, compared=0)
