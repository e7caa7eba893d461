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
    assert (tmp_path / "comment.md").read_text(encoding="utf-8") == ""
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


# --- the steps alone, with a suite that only notes what it was asked -------------------------------


SUITE = """#!/bin/sh
echo "$@" >>"$NOTES"
[ "$1" = run ] && exit "${RUN_ENDS:-0}"
git -C "${2#path:}" rev-parse HEAD >>"$NOTES"
while [ "$1" != --out ]; do shift; done
mkdir -p "$2" && printf %s "${CHANGED-}" >"$2/diff.md"
exit "${DIFF_ENDS:-0}"
"""
GH = """#!/bin/sh
echo "$@" >>"$NOTES"
case "$*" in
*--paginate*) [ "${GH_ENDS:-0}" -eq 0 ] && printf '%s' "$FOUND" ;;
*) for word; do case $word in body=@*) cat "${word#body=@}" >>"$NOTES" ;; esac; done ;;
esac
exit "${GH_ENDS:-0}"
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Steps:
    """The action's scripts beside a program that stands in for this suite, and one for ``gh``."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.out, self.notes = directory, directory / "out", directory / "notes"
        for name in ("action.sh", "comment.sh"):
            program(directory / "suite" / ".github" / name, (ROOT / ".github" / name).read_text(encoding="utf-8"))
        program(directory / "suite" / "setup.sh", 'echo set up >>"$NOTES"\n')
        program(directory / "suite" / ".venv" / "bin" / "candle-mi-parity", SUITE)
        program(directory / "bin" / "gh", GH)

    def run(self, script: str, *arguments: str, **given: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.directory / "bin"), os.environ["PATH"]])
        github = {name for name in os.environ if name.startswith("GITHUB_")}
        clean = {name: value for name, value in os.environ.items() if name not in github}
        own = {"NOTES": str(self.notes), "PATH": path, "PARITY_CACHE": str(self.directory / "cache")}
        self.notes.write_text("", encoding="utf-8")
        return subprocess.run(
            [self.directory / "suite" / ".github" / script, *arguments],
            env=clean | own | {"OUT": str(self.out), "GITHUB_REPOSITORY": "o/r", "FOUND": ""} | given,
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )

    def judge(self, checkout: Path, **given: str) -> subprocess.CompletedProcess[str]:
        return self.run("action.sh", CANDLE_MI=str(checkout), **given)

    @property
    def noted(self) -> list[str]:
        return self.notes.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(tmp_path)


def said(repository: Path, *arguments: str) -> str:
    done = subprocess.run([*GIT, *arguments], cwd=repository, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """``main``, which moved on after GitHub made ``merge`` of it and a pull request."""
    repository = tmp_path / "origin"
    repository.mkdir()
    git(repository, "init", "--quiet", "--initial-branch", "main")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "base")
    git(repository, "checkout", "--quiet", "-b", "change")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "change")
    git(repository, "checkout", "--quiet", "-b", "merge", "main")
    git(repository, "merge", "--quiet", "--no-ff", "--message", "merge", "change")
    git(repository, "checkout", "--quiet", "main")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "moved on")
    return repository


def clone(origin: Path, branch: str, *options: str) -> Path:
    target = origin.with_name("candle-mi")
    git(
        origin.parent,
        "clone",
        "--quiet",
        "--single-branch",
        "--branch",
        branch,
        *options,
        f"file://{origin}",
        str(target),
    )
    return target


@pytest.mark.thorough
def test_a_pull_request_is_compared_with_the_base_of_its_merge(steps: Steps, origin: Path) -> None:
    """actions/checkout leaves a clone of depth 1, which does not know the parents of its commit."""
    there = clone(origin, "merge", "--depth", "1")
    event = {"GITHUB_BASE_REF": "main", "GITHUB_SHA": said(origin, "rev-parse", "merge")}
    done = steps.judge(there, BASE="main", CHANGED="worse", **event)
    assert done.returncode == 0 and "::warning::" not in done.stdout, done.stdout + done.stderr
    assert steps.noted[-2] == f"diff path:{steps.out}/base/ path:{there} --out {steps.out}/diff"
    assert steps.noted[-1] == said(origin, "rev-parse", "merge^1") != said(origin, "rev-parse", "main")
    assert (steps.out / "comment.md").read_text(encoding="utf-8") == "worse"
    assert len(said(there, "worktree", "list").splitlines()) == 1 and not (steps.out / "base").exists()
    # Of a checkout of something else, as the head alone, it is the branch.
    steps.judge(there, BASE="main", **event | {"GITHUB_SHA": "0" * 40})
    assert steps.noted[-1] == said(origin, "rev-parse", "main")


@pytest.mark.thorough
def test_a_whole_clone_stays_whole(steps: Steps, origin: Path) -> None:
    there = clone(origin, "merge")
    steps.judge(there, BASE="main")
    assert steps.noted[-1] == said(origin, "rev-parse", "main")
    assert said(there, "rev-parse", "--is-shallow-repository") == "false"


@pytest.mark.thorough
@pytest.mark.parametrize(("ends", "code"), [("0", 0), ("1", 1), ("2", 2), ("3", 3)])
def test_a_base_that_cannot_be_fetched_is_said_and_costs_no_verdict(
    steps: Steps, origin: Path, ends: str, code: int
) -> None:
    done = steps.judge(clone(origin, "merge"), BASE="no-such-branch", RUN_ENDS=ends)
    assert done.returncode == code
    assert "::warning::candle-mi-parity could not compare with no-such-branch" in done.stdout
    assert not [line for line in steps.noted if line.startswith("diff")] and not (steps.out / "comment.md").exists()


@pytest.mark.thorough
def test_a_base_that_does_not_build_gets_no_comment(steps: Steps, origin: Path) -> None:
    done = steps.judge(clone(origin, "merge"), BASE="main", DIFF_ENDS="2", CHANGED="half a table")
    assert done.returncode == 0 and "::warning::" in done.stdout and not (steps.out / "comment.md").exists()


@pytest.mark.thorough
def test_globs_are_those_of_cases_and_not_of_files(steps: Steps, origin: Path) -> None:
    (steps.directory / "llama").mkdir()
    (steps.directory / "llama" / "a-file").touch()
    steps.judge(clone(origin, "main"), CASES="llama/* *")
    assert steps.noted[-1].endswith("--cases llama/* --cases *")


@pytest.mark.thorough
def test_a_missing_file_of_expected_divergences_is_said_before_anything_is_done(steps: Steps, origin: Path) -> None:
    done = steps.judge(clone(origin, "main"), KNOWN="parity.toml")
    assert (done.returncode, steps.noted) == (2, [])
    assert done.stderr.startswith("::error::candle-mi-parity: the file of expected divergences parity.toml is not in")


@pytest.mark.thorough
def test_without_a_comment_the_summary_has_the_table(steps: Steps, origin: Path) -> None:
    summary = steps.directory / "summary.md"
    steps.judge(clone(origin, "merge"), BASE="main", CHANGED="worse", GITHUB_STEP_SUMMARY=str(summary))
    assert summary.read_text(encoding="utf-8") == "worse"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("text", "found", "asked", "body"),
    [
        ("worse", "", "--method POST repos/o/r/issues/7/comments", "worse"),
        ("worse", "12\n13\n", "--method PATCH repos/o/r/issues/comments/12", "worse"),
        ("", "12\n", "--method PATCH repos/o/r/issues/comments/12", "No number or outcome differs"),
        ("", "", "", ""),
        (None, "12\n", "", ""),
    ],
    ids=["first", "later", "no longer", "nothing changed", "nothing was compared"],
)
def test_the_one_comment_is_the_action_s_own(
    steps: Steps, text: str | None, found: str, asked: str, body: str
) -> None:
    """``gh pr comment --edit-last`` would edit the last comment of any workflow."""
    file = steps.directory / "comment.md"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    done = steps.run("comment.sh", "7", str(file), FOUND=found)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [line for line in steps.noted if "--method" in line and asked in line] == steps.noted[1:2]
    if body:
        assert steps.noted[2] == "<!-- candle-mi-parity -->" and steps.noted[3].startswith(body)
        assert 'startswith("<!-- candle-mi-parity -->")' in steps.noted[0]


@pytest.mark.thorough
def test_a_fork_without_permission_gets_a_warning(steps: Steps) -> None:
    (steps.directory / "comment.md").write_text("worse", encoding="utf-8")
    done = steps.run("comment.sh", "7", str(steps.directory / "comment.md"), GH_ENDS="1")
    assert done.returncode == 0 and done.stdout.startswith("::warning::no comment: the workflow needs pull-requests")
