"""What costs time and memory: the profile of a checkout's build, and a comparison that needs one tensor at a time."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from test_candidate import write_crate

from candle_mi_parity import build as builder
from candle_mi_parity.candidate import CandidateError, parse_candidate
from proof import bench, bench_dump


def committed(root: Path) -> str:
    """A git repository that holds a crate; its URL at HEAD."""
    crate = write_crate(root)
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "a")):
        subprocess.run(["git", "-C", str(crate), *command], check=True)
    return f"git:{crate}@HEAD"


def cargo_that_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    """A toolchain on PATH whose cargo fails with a shell's rendering of ``said``."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {"rustc": "echo rustc 9.9.9", "cargo": f'echo "error: {said}" >&2; exit 101'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("told", ["0", "1", None])
def test_a_checkout_alone_is_built_incrementally(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str | None
) -> None:
    cargo_that_says(monkeypatch, tmp_path, "$* incremental=$CARGO_INCREMENTAL")
    if told is None:
        monkeypatch.delenv("CARGO_INCREMENTAL", raising=False)
    else:
        monkeypatch.setenv("CARGO_INCREMENTAL", told)
    specs = {f"path:{write_crate(tmp_path / 'crate')}": "1", "0.2.2": "0", committed(tmp_path / "repository"): "0"}
    for spec, incremental in specs.items():
        with pytest.raises(CandidateError, match=f"--release .* incremental={incremental} "):
            builder.build(parse_candidate(spec), tmp_path / "cache", lambda line: None)


def test_cargo_does_not_take_an_old_file_of_a_checkout_for_a_built_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``cp -p`` of a file with another text: cargo finds it older than its output, and keeps the output."""
    cargo_that_says(monkeypatch, tmp_path, "built=$(cd $CARGO_TARGET_DIR/release/.fingerprint && echo *)")
    marks = tmp_path / "cache" / "target" / "candle-0.11" / "release" / ".fingerprint"
    for name in ("candle-mi-0123456789abcdef", "candle-core-0123456789abcdef"):
        (marks / name).mkdir(parents=True)
    for spec, left in (
        ("0.2.2", "candle-core-\\w+ candle-mi-\\w+"),
        (f"path:{write_crate(tmp_path / 'crate')}", "candle-core-\\w+"),
    ):
        with pytest.raises(CandidateError, match=f"built={left} "):
            builder.build(parse_candidate(spec), tmp_path / "cache", lambda line: None)


def honest_dump(directory: Path, tensors: int, tensor_bytes: int, arm: str) -> float:
    """Peak memory of a comparison, in units of the largest tensor."""
    largest = bench_dump.generate(directory, tensors, tensor_bytes)
    cost = bench_dump.costs(directory, [arm], rounds=1)[arm]
    return max(cost.allocated, cost.resident) / largest


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["ours", "load_everything"])
def test_a_dump_of_200_mb_is_compared_one_tensor_at_a_time(tmp_path: Path, arm: str) -> None:
    peak = honest_dump(tmp_path, 5, 40 << 20, arm)
    assert (peak < bench.PEAK) == (arm == "ours"), f"{arm} holds {peak:.1f} times the largest tensor"
