"""What a build of a checkout is kept under: everything that was compiled, and nothing else."""

import os
import time
from pathlib import Path

import pytest

from candle_mi_parity.candidate import build as builder
from candle_mi_parity.candidate import cargo
from candle_mi_parity.candidate.checkout import (
    OF_A_HOOK,
    configuration,
    fetch,
    note_inputs,
    tree_digest,
    written_since,
)
from candle_mi_parity.candidate.plan import plan_of
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.trace.trace import CandleMi
from tests.support.crate import committed, touch, write_crate


def watched_crate(root: Path, notes: Path) -> Path:
    """A crate in a workspace that a build has read: an included file, a sibling crate, and a build script's crate."""
    crate = write_crate(root / "work" / "candle-mi")
    touch(crate / "src" / "table.txt", "1")
    touch(root / "work" / "sibling" / "Cargo.toml", "[package]")
    touch(root / "work" / "sibling" / "lib.rs", "// a")
    touch(root / "work" / "scripted" / "data.csv", "1")
    touch(root / "work" / "Cargo.toml", "[workspace]")
    touch(root / "cache" / "crates" / "emitter" / "main.rs", "// ours")
    read = [
        crate / "src" / "lib.rs", crate / "src" / "table.txt", root / "work" / "sibling" / "lib.rs",
        root / "cache" / "crates" / "emitter" / "main.rs",
    ]  # fmt: skip
    info = root / "emitter.d"
    info.write_text(f"{root}/parity-emitter: " + " ".join(str(path).replace(" ", "\\ ") for path in read) + "\n")
    script = {
        "reason": "build-script-executed",
        "package_id": "path+" + (root / "work" / "scripted").as_uri() + "#0.1.0",
    }
    note_inputs(info, cargo.Ran(0, [], [script]), root / "cache", notes)
    return crate


@pytest.mark.parametrize(
    ("edited", "matters"),
    [
        ("work/candle-mi/src/lib.rs", True),
        ("work/candle-mi/src/new.rs", True),
        ("work/candle-mi/Cargo.toml", True),
        ("work/candle-mi/src/table.txt", True),  # include_str!
        ("work/sibling/lib.rs", True),
        ("work/sibling/Cargo.toml", True),
        ("work/scripted/data.csv", True),  # its build script says nothing about what it reads
        ("work/Cargo.toml", True),
        ("work/.cargo/config.toml", True),
        ("work/candle-mi/.cargo/config.toml", True),
        ("work/candle-mi/notes.md", False),
        ("work/candle-mi/target/x.rs", False),
        ("cache/crates/emitter/main.rs", False),  # is keyed apart
    ],
)
def test_the_digest_of_a_checkout_covers_what_is_compiled(tmp_path: Path, edited: str, matters: bool) -> None:
    root = tmp_path / "a b"
    crate = watched_crate(root, root / "inputs.txt")
    touch(crate / "target" / "CACHEDIR.TAG", "")
    before = tree_digest(crate, root / "inputs.txt")
    touch(root / edited, "# edited")
    assert (tree_digest(crate, root / "inputs.txt") != before) is matters
    (root / edited).unlink()
    if edited == "work/candle-mi/src/table.txt":
        assert tree_digest(crate, root / "inputs.txt") != before, "it is gone"


def test_an_edit_that_is_taken_back_is_seen(tmp_path: Path) -> None:
    """A build during such an edit must not be kept under the digest of what the tree holds before and after it."""
    crate, inputs = watched_crate(tmp_path, tmp_path / "inputs.txt"), tmp_path / "inputs.txt"
    digest, now = tree_digest(crate, inputs), (tmp_path / "inputs.txt").stat().st_ctime_ns
    assert not written_since(crate, inputs, now)
    time.sleep(0.05)
    touch(tmp_path / "work" / "sibling" / "lib.rs", "// b")
    touch(tmp_path / "work" / "sibling" / "lib.rs", "// a")
    os.utime(tmp_path / "work" / "sibling" / "lib.rs", (0, 0))
    assert tree_digest(crate, inputs) == digest and written_since(crate, inputs, now)


def test_a_checkout_that_was_edited_after_its_build_is_told(tmp_path: Path) -> None:
    crate = write_crate(tmp_path / "crate")
    candidate = parse_candidate(f"path:{crate}")
    digest = plan_of(candidate, tmp_path).tree_digest
    built = CandleMi(version="9.9.9", source="path", checksum=None, revision=None, tree_digest=digest)
    assert builder.changed_since(candidate, built, tmp_path) == ""
    touch(crate / "src" / "lib.rs", "// edited")
    assert "was edited after its emitter was built" in builder.changed_since(candidate, built, tmp_path)
    assert builder.changed_since(parse_candidate("0.2.2"), built, tmp_path) == ""


@pytest.mark.parametrize(
    ("change", "matters"),
    [("RUSTFLAGS", True), ("CARGO_PROFILE_RELEASE_LTO", True), ("RUSTC_WRAPPER", True), ("EDITOR", False)],
)
def test_the_environment_of_cargo_is_in_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str, matters: bool
) -> None:
    before = configuration(tmp_path)
    monkeypatch.setenv(change, "x")
    assert (configuration(tmp_path) != before) is matters
    touch(tmp_path / ".cargo" / "config.toml", "[build]")
    monkeypatch.delenv(change)
    assert configuration(tmp_path) != before


def test_a_hook_of_git_does_not_name_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    candidate = parse_candidate(committed(tmp_path / "repository"))
    for name in OF_A_HOOK:
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    for _ in range(2):  # cloned, then updated
        assert 'name = "candle-mi"' in fetch(candidate, tmp_path / "cache")[1]
