"""A small run of the fuzzer, and proof that it sees what it looks for.

The tree of a real trace is mutated by hypothesis, which shrinks what it finds; all else by the fuzzer's own seeds.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from candle_mi_parity.compare import compare
from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.trace import trace
from proof import fuzz, fuzz_traces
from proof.fuzz import one, run_target
from proof.fuzz_mutants import ODD_VALUES, dumped, places
from proof.fuzz_targets import NAMED, TARGETS, Target, refused

SEEDS = 40
SMALL = [target for target in TARGETS if "emitter" not in target.name and "run" not in target.name]


@pytest.mark.parametrize("target", SMALL, ids=lambda target: target.name)
def test_no_mutant_passes_crashes_or_hangs(tmp_path: Path, target: Target) -> None:
    mutant, outcomes = target.make(tmp_path), set()
    for seed in range(SEEDS):
        outcome, fault = one(target, seed, mutant)
        assert not fault, f"python -m proof.fuzz --target '{target.name}' --seed {seed}: {fault}"
        outcomes.add(outcome)
    assert "refused" in outcomes or "FAIL" in outcomes, "no mutant of these did any harm: nothing is tested"


@pytest.mark.rust
def test_no_mutant_of_a_request_ends_the_emitter(tmp_path: Path) -> None:
    target = NAMED["emitter: requests"]
    mutant = target.make(tmp_path)
    assert {one(target, seed, mutant)[1] for seed in range(SEEDS)} == {""}


@functools.cache
def document_places() -> list[tuple[Any, ...]]:
    """The path of every value in the document of the cut trace."""

    def walk(tree: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
        return [(*path, key) for key in keys] + [found for key in keys for found in walk(tree[key], (*path, key))]

    return walk(fuzz_traces.cut("llama/hub").document, ())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(ODD_VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_a_changed_tree_is_refused_or_judged_and_passes_with_evidence_alone(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    case, directory = fuzz_traces.cut("llama/hub"), tmp_path_factory.getbasetemp() / "tree"
    compared = fuzz_traces.honest("llama/hub", directory)
    tree = copy.deepcopy(case.document)
    *way, last = data.draw(st.sampled_from(document_places()))
    holder = functools.reduce(lambda found, key: found[key], way, tree)
    holder[last] = data.draw(json_values | st.just(copy.deepcopy(tree[data.draw(st.sampled_from(list(tree)))])))
    (directory / case.path).write_bytes(dumped(tree))
    refused(lambda: fuzz_traces.outcome(case, directory, compared))


def test_every_value_of_a_document_can_be_reached() -> None:
    assert len(document_places()) == sum(1 for _ in places(fuzz_traces.cut("llama/hub").document)) > 60


# --- the fuzzer sees what it looks for


def planted_fault(kind: str) -> Callable[[Random], str]:
    def fault(_rng: Random) -> str:
        if kind == "exception":
            raise IndexError("planted")
        if kind == "hang":
            while True:
                pass
        if kind == "crash":
            os._exit(3)
        if kind == "memory":
            return str(len(bytearray(2 * fuzz.MEMORY)))
        return "fine"

    return fault


@pytest.mark.parametrize(
    ("kind", "said"),
    [("exception", "IndexError"), ("hang", "hang"), ("crash", "ended with 3"), ("memory", "MemoryError")],
)
def test_a_planted_fault_is_found_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, kind: str, said: str) -> None:
    def make(_directory: Path) -> Callable[[Random], str]:
        faulty, fine = planted_fault(kind), planted_fault("fine")
        hit = fuzz.generator("planted", 1).random()
        return lambda rng: faulty(rng) if rng.random() == hit else fine(rng)

    target = Target("planted", 4, make)
    monkeypatch.setitem(NAMED, "planted", target)
    monkeypatch.setattr(fuzz, "SECONDS", 3.0)
    tally = run_target(target, range(4))
    assert list(tally.faults) == [1] and said in tally.faults[1]
    assert tally.outcomes == {"fine": 3} and tally.mutants == 4


def spoil_value(directory: Path, factor: float) -> fuzz_traces.Cut:
    """The cut trace with one tensor scaled and all digests renewed."""
    case = fuzz_traces.cut("llama/hub")
    tensors = dict(case.tensors)
    tensors["logits"] = tensors["logits"] * factor
    save_file(tensors, directory / case.file)
    document = copy.deepcopy(case.document)
    content = tensors["logits"].contiguous().numpy().tobytes()
    next(e for e in document["tensors"] if e["name"] == "logits")["sha256"] = hashlib.sha256(content).hexdigest()
    (directory / case.path).write_bytes(dumped(document))
    return case


def test_a_gate_that_is_open_is_a_wrong_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = fuzz_traces.honest("llama/hub", tmp_path)
    case = spoil_value(tmp_path, 1.001)
    assert fuzz_traces.outcome(case, tmp_path, compared) == "FAIL"
    monkeypatch.setattr("candle_mi_parity.compare.gate.Measure.passes", lambda _: True)
    with pytest.raises(fuzz_traces.WrongPassError, match="logits outside the gate"):
        fuzz_traces.outcome(case, tmp_path, compared)


def test_a_digest_that_nobody_checks_is_a_wrong_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = fuzz_traces.honest("llama/hub", tmp_path)
    monkeypatch.setattr(trace.Trace, "_check_kind", lambda *_: None)
    monkeypatch.setattr(compare, "_judge_stretches", lambda name, *_: TensorResult(name, Status.PASS, compared=1))
    case = spoil_value(tmp_path, 2.0)
    with pytest.raises(fuzz_traces.WrongPassError, match="fewer numbers compared"):
        fuzz_traces.outcome(case, tmp_path, compared)


def test_a_tiny_change_passes_as_inside_the_gate(tmp_path: Path) -> None:
    compared = fuzz_traces.honest("llama/hub", tmp_path)
    assert fuzz_traces.outcome(fuzz_traces.cut("llama/hub"), tmp_path, compared) == "equal"
    case = spoil_value(tmp_path, float(np.float32(1 + 2**-23)))
    assert fuzz_traces.outcome(case, tmp_path, compared) == "inside the gate"


# --- numbers beside the tensors that nothing is compared with


@pytest.mark.parametrize(
    ("case_id", "edit"),
    [
        ("llama/hub", lambda d: d["scalars"].update({"sae.reconstruction_mse": 0.5})),
        ("llama/hub", lambda d: d["scalars"].update({"odd": 0.5})),
        ("llama/hub", lambda d: d.update(top_features_last_pos=[{"index": 1, "value": 2.0}])),
        ("gemma2/hub", lambda d: d["scalars"].update({"odd": 0.5})),
        ("gemma2/hub", lambda d: d["top_features_last_pos"].pop()),
        ("gemma2/hub", lambda d: d["top_features_last_pos"].append({"index": 95, "value": 0.0})),
        ("llama/hub", lambda d: d["header"].update(device="cuda:0")),
        ("llama/hub", lambda d: d["header"]["case"].update(id="llama/v5")),
    ],
)
def test_what_is_given_beside_the_tensors_is_compared_or_refused(
    tmp_path: Path, case_id: str, edit: Callable[[dict[str, Any]], object]
) -> None:
    case, compared = fuzz_traces.cut(case_id), fuzz_traces.honest(case_id, tmp_path)
    document = copy.deepcopy(case.document)
    edit(document)
    (tmp_path / case.path).write_bytes(dumped(document))
    assert refused(lambda: fuzz_traces.outcome(case, tmp_path, compared)) in ("refused", "FAIL")


@pytest.mark.parametrize("columns", [[0], list(range(99)), [0] * 100, list(range(100))[::-1], None])
def test_a_trace_cannot_choose_which_logits_are_compared(tmp_path: Path, columns: list[int] | None) -> None:
    """With its digest renewed, one logit that agrees stood for the hundred that are kept."""
    case, compared = fuzz_traces.cut("llama/one-token"), fuzz_traces.honest("llama/one-token", tmp_path)
    document, tensors = copy.deepcopy(case.document), dict(case.tensors)
    entry = next(entry for entry in document["tensors"] if entry["name"] == "logits")
    there = entry["part"]["columns"]
    wanted = there if columns is None else [there[i] for i in columns]
    tensors["logits"] = torch.stack([case.tensors["logits"][..., there.index(i)] for i in wanted], -1).contiguous()
    entry["part"]["columns"], entry["shape"] = wanted, list(tensors["logits"].shape)
    entry["sha256"] = hashlib.sha256(tensors["logits"].numpy().tobytes()).hexdigest()
    save_file(tensors, tmp_path / case.file)
    (tmp_path / case.path).write_bytes(dumped(document))
    said = refused(lambda: fuzz_traces.outcome(case, tmp_path, compared))
    assert said == ("equal" if columns is None else "refused")
