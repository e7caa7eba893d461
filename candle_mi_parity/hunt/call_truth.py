"""What PyTorch gives for a generated call: values with noise, an exception, or nothing that a candidate must give."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch

from candle_mi_parity.compare.gate import ELEMENT_GATE, UNIT
from candle_mi_parity.coverage.calls import CallRow, CallTable
from candle_mi_parity.coverage.calls_range import SMALLEST_NORMAL
from candle_mi_parity.coverage.calls_truth import REFUSALS, check_refusal, computation, with_noise
from candle_mi_parity.coverage.calls_wrong import torch_sae
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.hunt.call_stoicheia import undecided
from candle_mi_parity.hunt.call_transcoders import decided
from candle_mi_parity.trace.truth import TruthTensor

Truths = dict[str, TruthTensor]
OVERFLOW = "a number exceeds float32's largest"
_SEPARATED = 0.9
"""Power iteration tells two eigenvalues apart whose ratio is at most this: 0.9^400 of the other component is left."""
_DEFLATED = 4.0
"""What is left of a matrix after a component is subtracted has an error of the size of u times the first eigenvalue.
How many digits of the next component this costs depends on a random start: see ``docs/findings.md``."""


@dataclass(frozen=True)
class Expected:
    """What a call should do.

    :ivar row: the call, with what the comparison has to know of it.
    :ivar values: empty if there are none.
    :ivar free: results whose values are undefined, and which have to be finite.
    :ivar raises: PyTorch's message; the candidate has to refuse.
    :ivar unknown: why nothing is expected.
    """

    row: CallRow
    values: Truths = field(default_factory=dict)
    free: tuple[str, ...] = ()
    raises: str = ""
    unknown: str = ""


def expected(table: CallTable, directory: Path, formulas: Collection[Formula] = (), noisy: bool = True) -> Expected:
    """What PyTorch gives for the table's only call.

    :param directory: where the inputs were written.
    :param formulas: known wrong formulas that are computed instead.
    :param noisy: whether the noise is sampled. What passes without it passes with it, and that takes a tenth of the
        time.
    """
    (row,) = table.call
    arrays = table.arrays()
    try:
        once = computation(row, arrays, directory, formulas, table=table)
        if noisy and row.transcoder is not None:
            # Before the noise is sampled, in which another choice would be a difference without bound.
            if isinstance(found := decided(table, arrays, formulas), str):
                return Expected(row, unknown=found)
            row = found
        if noisy and row.network is not None and (why := undecided(table, arrays, formulas)):
            return Expected(row, unknown=why)
        sampled = noisy and not row.exact and all(array.size for array in arrays.values())
        values, overflows = with_noise(row, once, sampled, formulas)
        if overflows:
            return Expected(row, unknown=OVERFLOW)
        if row.fn == "pca_top_k" and not formulas:
            return _pca(row, values, arrays[cast(str, row.args["matrix"])])
        if noisy and row.sae is not None and row.fn not in ("decode", "decoder_vector"):
            return _at_decisions(row, values, arrays["x"], directory, formulas)
        if row.fn == "apply_steering" and not formulas and _makes_nan(arrays, values):
            return Expected(row, unknown="a row of weights that sums to 0 has no normal form")
        return Expected(row, values)
    except REFUSALS as error:
        check_refusal(error)
        return Expected(row, raises=(str(error) or type(error).__name__).splitlines()[0])


def _makes_nan(arrays: dict[str, np.ndarray], values: Truths) -> bool:
    given = any(np.isnan(array).any() for array in arrays.values())
    return not given and any(np.isnan(each.value).any() for each in values.values())


def _pca(row: CallRow, values: Truths, matrix: np.ndarray) -> Expected:
    """As ``torch.pca_lowrank``, whose components are finite also where no variance is left."""
    k = cast(int, row.args["k"])
    centred = matrix.astype(np.float64) - matrix.mean(0, dtype=np.float64)
    lambdas = np.zeros(k + 1)
    found = np.linalg.svd(centred, compute_uv=False)[: k + 1] ** 2
    lambdas[: found.size] = found
    if lambdas[0] < SMALLEST_NORMAL:  # in float32 there is no variance, and no ratio
        return Expected(row, {"eigenvalues": values["eigenvalues"]}, ("components",))
    following, leading = lambdas[1:], lambdas[:-1]
    none_left = leading <= 1e-6 * lambdas[0]
    equal = following >= (1 - UNIT) * leading
    if ((lambdas[0] > _DEFLATED * leading) & ~none_left).any():
        return Expected(row, unknown="a component of which deflation loses digits")
    if not (none_left | equal | (following <= _SEPARATED * leading)).all():
        return Expected(row, unknown="eigenvalues that power iteration does not tell apart")
    if not (none_left | equal).any():
        return Expected(row, values)
    return Expected(row, {name: values[name] for name in ("eigenvalues", "explained")}, ("components",))


def _at_decisions(
    row: CallRow, values: Truths, x: np.ndarray, directory: Path, formulas: Collection[Formula]
) -> Expected:
    """Whether rounding or the order of equal features may decide which of them fire."""
    assert row.sae is not None
    sae = torch_sae(directory / row.sae, formulas)
    if (sae.k is None and sae.threshold is None) or not x.size:
        return Expected(row, values)
    rows = torch.from_numpy(x).double().reshape(-1, x.shape[-1])
    found, _ = with_noise(row, lambda: {"pre": sae.pre_activations(rows)}, not row.exact)
    pre, slack = found["pre"].value, ELEMENT_GATE * (found["pre"].noise + UNIT * np.abs(found["pre"].value))
    if sae.threshold is not None:
        near = np.abs(pre - sae.threshold.numpy()) <= slack
        close = bool(near.any()) and not row.exact
        return (
            Expected(row, unknown="a feature lies within rounding of its threshold")
            if close
            else Expected(row, values)
        )
    assert sae.k is not None
    if np.isnan(pre).any():
        return Expected(row, unknown="which NaN are among the k largest is not specified")
    if sae.k >= pre.shape[-1]:
        return Expected(row, values)
    order = np.argsort(-pre, -1, kind="stable")
    ranked, slacks = np.take_along_axis(pre, order, -1), np.take_along_axis(slack, order, -1)
    last, next_one = ranked[:, sae.k - 1], ranked[:, sae.k]
    if row.exact:
        tied = bool(((last == next_one) & (last > 0)).any())
        if tied and row.fn == "encode_sparse":
            return Expected(row, unknown="which of equal features are among the k largest is not specified")
        return Expected(row.model_copy(update={"ties": tied}), values)
    # Of negative ones ReLU keeps none; a known wrong formula may keep them.
    near = (last - next_one <= slacks[:, sae.k - 1] + slacks[:, sae.k]) & (
        (last > -slacks[:, sae.k - 1]) | bool(formulas)
    )
    if near.any():
        return Expected(row, unknown="the k-th and the next feature are equal within rounding")
    return Expected(row, values)
