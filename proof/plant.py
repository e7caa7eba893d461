"""Planting a fault: the honest run of its case, and the dump that the faulty run leaves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors

from candle_mi_parity.candidate import torch_source
from candle_mi_parity.candidate.torch_source import TorchSource, as_numpy
from candle_mi_parity.models.checkpoint import weight_files
from candle_mi_parity.models.prepared_case import Subject
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import InMemory
from candle_mi_parity.trace.truth import Truth
from proof import functions_model, functions_numerics, functions_run
from proof.catalogue import CatalogueError, Change, Fault
from proof.changes import changed
from proof.functions import FUNCTIONS, Dump, Running
from tests.support.planting import Real, arrays_of, changed_model, with_arrays

REGISTERED = (functions_model, functions_run, functions_numerics)
"""The modules whose functions are in :data:`FUNCTIONS`."""
EQUAL = 1e-12
"""Two float64 runs that differ by less, in units of a tensor's rms, differ by rounding."""


def emitted(fault: Fault, there: Real) -> InMemory:
    """What the faulty float32 run emits in the mode of ``there``; the honest run's own where it makes no dump."""
    if fault.tensor is not None:
        forced = there.truth.meta["mode"] == "forced"
        return there.emitted if forced and not _reaches(fault.tensor, there) else _retouched(there, fault.tensor)
    if fault.io or fault.source:
        return there.emitted
    mode: Mode = "forced" if there.truth.meta["mode"] == "forced" else "free"
    with _model_of(fault, there.subject) as subject:
        return disturbed(fault, subject, mode, there.truth, there.inputs)


def disturbed(
    fault: Fault | None, subject: Subject, mode: Mode, truth: Truth, inputs: Path, exact: bool = False
) -> InMemory:
    """Run transformers with a fault's function in it, if it has one.

    :param exact: in float64 in place of the case's own format.
    """
    with ExitStack() as stack, TorchSource() as source:
        if exact:
            given = {name: tensor.double() for name, tensor in load_tensors(inputs).items()}
            stack.enter_context(mock.patch.object(torch_source, "load_file", return_value=given))
            stack.enter_context(Float64())  # type: ignore[no-untyped-call]
            stack.enter_context(torch.no_grad())
            subject = replace(subject, case=subject.case.model_copy(update={"dtype": "float64"}))
            if subject.sae_file is not None:
                source._saes[subject.sae_file] = TorchSae(load_sae(subject.sae_file))
        dtype: torch.dtype = getattr(torch, subject.case.dtype)
        sae = source.sae(subject.sae_file) if subject.sae_file is not None else None
        running = Running(subject, source.model(subject.model_dir, dtype), sae, stack)
        if fault is not None and fault.function is not None:
            if fault.function not in FUNCTIONS:
                raise CatalogueError(f"{fault.id}: no function {fault.function!r} is registered")
            FUNCTIONS[fault.function](running)
        left = source.trace(running.subject, mode, truth, inputs)
    arrays = arrays_of(left)
    arrays |= {name: as_numpy(tensor) for name, tensor in running.captured.items() if name in arrays}
    dump = Dump(arrays, left.scalars, left.top_features)
    for change in running.after:
        change(dump)
    changed_dump = replace(left, scalars=dump.scalars, top_features=dump.top_features)
    return with_arrays(changed_dump, dump.arrays)


def difference64(fault: Fault, there: Real) -> float:
    """The largest difference that a fault makes in float64, in units of each tensor's rms: below :data:`EQUAL` the
    faulty run is the honest one to rounding.

    :raises CatalogueError: the fault is no change of what is computed.
    """
    if fault.tensor or fault.io or fault.source:
        raise CatalogueError(f"{fault.id} changes no computation")
    with _model_of(fault, there.subject) as subject:
        faulty = disturbed(fault, subject, "free", there.truth, there.inputs, exact=True)
    honest = disturbed(None, there.subject, "free", there.truth, there.inputs, exact=True)
    worst = 0.0
    for name, array in arrays_of(honest).items():
        other = faulty.arrays[name][0]
        if other.shape != array.shape:
            return np.inf
        size = float(np.sqrt(np.square(array[np.isfinite(array)]).mean())) or 1.0
        worst = max(worst, float(np.abs(np.where(array == other, 0.0, array - other)).max()) / size)
    for name, value in honest.scalars.items():
        worst = max(worst, abs(faulty.scalars[name] - value) / (abs(value) or 1.0))
    return worst


def _reaches(change: Change, there: Real) -> bool:
    """Whether a forced run has the tensors of a change: it lacks the lens, the SAE and what it is given."""
    names = [name for name in (change.name, change.other) if name not in ("", "*", "extra")]
    return all(name in there.emitted.arrays for name in names if change.change != "rename")


def _retouched(there: Real, change: Change) -> InMemory:
    return with_arrays(there.emitted, changed(there.arrays, change))


@contextmanager
def _model_of(fault: Fault, subject: Subject) -> Iterator[Subject]:
    """The subject with the model directory that a fault of config or weights reads."""
    if not (fault.config or fault.absent or fault.weight):
        yield subject
        return
    with tempfile.TemporaryDirectory() as scratch:
        change: dict[str, object] = dict(fault.config) | dict.fromkeys(fault.absent)
        directory = changed_model(Path(scratch) / "model", subject.model_dir, **change)
        if fault.weight is not None:
            _reweigh(directory, fault.weight)
        yield replace(subject, model_dir=directory)


def _reweigh(directory: Path, change: Change) -> None:
    """Put one changed file of weights in place of the links to the honest ones."""
    files = weight_files(directory)
    weights = {name: array for file in files for name, array in load_file(file).items()}
    for file in files:
        file.unlink()
    changed_weights = {name: np.ascontiguousarray(array) for name, array in changed(weights, change).items()}
    save_file(changed_weights, directory / "model.safetensors", metadata={"format": "pt"})
