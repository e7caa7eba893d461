"""Stored traces as a run reads them, cut to a few tensors, and whether a PASS on a mutant is one that must be.

A mutant may pass only where every number that is compared is the honest one to the bit, or lies inside the gate as
the formulas of ``docs/the-gate.md`` give it, worked out here anew; and never with fewer numbers compared.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from candle_mi_parity.candidate.sources import StoredSource
from candle_mi_parity.compare.verdict import CaseResult, RunResult, Status, TensorResult
from candle_mi_parity.judge.case import Progress, _status, judge_mode
from candle_mi_parity.report.views_ci import junit, summary, workflow_commands
from candle_mi_parity.spec.paths import ROOT
from candle_mi_parity.trace.trace import Trace
from candle_mi_parity.trace.truth import Truth, TruthTensor
from proof.fuzz_mutants import dumped, mutate_array, mutate_bytes, mutate_tree
from tests.support.planting import Real, real

STORED = ROOT / "rust_outputs" / "0.2.2"
KEPT = ("hook_embed", "blocks.0.attn.hook_q", "blocks.0.attn.hook_scores", "blocks.0.attn.hook_pattern", "logits")
CASES = ("llama/hub", "gemma2/hub", "llama/one-token", "llama/f16", "llama/bf16")
"""Whole in float32, with an SAE, in part, and in part in both half formats."""


class WrongPassError(AssertionError):
    """The suite passed what is not what it passed before."""


@dataclass(frozen=True)
class Cut:
    """A stored case of which a few tensors are left, on both sides.

    :ivar document: the trace's JSON; :ivar tensors: those of its file; :ivar candidate: ``candidate.json``.
    """

    there: Real
    truth: Truth
    document: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def path(self) -> str:
        return f"{self.there.subject.case.id}.json"

    @property
    def file(self) -> str:
        return f"{self.there.subject.case.id}.safetensors"


@functools.cache
def cut(case_id: str) -> Cut:
    there = real(case_id)
    trace = Trace(STORED / f"{case_id}.json")
    names = {*KEPT, there.truth.meta.get("sae_hook", "")}
    kept = [n for n in there.truth.tensors if (n in names or n.startswith("sae")) and n in trace.entries]
    tensors = {n: there.truth.tensors[n] for n in kept}
    held = {n: TruthTensor(t.value, t.noise, t.allowed) for n, t in tensors.items()}
    truth = Truth(there.truth.tokens, held, there.truth.sae, there.truth.scalars, there.truth.meta)
    document = json.loads((STORED / f"{case_id}.json").read_text())
    document["tensors"] = [entry for entry in document["tensors"] if entry["name"] in kept]
    with safe_open(STORED / f"{case_id}.safetensors", framework="pt") as file:
        return Cut(there, truth, document, {name: file.get_tensor(name) for name in kept})


def lay_out(case: Cut, directory: Path) -> None:
    """The honest files, as ``rust_outputs`` has them."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(STORED / "candidate.json", directory)
    (directory / case.path).parent.mkdir(exist_ok=True)
    (directory / case.path).write_bytes(dumped(case.document))
    save_file(case.tensors, directory / case.file)


def restore(case: Cut, directory: Path, mutate: object) -> None:
    """Undo what one of the mutations below wrote."""
    if mutate is candidate_tree:
        shutil.copy(STORED / "candidate.json", directory)
    if mutate in (tensor_bytes, tensor_values):
        save_file(case.tensors, directory / case.file)
    if mutate in (document_bytes, document_tree, tensor_values):
        (directory / case.path).write_bytes(dumped(case.document))


def judge(case: Cut, directory: Path) -> tuple[Status, list[TensorResult]]:
    """The verdict of a run on what lies in a directory.

    :raises ParityError: there is nothing to judge.
    """
    oracle: Any = SimpleNamespace(
        subject=case.there.subject, truth=lambda _mode: case.truth, inputs=lambda _mode: case.there.inputs
    )
    row = case.there.subject.case
    results, diagnosis, in_part, sae = judge_mode(oracle, StoredSource(directory), "free", Progress())
    status, error = _status(results, row, in_part)
    look = CaseResult(row.id, row.family, "", status, "", results, [], diagnosis, sae, error=error)
    shown = RunResult("0.2.2", {}, {}, [look], {}, [])
    for text in (junit(shown), summary(shown), *workflow_commands(shown)):
        if odd := [c for c in text if not c.isprintable() and c not in "\n\t"]:
            raise AssertionError(f"a view holds {odd[:3]!a}")
    return status, results


@functools.cache
def honest(case_id: str, directory: Path) -> int:
    """Numbers compared where nothing is changed; it has to pass."""
    lay_out(cut(case_id), directory)
    status, results = judge(cut(case_id), directory)
    assert status is Status.PASS, f"{case_id}: {[r for r in results if r.status is not Status.PASS]}"
    return sum(result.compared for result in results)


def outcome(case: Cut, directory: Path, compared: int) -> str:
    """Of what lies there.

    :raises WrongPassError: a PASS that has no evidence.
    """
    status, results = judge(case, directory)
    if status is not Status.PASS:
        return status.value
    if sum(result.compared for result in results) < compared:
        raise WrongPassError("PASS with fewer numbers compared")
    return evidence(case, directory)


def evidence(case: Cut, directory: Path) -> str:
    """``equal`` or ``inside the gate``; reads the files by itself.

    :raises WrongPassError: neither.
    """
    document = json.loads((directory / case.path).read_text())
    if document["tokens"] != case.document["tokens"]:
        raise WrongPassError("PASS with other tokens")
    equal = True
    with safe_open(directory / case.file, framework="pt") as file:
        entries = {entry["name"]: entry for entry in document["tensors"]}
        if set(entries) != set(case.tensors):
            raise WrongPassError(f"PASS with {sorted(set(entries) ^ set(case.tensors))} odd")
        for name, tensor in case.tensors.items():
            entry = entries[name]
            if entry.get("values") is not None:
                got = torch.tensor(entry["values"], dtype=tensor.dtype).reshape(entry["shape"])
            else:
                got = file.get_tensor(entry["key"])
            if got.shape != tensor.shape or got.dtype != tensor.dtype:
                raise WrongPassError(f"PASS with {name} of shape {tuple(got.shape)}, {got.dtype}")
            if not torch.equal(got, tensor):
                equal = False
                _inside(case, name, got.double().numpy(), entry.get("part"))
    scalars = document["scalars"]
    for name, value in case.document["scalars"].items():
        if scalars[name] != value:
            equal = False
            _scalar_inside(name, scalars[name], value)
    if set(scalars) != set(case.document["scalars"]):
        raise WrongPassError("PASS with other scalars")
    ours, theirs = (_features(d["top_features_last_pos"]) for d in (case.document, document))
    for index in ours.keys() | theirs.keys():
        if ours.get(index) != theirs.get(index):
            equal = False
            _scalar_inside(f"feature {index}", theirs.get(index, 0.0), ours.get(index, 0.0))
    return "equal" if equal else "inside the gate"


def _features(listed: list[dict[str, Any]]) -> dict[int, float]:
    return {feature["index"]: feature["value"] for feature in listed}


def _scalar_inside(name: str, got: float, expected: float) -> None:
    """Scalars are norms, means and features of some hundred terms: 2⁻¹⁶ of them is what their gates come to."""
    if not abs(got - expected) <= 2.0**-14 * abs(expected):
        raise WrongPassError(f"PASS with {name} {got} for {expected}")


def _inside(case: Cut, name: str, got: np.ndarray, part: dict[str, Any] | None) -> None:
    """The gate's two formulas, entry by entry and position by position."""
    there = case.truth.tensors[name]
    value, noise, allowed = there.value, there.noise.astype(np.float64), there.allowed
    if part is not None:
        value, noise = value[..., part["rows"], :], noise[..., part["rows"], :]
        allowed = None if allowed is None else allowed[..., part["rows"], :]
        if part["columns"] is not None:
            value, noise = value[..., part["columns"]], noise[..., part["columns"]]
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[case.document["header"]["dtype"]]
    kept = np.broadcast_to(True if allowed is None else allowed, got.shape)
    if name.endswith("hook_pattern") and got[~kept].any():
        raise WrongPassError(f"PASS with {name} not 0 where the mask forbids")
    if name.endswith(".features"):
        # A feature that is off is a decision; one that is on has a value, and was looked at as such.
        kept = kept & (got != 0) & (value != 0)
    for at in np.ndindex(got.shape[0], got.shape[-2]):
        here = kept[at[0], ..., at[1], :]
        error, v, n = (array[at[0], ..., at[1], :][here] for array in (got - value, value, noise))
        if not error.any():
            continue
        n2 = float(np.square(n).mean())
        sigma = np.sqrt((16 * np.square(n) + n2) / 17) + unit / 4 * np.abs(v) + 2.0**-149
        whole = np.sqrt(n2) + unit / 4 * np.sqrt(np.square(v).mean()) + 2.0**-149
        if not (np.abs(error) < 32 * sigma).all() or not np.sqrt(np.square(error).mean()) < 8 * whole:
            raise WrongPassError(f"PASS with {name} outside the gate at {at}")


def document_bytes(case: Cut, directory: Path, rng: Random) -> None:
    (directory / case.path).write_bytes(mutate_bytes(rng, dumped(case.document)))


def tensor_bytes(case: Cut, directory: Path, rng: Random) -> None:
    content = (directory / case.file).read_bytes()
    (directory / case.file).write_bytes(mutate_bytes(rng, content))


def document_tree(case: Cut, directory: Path, rng: Random) -> None:
    (directory / case.path).write_bytes(dumped(mutate_tree(rng, case.document)))


def candidate_tree(_case: Cut, directory: Path, rng: Random) -> None:
    path = directory / "candidate.json"
    path.write_bytes(dumped(mutate_tree(rng, json.loads(path.read_text()))))


def tensor_values(case: Cut, directory: Path, rng: Random) -> None:
    """A tensor changed as an emitter that computes otherwise has it: mostly with its digest, shape and dtype."""
    name = rng.choice(list(case.tensors))
    tensors, document = dict(case.tensors), json.loads(dumped(case.document))
    old = tensors[name]
    arrays = [tensor.float().numpy() for tensor in tensors.values()]
    array = mutate_array(rng, old.float().numpy(), arrays)
    new = torch.from_numpy(array)
    tensors[name] = new if rng.random() < 0.1 else new.to(old.dtype)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / case.file)
    entry = next(entry for entry in document["tensors"] if entry["name"] == name)
    if rng.random() < 0.9:
        kept = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        entry["sha256"] = hashlib.sha256(kept.tobytes()).hexdigest()
        entry["shape"] = list(array.shape)
        entry["dtype"] = str(tensors[name].dtype).removeprefix("torch.")
        entry["nonfinite"] = int((~torch.isfinite(tensors[name])).sum())
    (directory / case.path).write_bytes(dumped(document))
