"""The truth of each function of ``fixtures/calls.toml``, or of a known wrong formula, in float64 with noise."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from candle_mi_parity.coverage.calls import CallRow, CallTable
from candle_mi_parity.coverage.calls_caches import CACHES
from candle_mi_parity.coverage.calls_diffusion import DIFFUSIONS, load_diffusion
from candle_mi_parity.coverage.calls_gradients import GRADIENTS, gradient_truth
from candle_mi_parity.coverage.calls_measures import MEASURES, Named, eigen
from candle_mi_parity.coverage.calls_model_truth import MODEL_FUNCTIONS, model_truth
from candle_mi_parity.coverage.calls_offsets import OFFSETS, offsets
from candle_mi_parity.coverage.calls_range import RangeNoise, RangeTruth
from candle_mi_parity.coverage.calls_rwkv import RWKV, rwkv_call
from candle_mi_parity.coverage.calls_stoicheia import NETWORKS, network_call
from candle_mi_parity.coverage.calls_tasks import TASKS
from candle_mi_parity.coverage.calls_training import TRAINING
from candle_mi_parity.coverage.calls_transcoders import TRANSCODERS, TorchTranscoder
from candle_mi_parity.coverage.calls_wrong import SAE_FORMULAS, WRONG, Formulas, norm_out_of_range, torch_sae
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.errors import CaseTableError, OracleError
from candle_mi_parity.oracle.arithmetic import UNIT
from candle_mi_parity.oracle.compute import SAMPLES
from candle_mi_parity.oracle.rounding import MatmulScales, NoisePool
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.trace.truth import TruthTensor


def _sae_call(sae: TorchSae, fn: str, args: dict[str, Any]) -> Named:
    if fn == "decoder_vector":
        return {"value": sae.W_dec[args["feature"]]}
    x: torch.Tensor = args["x"]
    rows = x.reshape(-1, x.shape[-1])  # a matrix, for which the products have a noise rule
    if fn == "decode":
        return {"value": _shaped_as(x, sae.decode(rows))}
    features = sae.encode(rows)
    if args["nan_stays"]:  # as in torch.relu
        pre = sae.pre_activations(rows)
        features = torch.where(pre.isnan(), pre, features)
    if fn == "encode_sparse":
        return {"features": _shaped_as(x, features)}
    if fn in ("encode", "encode_with_strategy"):
        return {"value": _shaped_as(x, features)}
    recon = sae.decode(features)
    error = rows - recon
    return {"value": _shaped_as(x, recon) if fn == "reconstruct" else (error * error).mean()}


def _shaped_as(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[n, width] → [..., width] with the leading axes of ``x``."""
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


SAE_FUNCTIONS = frozenset(
    {"encode", "encode_with_strategy", "encode_sparse", "decode", "reconstruct", "reconstruction_error"}
    | {"decoder_vector"}
)


_PLAIN = CACHES | TRAINING
"""Functions of tensors and numbers alone, each with its formulas."""
REFUSALS = (IndexError, RuntimeError, ValueError)
"""What torch and numpy raise for arguments that they do not take."""


def check_refusal(error: Exception) -> None:
    """:raises OracleError: an operation is missing, which is a fault of the reference."""
    if isinstance(error, NotImplementedError | RecursionError):
        raise OracleError(f"the reference fails: {error}") from error


def computation(
    row: CallRow,
    arrays: dict[str, np.ndarray],
    directory: Path,
    formulas: Collection[Formula] = (),
    dtype: torch.dtype = torch.float64,
    table: CallTable | None = None,
) -> Callable[[], Named]:
    """The function of a call with its arguments; :func:`finish` makes results of what it returns.

    :param directory: where the SAEs were written.
    :param formulas: known wrong formulas; none for the truth.
    :param table: whose transcoders and networks are called.
    :raises CaseTableError: the function has no reference, or not these formulas.
    """

    def given(value: Any) -> Any:
        """An argument, or the tensors that it names."""
        if isinstance(value, list):
            return [given(each) for each in value]
        if isinstance(value, dict):
            return {key: given(each) for key, each in value.items()}
        return torch.from_numpy(arrays[value]).to(dtype) if isinstance(value, str) and value in arrays else value

    if row.fn in OFFSETS and OFFSETS[row.fn][0].issuperset(formulas):
        return lambda: offsets(row, directory / str(row.model), formulas)
    if row.fn in RWKV and RWKV[row.fn][0].issuperset(formulas):
        assert table is not None and row.vocabulary is not None
        vocabulary = table.vocabularies[row.vocabulary]
        return lambda: rwkv_call(row, vocabulary, formulas)
    args: dict[str, Any] = {key: given(value) for key, value in row.args.items()}
    if row.weights is not None:
        args["path"] = directory / row.weights
    if row.fn in TRANSCODERS and TRANSCODERS[row.fn][0].issuperset(formulas):
        assert table is not None and row.transcoder is not None
        transcoder = TorchTranscoder(table.transcoders[row.transcoder], formulas, dtype)
        return lambda: TRANSCODERS[row.fn][1](transcoder, **args)
    if row.fn in NETWORKS | TASKS and (NETWORKS | TASKS)[row.fn][0].issuperset(formulas):
        network = None if table is None or row.network is None else table.networks[row.network]
        return network_call(row.fn, network, formulas, dtype, args)
    if row.fn in DIFFUSIONS and DIFFUSIONS[row.fn][0].issuperset(formulas):
        diffusion = load_diffusion(directory / str(row.diffusion), dtype, formulas)
        return lambda: DIFFUSIONS[row.fn][1](diffusion, **args)
    if row.fn in _PLAIN and _PLAIN[row.fn][0].issuperset(formulas):
        return lambda: _PLAIN[row.fn][1](formulas, **args)
    if row.sae is not None and row.fn in SAE_FUNCTIONS and SAE_FORMULAS.issuperset(formulas):
        sae = torch_sae(directory / row.sae, formulas, dtype)
        finite = all(np.isfinite(array).all() for array in arrays.values())
        args["nan_stays"] = not finite and Formula.NAN_IS_ZERO not in formulas
        return lambda: _sae_call(sae, row.fn, args)
    allowed, wrong = WRONG.get(row.fn, (frozenset(), None))
    compute = MEASURES.get(row.fn)
    if compute is None or not allowed.issuperset(formulas):
        wanted = f"formula {', '.join(formulas)}" if formulas else "reference"
        raise CaseTableError(f"{row.id}: {row.fn} has no {wanted}")
    if formulas and wrong is not None:
        return lambda: wrong(formulas, **args)
    return lambda: compute(**args)


def with_noise(
    row: CallRow, once: Callable[[], Named], sampled: bool, formulas: Formulas = ()
) -> tuple[dict[str, TruthTensor], bool]:
    """Results with the rms of 16 samples of float32 rounding as noise, and whether float32's range is left.

    :param once: see :func:`computation`.
    :param sampled: whether there are samples; otherwise the noise is 0.
    :raises OracleError: the noise of a finite number is not finite.
    """
    scales = MatmulScales()
    with RangeTruth(scales) as truth:
        inner = once()
    values = finish(row, inner, formulas)
    squares = {name: torch.zeros_like(value) for name, value in values.items()}
    if sampled and not truth.overflows:
        pool = NoisePool(zlib.crc32(row.id.encode()))
        for _ in range(SAMPLES):
            with RangeNoise(pool, scales):
                inner = once()
            for name, value in finish(row, inner, formulas, pool).items():
                squares[name] += torch.where(values[name].isfinite(), (value - values[name]) ** 2, 0.0) / SAMPLES
    if not formulas and any(not square.isfinite().all() for square in squares.values()):
        raise OracleError(f"{row.fn}: the noise of a finite number is not finite")
    # A sample of a wrong formula may give NaN where the formula does not: nothing can be said of that number.
    squares = {name: square.nan_to_num(torch.inf, torch.inf) for name, square in squares.items()}
    noise = {name: square.sqrt().numpy() for name, square in squares.items()}
    return {name: TruthTensor(value.numpy(), noise[name]) for name, value in values.items()}, truth.overflows


def finish(row: CallRow, values: Named, formulas: Formulas = (), pool: NoisePool | None = None) -> Named:
    """The results; what is computed here has no noise rule and runs outside the modes.

    :param pool: of a sample. A float32 eigensolver's error is that of a matrix which is off by a few roundings of its
        norm, not of each element (Golub and Van Loan, Matrix Computations, 4th ed., §8.2.1); an eigenvalue and its
        ratio are rounded, too.
    """
    if row.fn != "pca_top_k":
        return values
    if pool is not None:
        noise = pool.draw(values["gram"])
        size = UNIT * values["gram"].norm()
        values = {"gram": values["gram"] + (noise + noise.t()) * (size / 2)}
    found = eigen(values, cast(int, row.args["k"]))
    if pool is not None:
        found |= {name: found[name] * (1 + UNIT * pool.draw(found[name])) for name in ("eigenvalues", "explained")}
    return norm_out_of_range(found) if Formula.NORM_OUT_OF_RANGE in formulas else found


def truth_of(row: CallRow, table: CallTable, cache: Path, formula: Formula | None = None) -> dict[str, TruthTensor]:
    """The expected results of a call; none if PyTorch raises, which the row then says.

    :param cache: where the SAEs are written.
    :param formula: a known wrong formula; None for the truth.
    :raises CaseTableError: the function has no reference, or not this formula; the row is wrong on whether PyTorch
        raises; a number leaves float32's range.
    """
    formulas = () if formula is None else (formula,)
    overflows = False
    try:
        arrays, directory = table.arrays(), table.lay_out(cache)
        if row.fn in MODEL_FUNCTIONS:
            assert row.model is not None
            if formula is not None:
                raise CaseTableError(f"{row.id}: {row.fn} has no formula {formula}")
            values = model_truth(row, arrays, directory / row.model)
        elif row.fn in GRADIENTS:
            assert row.model is not None
            values = gradient_truth(row, arrays, directory / row.model, formula)
        else:
            once = computation(row, arrays, directory, formulas, table=table)
            values, overflows = with_noise(row, once, not row.exact, formulas)
    except REFUSALS as error:
        check_refusal(error)
        if row.raises and formula is None:
            return {}
        raise CaseTableError(f"{row.id}: PyTorch raises {error}") from error
    if overflows or (row.raises and formula is None):
        raise CaseTableError(
            f"{row.id}: {'a number leaves the range of float32' if overflows else 'PyTorch does not raise'}"
        )
    return values
