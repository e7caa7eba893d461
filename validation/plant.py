"""From a fault to the tensors that the faulty float32 run leaves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from candle_mi_parity.candidate.torch_source import TorchSource, as_numpy
from candle_mi_parity.models.checkpoint import weight_files
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import InMemory
from tests.support.planting import Real, arrays_of, changed_model, with_arrays
from validation import model_faults, numeric_faults, run_faults
from validation.array_changes import changed
from validation.catalogue import CatalogueError, Change, Fault
from validation.disturb import FUNCTIONS, Dump, Running

REGISTERED = (model_faults, run_faults, numeric_faults)
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
        if fault.function is not None:
            if fault.function not in FUNCTIONS:
                raise CatalogueError(f"{fault.id}: no function {fault.function!r} is registered")
            FUNCTIONS[fault.function](running)
        left = source.trace(running.subject, mode, there.truth, there.inputs)
    arrays = arrays_of(left)
    arrays |= {name: as_numpy(tensor) for name, tensor in running.captured.items() if name in arrays}
    dump = Dump(arrays, left.scalars, left.top_features)
    for change in running.after:
        change(dump)
    return with_arrays(replace(left, scalars=dump.scalars, top_features=dump.top_features), dump.arrays)


def _reaches(change: Change, there: Real) -> bool:
    """Whether a teacher-forced run has the tensors of a change: it lacks the lens, the SAE and its own inputs."""
    names = [name for name in (change.name, change.other) if name not in ("", "*", "extra")]
    return all(name in there.emitted.arrays for name in names if change.change != "rename")


@contextmanager
def _model_of(fault: Fault, subject: PreparedCase) -> Iterator[PreparedCase]:
    """The case with the model directory that a fault of the config or the weights reads."""
    if not (fault.config or fault.absent or fault.weight):
        yield subject
        return
    with tempfile.TemporaryDirectory() as scratch:
        change: dict[str, object] = dict(fault.config) | dict.fromkeys(fault.absent)
        directory = changed_model(Path(scratch) / "model", subject.model_dir, **change)
        if fault.weight is not None:
            _change_weights(directory, fault.weight)
        yield replace(subject, model_dir=directory)


def _change_weights(directory: Path, change: Change) -> None:
    """Replace the links to the honest weights by one file with the changed ones."""
    files = weight_files(directory)
    weights = {name: array for file in files for name, array in load_file(file).items()}
    for file in files:
        file.unlink()
    changed_weights = {name: np.ascontiguousarray(array) for name, array in changed(weights, change).items()}
    save_file(changed_weights, directory / "model.safetensors", metadata={"format": "pt"})
