"""A divergence of RWKV made small: its script needs torch alone, and its Rust test fails where the fault is."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.judge.reproducible import not_reproducible
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.repro.command import repro
from candle_mi_parity.repro.crate import Dependencies
from candle_mi_parity.repro.prove import TestOutcome
from candle_mi_parity.repro.repro import Reproduction, reproduce
from candle_mi_parity.repro.write import Origin, write_folder
from candle_mi_parity.spec.cases import Case, load_cases, select
from candle_mi_parity.spec.hook_points import STATE
from candle_mi_parity.spec.paths import cache_root
from tests.support.hunting import Faulty
from validation.catalogue import SourceEdit
from validation.source_faults import Checkout

STEER: dict[str, Any] = {"kind": "state_steer", "hook": f"blocks.1.{STATE}", "factor": 0.5, "at": [1, 40, 2]}
ALONE = "import runpy, sys; sys.modules['transformers'] = None; runpy.run_path(sys.argv[1])"
"""Runs a script for which there is no transformers, and nothing of this suite."""


def test_edits_of_a_recurrent_model_have_a_rust_test_unless_a_tensor_is_drawn() -> None:
    why = {case.id: not_reproducible(case) for case in select(load_cases(), ["rwkv*"])}
    left_out = {"edit-embed", "edit-resid-pre", "edit-patch", "edit-state-and-stream", "edit-replace", "edit-zero"}
    assert {name.partition("/")[2] for name, reason in why.items() if reason} == {*left_out, "float16-large"}
    assert why["rwkv7/edit-zero"] == "no Rust test is written for zero at blocks.1.hook_resid_pre"


def planted(model: str, rest: dict[str, Any], wrong: Callable[[dict[str, Any]], str], out: Path) -> Reproduction:
    """The reproduction of a fault in a tensor that the config and the case decide, and its folder."""

    def fault(subject: PreparedCase, arrays: dict[str, np.ndarray]) -> None:
        config = json.loads((subject.model_dir / "config.json").read_text())
        name = wrong(config | {"edits": subject.case.edits})
        if name:
            arrays[name] *= 1.01

    row: dict[str, Any] = {"source": "tiny", "config": f"models/{model}.json", "dialect": "hub"}
    row |= rest.pop("model", {})
    case = Case.model_validate(
        {"id": f"{model}/planted", "model": row, "tokens": {"random": 6}, "features": ["rwkv"]} | rest
    )
    found = reproduce(case, Faulty(fault), out / "cache", lambda line: None)
    write_folder(found, Origin("0.0.0", "again", ""), Dependencies("", "", None, b"", out), out / "folder")
    return found


JUMP = {"architecture": "jumprelu", "dtype": "float32", "hook_name": "blocks.0.hook_resid_post"}
SCRIPTS: list[tuple[str, dict[str, Any], Callable[[dict[str, Any]], str]]] = [
    (
        "rwkv7",
        {"model": {"change": {"norm_eps": 0.01}}, "edits": [STEER]},
        lambda config: f"blocks.{config['num_hidden_layers'] - 1}.{STATE}" if config.get("norm_eps") == 0.01 else "",
    ),
    (
        "rwkv6",
        {"model": {"change": {"tie_word_embeddings": True, "num_hidden_layers": 1}}}
        | {"edits": [{"kind": "scale", "hook": "blocks.0.hook_resid_post", "factor": 2.0}]},
        lambda config: "logits" if config.get("tie_word_embeddings") and config["edits"] else "",
    ),
    (
        "rwkv6",
        {"sae": {"layer": 0, "d_sae": 32, "threshold": 0.25, "cfg": JUMP}}
        | {"edits": [{"kind": "inject", "hook": JUMP["hook_name"], "position": 1, "features": [[3, 2.0]]}]},
        lambda config: "hook_final_norm" if config["edits"] else "",
    ),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("model", "rest", "wrong"), SCRIPTS, ids=["steered state", "scaled stream", "injection"])
def test_the_script_computes_the_truth_with_torch_alone(
    model: str, rest: dict[str, Any], wrong: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    found = planted(model, dict(rest), wrong, tmp_path)
    config = found.pair.case.config
    assert (config["hidden_size"], config["num_hidden_layers"], found.heads) == (2, 1, 1)
    assert found.first.worst is not None and found.first.worst.expected != 0
    folder = tmp_path / "folder"
    command = [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, sys.argv[2]); " + ALONE]
    done = subprocess.run([*command, folder / "check.py", folder], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(found.first.worst.expected, rel=1e-12, abs=1e-15)
    assert "candle_mi_parity" not in (folder / f"{model}.py").read_text().partition('"""\n')[2]
    issue = (folder / "ISSUE.md").read_text()
    assert f"transformers has no {model}." in issue and "feature rwkv" not in issue


FAULT = SourceEdit(
    file="src/rwkv/mod.rs",
    find="let norm = (sq_sum + 1e-12_f64)?.sqrt()?;",
    replace="let norm = (sq_sum + 1e-2_f64)?.sqrt()?;",
)
"""The keys that RWKV-7's state is cleared of are too short."""
FIX = SourceEdit(
    file="src/rwkv/config.rs",
    find=".map_or(self.norm_eps, |d| self.norm_eps * (d as f64).powi(2))",
    replace=".map_or(self.norm_eps, |d| 1e-5 * (d as f64).powi(2))",
)
"""What makes candle-mi 0.2.2 right in rwkv6/eps."""


@pytest.mark.thorough
@pytest.mark.rust
@pytest.mark.xdist_group("repro")
def test_the_rust_test_fails_on_a_planted_fault_and_passes_on_the_release(tmp_path: Path) -> None:
    with Checkout(cache_root()).planted(FAULT) as candidate:
        [found] = repro("rwkv7/hub", candidate, tmp_path, cache_root(), lambda line: None, proof=True, fixed="0.2.2")
    assert (found.proof, found.fixed) == (TestOutcome.DIFFERS, TestOutcome.PASSES) and found.proven
    assert found.reproduction.first.name == f"blocks.0.{STATE}"
    assert ", 1 layers of width 2, 1 heads, 2 tokens; test: differs on the candidate" in found.line()


@pytest.mark.thorough
@pytest.mark.rust
@pytest.mark.xdist_group("repro")
def test_the_rust_test_of_a_known_divergence_passes_once_it_is_fixed(tmp_path: Path) -> None:
    with Checkout(cache_root()).planted(FIX) as fixed:
        [found] = repro("rwkv6/eps", "0.2.2", tmp_path, cache_root(), lambda line: None, fixed=fixed)
    assert (found.proof, found.fixed) == (TestOutcome.DIFFERS, TestOutcome.PASSES)
    assert "RwkvConfig::from_hf_config" in (found.folder / "tests/parity_rwkv6_eps.rs").read_text()
    [state] = repro("rwkv6/edit-state-both-apart", "0.2.2", tmp_path, cache_root(), lambda line: None, proof=True)
    assert state.proof is TestOutcome.DIFFERS
    text = (state.folder / "tests/parity_rwkv6_edit_state_both_apart.rs").read_text()
    assert "StateKnockoutSpec::new()" in text and "StateSteeringSpec::new(2.0)" in text
