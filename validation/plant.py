"""From a fault to the tensors that the faulty float32 run leaves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from candle_mi_parity.candidate.torch_source import TorchSource, as_numpy
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import InMemory
from tests.support.planting import Real, arrays_of, changed_model, with_arrays
from validation import model_faults, numeric_faults, quantized_faults, run_faults
from validation.array_changes import changed
from validation.catalogue import CatalogueError, Change, Fault
from validation.disturb import FUNCTIONS, Running

REGISTERED = (model_faults, run_faults, numeric_faults, quantized_faults)
"""The modules that register the functions in :data:`FUNCTIONS`."""


def emitted(fault: Fault, there: Real) -> InMemory:
    """The faulty float32 run in the mode of ``there``.

    For a fault of the written trace or of candle-mi's source it is the honest run.
    """
    forced = there.truth.meta["mode"] == "forced"
    if fault.tensor is not None:
        if forced and not _reaches(fault.tensor, there):
            return there.emitted
        return with_arrays(there.emitted, changed(there.arrays, fault.tensor))
    if fault.io or fault.source:
        return there.emitted
    with _model_of(fault, there.subject) as subject:
        return _disturbed(fault, replace(there, subject=subject), "forced" if forced else "free")


def _disturbed(fault: Fault, there: Real, mode: Mode) -> InMemory:
    """Run transformers with the function of a fault, if it has one."""
    subject = there.subject
    with ExitStack() as stack, TorchSource() as source:
        dtype: torch.dtype = getattr(torch, subject.case.dtype)
        sae = source.sae(subject.sae_file) if subject.sae_file is not None else None
        running = Running(subject, source.model(subject.model_dir, dtype), sae, stack)
        if fault.weight is not None:
            parameters = {name: each.data for name, each in running.model.named_parameters()}
            weights = {name: tensor.numpy() for name, tensor in parameters.items()}
            for name, array in changed(weights, fault.weight).items():
                parameters[name].copy_(torch.from_numpy(array.copy()))
        if fault.function is not None:
            if fault.function not in FUNCTIONS:
                raise CatalogueError(f"{fault.id}: no function {fault.function!r} is registered")
            how, change = FUNCTIONS[fault.function]
            how(running, change)
        left = source.trace(running.subject, mode, there.truth, there.inputs)
    arrays = arrays_of(left)
    arrays |= {name: as_numpy(tensor) for name, tensor in running.captured.items() if name in arrays}
    for alter in running.after:
        alter(arrays, left)
    return with_arrays(left, arrays)


def _reaches(change: Change, there: Real) -> bool:
    """Whether a teacher-forced run has the tensors of a change: it lacks the lens, the SAE and its own inputs."""
    names = [name for name in (change.name, change.other) if name not in ("", "*", "extra")]
    return all(name in there.emitted.arrays for name in names if change.change != "rename")


@contextmanager
def _model_of(fault: Fault, subject: PreparedCase) -> Iterator[PreparedCase]:
    """The case with the model directory that a fault of the config reads."""
    if not (fault.config or fault.absent):
        yield subject
        return
    with tempfile.TemporaryDirectory() as scratch:
        change: dict[str, object] = dict(fault.config) | dict.fromkeys(fault.absent)
        yield replace(subject, model_dir=changed_model(Path(scratch) / "model", subject.model_dir, **change))
