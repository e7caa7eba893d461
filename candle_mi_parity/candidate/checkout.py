"""The source of a candidate that is not a release: the digest of a directory, the commit of a revision."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from candle_mi_parity.candidate.spelling import Candidate, CandidateError, OutOfReachError
from candle_mi_parity.files import atomic


def tree_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of a crate's ``.rs`` and ``.toml`` files, without build outputs."""
    digest = hashlib.sha256()
    root = directory.expanduser()
    for path in sorted(_source_files(root), key=lambda path: path.relative_to(root).as_posix()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()}:{content}\n".encode())
    return digest.hexdigest()


def _source_files(root: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(root):
        # CACHEDIR.TAG marks cargo's output directory.
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not (Path(directory) / name / "CACHEDIR.TAG").exists()
        ]
        for name in files:
            path = Path(directory) / name
            if path.suffix in {".rs", ".toml"} and path.is_file():
                yield path


def fetch(candidate: Candidate, cache: Path) -> tuple[str, str]:
    """The commit of a ``git:`` candidate, and the text of its ``Cargo.toml``.

    :raises OutOfReachError: the repository cannot be cloned or updated.
    :raises CandidateError: git, the revision, or its ``Cargo.toml`` is missing.
    """
    mirror = cache / "git" / hashlib.sha256(candidate.target.encode()).hexdigest()[:16]
    mirror.parent.mkdir(parents=True, exist_ok=True)
    revision = candidate.revision or ""
    # A private repository is an error; git must not ask for a password.
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}

    def git(*arguments: str, failing: type[CandidateError] = CandidateError, remedy: str = "") -> str:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, env=environment)
        except FileNotFoundError:
            raise CandidateError("git is not on PATH: install it, or use path:DIR") from None
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise failing(f"{candidate.spec}: git says: {reason}{remedy}")
        return done.stdout.strip()

    def git_remote(*arguments: str) -> None:
        remedy = "; check the network and the URL, or use path:DIR"
        git(*arguments, failing=OutOfReachError, remedy=remedy)

    with FileLock(mirror.with_suffix(".lock")):
        if not mirror.is_dir():
            partial = mirror.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            git_remote("clone", "--quiet", "--mirror", "--", candidate.target, str(partial))
            atomic.put(partial, mirror)
        else:
            # A commit that is in the mirror needs no network; a branch may have moved.
            test = ["git", "-C", str(mirror), "cat-file", "-e", revision]
            is_commit = re.fullmatch(r"[0-9a-f]{40}", revision)
            if not is_commit or subprocess.run(test, capture_output=True, check=False).returncode != 0:
                git_remote("-C", str(mirror), "remote", "update", "--prune")
        commit = git("-C", str(mirror), "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
        commit = commit.splitlines()[-1]
        return commit, git("-C", str(mirror), "show", f"{commit}:Cargo.toml")
