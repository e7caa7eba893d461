"""The action's own steps, run here: a pull request that breaks a case fails and is told in one short table."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from candle_mi_parity.spec.paths import ROOT, cache_root
from validation.source_faults import released_crate

GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]


def git(repository: Path, *arguments: str) -> None:
    subprocess.run([*GIT, *arguments], cwd=repository, check=True, capture_output=True)


@pytest.fixture(scope="module")
def pull_request(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """candle-mi in a repository; its second commit changes only a comment."""
    repository = tmp_path_factory.mktemp("action") / "candle-mi"
    shutil.copytree(released_crate(), repository, ignore=shutil.ignore_patterns(".cargo*", "target"))
    git(repository, "init", "--quiet")
    for message in ("base", "head"):
        (repository / "src" / "lib.rs").open("a").write(f"\n// {message}\n")
        git(repository, "add", "--all")
        git(repository, "commit", "--quiet", "--message", message)
    return repository


def action(checkout: Path, out: Path, **given: str) -> subprocess.CompletedProcess[str]:
    environment = {"CANDLE_MI": str(checkout), "OUT": str(out), "PARITY_CACHE": str(cache_root())} | given
    return subprocess.run(
        [ROOT / ".github" / "action.sh"], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.thorough
@pytest.mark.rust
def test_a_pull_request_that_changes_nothing_gets_no_comment(pull_request: Path, tmp_path: Path) -> None:
    done = action(pull_request, tmp_path, CASES="llama/hub gemma2/window", BASE="HEAD~1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "diff" / "diff.html").is_file(), done.stderr
    assert not (tmp_path / "comment.md").exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=pull_request, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1, "the base's worktree is left behind"


@pytest.mark.thorough
@pytest.mark.rust
def test_a_pull_request_that_breaks_a_case_fails_and_is_told_which(pull_request: Path, tmp_path: Path) -> None:
    attention = pull_request / "src" / "transformer" / "attention.rs"
    whole = attention.read_text(encoding="utf-8")
    cap = "if let Some(cap) = self.attn_logit_softcapping {"
    assert cap in whole
    attention.write_text(whole.replace(cap, cap.replace(" {", ".filter(|_| layer_idx != 1) {")), encoding="utf-8")
    try:
        done = action(pull_request, tmp_path, CASES="llama/hub gemma2/hub", BASE="HEAD")
    finally:
        attention.write_text(whole, encoding="utf-8")
    assert done.returncode == 1, done.stderr
    lines = (tmp_path / "comment.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 12
    assert "| 🔴 agrees → diverges | 1 | `gemma2/hub` |" in lines
    assert any("first blocks.1.attn.hook_pattern" in line.replace("\\", "") for line in lines)


@pytest.mark.thorough
@pytest.mark.rust
def test_a_base_that_does_not_exist_is_said_and_costs_no_verdict(pull_request: Path, tmp_path: Path) -> None:
    done = action(pull_request, tmp_path, CASES="llama/hub", KNOWN="none.toml")
    assert done.returncode == 2
    assert "none.toml" in done.stderr
