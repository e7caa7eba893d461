"""The source of a candidate that is not a release: the digest of a directory, the commit of a revision."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Container, Iterator
from pathlib import Path

from filelock import FileLock

from candle_mi_parity.candidate.cargo import Ran
from candle_mi_parity.candidate.spelling import Candidate, CandidateError, OutOfReachError
from candle_mi_parity.files import atomic
from candle_mi_parity.files.atomic import write_text


def tree_digest(directory: Path, inputs: Path) -> str:
    """SHA-256 over the names and contents of everything that decides what is compiled from a checkout.

    That is its ``.rs`` and ``.toml`` files, what earlier builds read beyond them (:func:`note_inputs`), and the
    manifests and cargo's configuration in the directories above all these files.

    :param inputs: the file in which the earlier builds of this checkout noted what they read; it need not exist.
    """
    root, files = _covered(directory, inputs)
    digest = hashlib.sha256()
    for name, path in sorted((Path(os.path.relpath(path, root)).as_posix(), path) for path in files):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"
        digest.update(f"{name}:{content}\n".encode())
    return digest.hexdigest()


def written_since(directory: Path, inputs: Path, time: int) -> bool:
    """Whether one of the same files was written after ``time``, in ns, whatever it holds now."""
    _, files = _covered(directory, inputs)
    return any(path.stat().st_ctime_ns > time for path in files if path.is_file())


def _covered(directory: Path, inputs: Path) -> tuple[Path, set[Path]]:
    """The root of a checkout, and the files of which :func:`tree_digest` is the digest."""
    root = directory.expanduser().resolve()
    files = set(_files(root, {".rs", ".toml"}))
    for noted in map(Path, read_lines(inputs)):
        files |= set(_files(noted)) if noted.is_dir() else {noted}
    files |= {file for place in {root, *(path.parent for path in files)} for file in _above(place)}
    return root, files


def note_inputs(dep_info: Path, ran: Ran, apart: Path, inputs: Path) -> None:
    """Add to ``inputs`` the files that a build read, one absolute path on a line.

    cargo's dep-info names the sources of all local crates, included files, and what their build scripts asked to be
    watched. A crate with a build script that asks for nothing is watched by cargo as a whole, so all its files count.

    :param dep_info: the ``.d`` file beside the binary.
    :param apart: a directory whose files are not the checkout's: it holds the emitter's crate and the stand-in's.
    """
    text = dep_info.read_text(encoding="utf-8").partition(": ")[2]
    read = {Path(name.replace("\\ ", " ")) for name in re.split(r"(?<!\\)\s+", text) if name}
    read |= {
        Path(urllib.parse.unquote(found[1]))
        for message in ran.messages
        if message.get("reason") == "build-script-executed"
        and (found := re.match(r"path\+file://([^#]*)", str(message.get("package_id"))))
    }
    kept = {path for path in read if not path.resolve().is_relative_to(apart.resolve())}
    write_text("".join(f"{path}\n" for path in sorted(kept | set(map(Path, read_lines(inputs))))), inputs)


def packages_of(directory: Path, inputs: Path) -> set[str]:
    """The names of all crates in a checkout, and of the siblings by path that earlier builds read."""
    manifests = (path.read_text("utf-8") for path in _covered(directory, inputs)[1] if path.name == "Cargo.toml")
    return {found[1] for text in manifests if (found := re.search(r'^name *= *"([^"]+)"', text, re.MULTILINE))}


def read_lines(path: Path) -> list[str]:
    """The lines of a file; none if it does not exist."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def configuration(place: Path) -> str:
    """SHA-256 over what changes a build by cargo in a directory without being in any crate.

    :param place: cargo reads the configuration there, in the directories above, and in its home.
    """
    digest = hashlib.sha256()
    home = Path(os.environ.get("CARGO_HOME") or "~/.cargo").expanduser()
    for path in (*_above(place), home / "config.toml", home / "config"):
        if path.is_file() and path.name != "Cargo.toml":
            digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for name, value in sorted(os.environ.items()):
        if re.match(r"(RUSTFLAGS|CARGO_ENCODED_RUSTFLAGS|RUSTC|CARGO_(PROFILE|BUILD|TARGET)_)", name):
            digest.update(f"{name}={value}\n".encode())
    return digest.hexdigest()


def _above(place: Path) -> list[Path]:
    """The manifests of crates and workspaces, and cargo's configuration, in a directory and those above it."""
    names = ("Cargo.toml", ".cargo/config.toml", ".cargo/config")
    return [found for folder in (place, *place.parents) for name in names if (found := folder / name).is_file()]


def _files(root: Path, suffixes: Container[str] | None = None) -> Iterator[Path]:
    for directory, folders, files in os.walk(root):
        # CACHEDIR.TAG marks cargo's output directory.
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not (Path(directory) / name / "CACHEDIR.TAG").exists()
        ]
        for name in files:
            path = Path(directory) / name
            if (suffixes is None or path.suffix in suffixes) and path.is_file():
                yield path


OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
"""Variables by which a hook of git names its own repository."""


def fetch(candidate: Candidate, cache: Path) -> tuple[str, str]:
    """The commit of a ``git:`` candidate, and the text of its ``Cargo.toml``.

    :raises OutOfReachError: the repository cannot be cloned or updated.
    :raises CandidateError: git, the revision, or its ``Cargo.toml`` is missing.
    """
    mirror = cache / "git" / hashlib.sha256(candidate.target.encode()).hexdigest()[:16]
    mirror.parent.mkdir(parents=True, exist_ok=True)
    revision = candidate.revision or ""
    # A private repository is an error; git must not ask for a password.
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_HOOK}
    environment["GIT_TERMINAL_PROMPT"] = "0"

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
            held = (
                is_commit and not subprocess.run(test, capture_output=True, check=False, env=environment).returncode
            )
            if not held:
                git_remote("-C", str(mirror), "remote", "update", "--prune")
        commit = git("-C", str(mirror), "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
        commit = commit.splitlines()[-1]
        return commit, git("-C", str(mirror), "show", f"{commit}:Cargo.toml")
