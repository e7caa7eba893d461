"""The branches of candle-mi that an emitter takes, read from its counters."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.candidate import coverage_map
from candle_mi_parity.candidate.branches import Branches
from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.coverage_map import BranchError
from candle_mi_parity.candidate.plan import COUNTING
from candle_mi_parity.candidate.process import EmitterProcess
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.spec.paths import cache_root

CANDLE_MI = """
pub mod config {
    pub fn parse(x: i64) -> Result<i64, String> {
        if x > 3 {
            check(x)?;
            Ok(1)
        } else {
            Ok(x * 2)
        }
    }
    fn check(x: i64) -> Result<(), String> {
        if x == 7 {
            return Err("seven".into());
        }
        Ok(())
    }
    pub fn shown<T: std::fmt::Debug>(value: T) -> String {
        format!("{value:?}")
    }
}
pub mod unused {
    pub fn never() -> i64 {
        4
    }
}
"""
EMITTER = """
fn main() {
    for line in std::io::stdin().lines() {
        println!("{}", candle_mi::config::shown(candle_mi::config::parse(line.unwrap().parse().unwrap())));
    }
}
"""


def compile_toy(root: Path, *wrapper: Path) -> Path:
    """An emitter that reads numbers, on a toy of candle-mi."""
    if shutil.which("rustc") is None:
        pytest.skip("no rustc on PATH: install a Rust toolchain")
    for directory, text in {"mi": CANDLE_MI, "emitter": EMITTER}.items():
        (root / directory / "src").mkdir(parents=True)
        (root / directory / "src" / "lib.rs").write_text(text)
    common = ("--edition", "2021", "-O", "--out-dir", root)
    library = ("--crate-name", "candle_mi", "--crate-type", "lib", root / "mi/src/lib.rs")
    program = (
        "--crate-name",
        "parity_emitter",
        "--crate-type",
        "bin",
        "--extern",
        f"candle_mi={root}/libcandle_mi.rlib",
    )
    for arguments in (library, (*program, root / "emitter/src/lib.rs")):
        subprocess.run([*wrapper, "rustc", *arguments, *common], check=True, cwd=root)
    return root / "parity_emitter"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_toy(tmp_path_factory.mktemp("toy"), COUNTING)


@contextmanager
def running(binary: Path, branches: Branches) -> Iterator["Toy"]:
    process = subprocess.Popen(
        [binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **branches.environment}
    )
    with process:
        yield Toy(process, branches)


class Toy:
    def __init__(self, process: "subprocess.Popen[bytes]", branches: Branches) -> None:
        self.process, self.branches = process, branches

    def lines(self, number: int) -> set[int]:
        """The lines of candle-mi that were reached after one more request."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(b"%d\n" % number)
        self.process.stdin.flush()
        assert self.process.stdout.readline()
        reached = self.branches.reached()
        return {region.line for region, yes in zip(self.branches.regions, reached, strict=True) if yes}


def line(text: str) -> int:
    return CANDLE_MI[: CANDLE_MI.index(text)].count("\n") + 1


@pytest.mark.rust
def test_regions_are_reached_while_the_process_runs(toy: Path, tmp_path: Path) -> None:
    branches = Branches(toy, tmp_path / "counters.profraw")
    assert {region.file for region in branches.regions} == {"lib.rs"}, "nothing of the emitter's own"
    with running(toy, branches) as emitter:
        high = emitter.lines(5)
        assert line("check(x)?") in high and line("Ok(1)") in high and line("Ok(())") in high
        assert line("Ok(x * 2)") not in high and line("return Err") not in high
        assert emitter.lines(5) == high, "a second identical request reaches nothing new"
        # rustc gives the branch behind `else` no counter of its own.
        assert emitter.lines(1) - high == {line("Ok(x * 2)")}
        assert line("return Err") in emitter.lines(7)
        assert line("4\n") not in emitter.lines(7)


@pytest.mark.rust
def test_what_an_ended_process_reached_is_kept(toy: Path, tmp_path: Path) -> None:
    branches = Branches(toy, tmp_path / "counters.profraw")
    with running(toy, branches) as emitter:
        first = emitter.lines(5)
    with running(toy, branches) as emitter:
        assert emitter.lines(1) == first | {line("Ok(x * 2)")}


@pytest.mark.rust
def test_functions_and_those_never_entered(toy: Path, tmp_path: Path) -> None:
    branches = Branches(toy, tmp_path / "counters.profraw")
    with running(toy, branches) as emitter:
        emitter.lines(1)
    found = branches.functions()
    reached, regions = found["lib.rs: config::parse"]
    assert 0 < reached < regions
    assert found["lib.rs: unused::never"][0] == 0
    assert sum(regions for _, regions in found.values()) == len(branches.regions)
    shown = [counts for name, counts in found.items() if "config::shown" in name]
    assert [reached for reached, _ in shown] == [regions for _, regions in shown], "compiled with the emitter"
    assert branches.never_entered() == ["lib.rs: config::check", "lib.rs: unused::never"]


@pytest.mark.rust
def test_a_damaged_profile_is_an_error_that_says_so(toy: Path, tmp_path: Path) -> None:
    profile = tmp_path / "counters.profraw"
    branches = Branches(toy, profile)
    with pytest.raises(BranchError, match=r"counters\.profraw: the emitter wrote no counters: No such file"):
        branches.reached()
    with running(toy, branches) as emitter:
        emitter.lines(5)
    whole = profile.read_bytes()
    for damaged, error in {
        b"": "0 bytes",
        whole[:100]: "100 bytes",
        b"\0" + whole[1:]: "magic number",
        whole[:8] + b"\x0b" + whole[9:]: r"', 11, \d+, \d+\), expected .*another LLVM",
        whole[:40] + b"\xff" + whole[41:]: "number of functions and of counters are .*damaged",
        whole[:300]: "300 bytes, expected at least",
    }.items():
        profile.write_bytes(damaged)
        with pytest.raises(BranchError, match=error):
            branches.reached()


@pytest.mark.rust
def test_a_build_without_counters_is_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(BranchError, match="counts no branches: it has no section __llvm_prf_data"):
        Branches(compile_toy(tmp_path / "plain"), tmp_path / "x")
    with pytest.raises(BranchError, match="LLVM would replace the %"):
        Branches(toy, tmp_path / "50%p")
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(BranchError, match="executables of 64-bit Linux only"):
        Branches(script, tmp_path / "x")
    raw = toy.read_bytes()
    sections = coverage_map._sections(raw)
    header, records = sections["covmap"][1][:16], sections["covfun"][1]
    script.write_bytes(raw.replace(header, header[:12] + b"\x07\0\0\0"))
    with pytest.raises(BranchError, match="map of version 8, expected 7"):
        Branches(script, tmp_path / "x")
    script.write_bytes(raw.replace(records, b"\xff" * len(records)))
    with pytest.raises(BranchError, match="script: its coverage map cannot be read: "):
        Branches(script, tmp_path / "x")


@pytest.mark.rust
@pytest.mark.thorough
def test_the_real_emitter_reaches_more_with_another_family(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    if shutil.which("cargo") is None:
        pytest.skip("no cargo on PATH: install a Rust toolchain")
    shape: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "llama")
    Gemma2ForCausalLM(Gemma2Config(**shape)).save_pretrained(tmp_path / "gemma2")

    def answer(emitter: EmitterProcess, family: str, out: str) -> bytes:
        request = {
            "format": "candle-mi-parity/request/1", "case": {"id": family, "digest": "00"},
            "model_dir": str(tmp_path / family), "tokens": [[1, 5, 7, 2]], "captures": ["blocks.1.hook_resid_post"],
            "logits": True, "dtype": "float32", "device": "cpu", "out": str(tmp_path / f"{out}.json"),
        }  # fmt: skip
        return emitter.emit(request, timeout=120).with_suffix(".safetensors").read_bytes()

    candidate = parse_candidate("0.2.2")
    plain = build(candidate, cache_root(), print)
    counted = build(candidate, cache_root(), print, counted=True)
    branches = Branches(counted.path, tmp_path / "counters.profraw")
    with (
        EmitterProcess(counted.path, environment=branches.environment) as emitter,
        EmitterProcess(plain.path) as other,
    ):
        assert answer(emitter, "llama", "a") == answer(other, "llama", "b"), "counting changes no bit"
        llama = branches.reached()
        answer(emitter, "llama", "c")
        assert np.array_equal(branches.reached(), llama)
        answer(emitter, "gemma2", "d")
        new = branches.reached() & ~llama
    functions = {branches.function[region] for region, yes in zip(branches.regions, new, strict=True) if yes}
    assert "config.rs: config::TransformerConfig::parse_gemma2" in functions
    assert "config.rs: config::TransformerConfig::parse_phi3" in branches.never_entered()
