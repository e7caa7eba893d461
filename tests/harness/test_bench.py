"""What costs time and memory: the profile of a checkout's build, and a comparison that needs one tensor at a time."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from test_candidate import write_crate

from candle_mi_parity import build as builder
from candle_mi_parity.candidate import CandidateError, parse_candidate


def committed(root: Path) -> str:
    """A git repository that holds a crate; its URL at HEAD."""
    crate = write_crate(root)
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "a")):
        subprocess.run(["git", "-C", str(crate), *command], check=True)
    return f"git:{crate}@HEAD"


@pytest.mark.parametrize("told", ["0", "1", None])
def test_a_checkout_alone_is_built_incrementally(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str | None
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {
        "rustc": "echo rustc 9.9.9",
        "cargo": 'echo "error: $* incremental=$CARGO_INCREMENTAL" >&2; exit 101',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    if told is None:
        monkeypatch.delenv("CARGO_INCREMENTAL", raising=False)
    else:
        monkeypatch.setenv("CARGO_INCREMENTAL", told)
    specs = {f"path:{write_crate(tmp_path / 'crate')}": "1", "0.2.2": "0", committed(tmp_path / "repository"): "0"}
    for spec, incremental in specs.items():
        with pytest.raises(CandidateError, match=f"--release .* incremental={incremental} "):
            builder.build(parse_candidate(spec), tmp_path / "cache", lambda line: None)
