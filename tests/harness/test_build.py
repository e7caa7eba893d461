"""The build of a checkout: in part, and never an older text than the one that is there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_mi_parity.candidate import build as builder
from candle_mi_parity.candidate.candidate import CandidateError, parse_candidate
from tests.harness.test_candidate import write_crate


def committed(root: Path) -> str:
    """A git repository that holds a crate; its URL at HEAD."""
    crate = write_crate(root)
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "a")):
        subprocess.run(["git", "-C", str(crate), *command], check=True)
    return f"git:{crate}@HEAD"


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Put a rustc on PATH, and a cargo that fails with a text of its own."""

    def put(said: str) -> None:
        tools = tmp_path / "bin"
        tools.mkdir()
        for name, script in {"rustc": "echo rustc 9.9.9", "cargo": f'echo "error: {said}" >&2; exit 101'}.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    return put


@pytest.mark.parametrize("told", ["0", "1", None])
def test_a_checkout_alone_is_built_incrementally(
    says: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str | None
) -> None:
    says("$* incremental=$CARGO_INCREMENTAL")
    if told is None:
        monkeypatch.delenv("CARGO_INCREMENTAL", raising=False)
    else:
        monkeypatch.setenv("CARGO_INCREMENTAL", told)
    specs = {f"path:{write_crate(tmp_path / 'crate')}": "1", "0.2.2": "0", committed(tmp_path / "repository"): "0"}
    for spec, incremental in specs.items():
        with pytest.raises(CandidateError, match=f"--release .* incremental={incremental} "):
            builder.build(parse_candidate(spec), tmp_path / "cache", lambda line: None)


def test_what_cargo_knows_of_our_files_times_is_forgotten(says: Callable[[str], None], tmp_path: Path) -> None:
    """A file put back with an old time, or written after the clock was set back, would pass for unchanged, and the
    build of before for this one."""
    says("known: $(ls $CARGO_TARGET_DIR/release/.fingerprint | tr '\\n' ' ').")
    known = tmp_path / "cache" / "target" / "candle-0.11" / "release" / ".fingerprint"
    for name in ("candle-mi-0a1b", "candle-core-2c3d", "parity-emitter-4e5f"):
        (known / name).mkdir(parents=True)
    with pytest.raises(CandidateError, match=r"known: candle-core-2c3d candle-mi-0a1b \."):
        builder.build(parse_candidate("0.2.2"), tmp_path / "cache", lambda line: None)
    with pytest.raises(CandidateError, match=r"known: candle-core-2c3d \."):
        builder.build(
            parse_candidate(f"path:{write_crate(tmp_path / 'crate')}"), tmp_path / "cache", lambda line: None
        )


@pytest.mark.parametrize("release", sorted(lock.stem for lock in (builder.EMITTER / "locks").glob("*.lock")))
def test_a_release_is_built_from_its_lock(says: Callable[[str], None], tmp_path: Path, release: str) -> None:
    says("$*")
    with pytest.raises(CandidateError, match=r"build --release .* --locked "):
        builder.build(parse_candidate(release), tmp_path / "cache", lambda line: None)
    (lock,) = (tmp_path / "cache" / "crates").glob("*/Cargo.lock")
    assert lock.read_bytes() == (builder.EMITTER / "locks" / f"{release}.lock").read_bytes()
