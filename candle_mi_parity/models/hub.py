"""Models and SAE files of the Hugging Face hub, downloaded through huggingface_hub into its own cache.

A revision is resolved to its commit, and each file is compared with the digest that the hub declares for it, on
arrival and at every later use. huggingface_hub reads ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and
``HF_ENDPOINT``, draws the progress bars and resumes a download that broke off.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import glob
import hashlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from candle_mi_parity.errors import HubError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.spec.cases import Download, HubModel, SaeFile

MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
)
SITE = "https://huggingface.co"
"""Where a licence is accepted and a token is made, whichever mirror ``HF_ENDPOINT`` names."""


def fetch_model(model: HubModel) -> tuple[Path, Download]:
    """The snapshot directory of a model: config, weights, tokenizer.

    :raises HubError: the download fails, or a file is not what the hub declares.
    """
    return _fetch(model.repo, model.revision, MODEL_FILES)


def fetch_config(model: HubModel) -> Path:
    """The snapshot directory with ``config.json`` alone.

    :raises HubError: see :func:`fetch_model`.
    """
    return _fetch(model.repo, model.revision, ("config.json",))[0]


def to_download(model: HubModel) -> str:
    """One line on what :func:`fetch_model` will download."""
    name = f"{model.repo}@{model.revision}"
    try:
        listed: Any = snapshot_download(
            model.repo, revision=model.revision, allow_patterns=list(MODEL_FILES), dry_run=True
        )
    except Exception as error:  # the download itself will give the reason
        return f"{name}: the size of the download is unknown ({type(error).__name__})"
    wanted = [file for file in listed if file.will_download]
    return f"{name}: {len(wanted)} files to download, {sum(file.file_size for file in wanted) / 1e6:.0f} MB"


def fetch_sae(sae: SaeFile) -> tuple[Path, Download]:
    """One NPZ file of a repository of SAEs, or a folder in SAELens's format; ``.`` is the repository itself.

    :raises HubError: see :func:`fetch_model`, or the repository has no such file; lists similar names.
    """
    assert sae.repo is not None
    revision = sae.revision or constants.DEFAULT_REVISION
    wanted: tuple[str, ...] = (glob.escape(sae.path),)
    needed = sae.path
    if not sae.path.endswith(".npz"):
        folder = "" if sae.path == "." else f"{sae.path}/"
        needed = f"{folder}cfg.json"
        wanted = (glob.escape(needed), f"{glob.escape(folder)}*.safetensors")
    directory, download = _fetch(sae.repo, revision, wanted)
    if not (directory / needed).is_file():
        raise HubError(_cannot(sae.repo, revision, _no_file(sae.repo, needed, download.commit)))
    return directory / sae.path, download


@functools.cache
def _fetch(repo: str, revision: str, wanted: tuple[str, ...]) -> tuple[Path, Download]:
    """Cached, so that a run sees one commit of a branch and reads each file once."""
    try:
        directory = Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # huggingface_hub, its transport and the disk each raise exceptions of their own
        raise HubError(_cannot(repo, revision, _reason(error, repo, revision))) from error
    digests = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.exists():  # a link to a blob that is gone, at which an older huggingface_hub does not look
            raise HubError(_cannot(repo, revision, _reason(OfflineModeIsEnabled(), repo, revision)))
        if path.is_file() and any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
            _check(repo, path)
            digests[name] = file_digest(path)
    return directory, Download(repo, revision, directory.name, digests)


def _check(repo: str, path: Path) -> None:
    """Compare a file with the digest that the hub declares: the cache names each blob by it, sha256 or git's digest.

    :raises HubError: with both digests and the command that removes the file.
    """
    blob = Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path
    expected = blob.name
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):
        raise HubError(
            f"{repo}: {path} cannot be checked: it is not a link to blobs/DIGEST, as huggingface_hub makes it; "
            "set HF_HOME to a directory with symbolic links"
        )
    found = file_digest(path) if len(expected) == 64 else _git_digest(path)
    if found != expected:
        # A blob may itself be a link, into a store that several repositories share.
        remove = shlex.join(["rm", *dict.fromkeys([str(blob), str(blob.resolve())])])
        raise HubError(
            f"{repo}: {path.name} is not what the hub declares: found {found} ({path.stat().st_size} bytes), "
            f"expected {expected}; remove it with `{remove}` and run again"
        )


def _git_digest(path: Path) -> str:
    """The sha1 by which git names a file's content, and the hub a file that is not in LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _cannot(repo: str, revision: str, reason: str) -> str:
    return f"cannot get {repo}@{revision} from the hub: {reason}"


def _reason(error: BaseException, repo: str, revision: str) -> str:
    """The reason and the remedy in one line."""
    # huggingface_hub hides the first error behind "not found on the local disk".
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    token = f"a token ({SITE}/settings/tokens) in HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set and {constants.HF_HUB_CACHE} does not hold all of it: "
            "run once without HF_HUB_OFFLINE, or set HF_HOME to the cache that has it"
        )
    if isinstance(error, GatedRepoError):
        status = error.response.status_code
        who = "no token was sent" if status == 401 else "the token's account has no access"
        return f"it is gated and {who} (HTTP {status}): accept the licence at {SITE}/{repo}, then run with {token}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision}: {SITE}/{repo}/commits/main lists them"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private: correct the name, or run with {token}"
    return (
        f"{type(error).__name__}: {one_line(str(error))}; check the connection, HF_TOKEN, the free space and "
        f"HF_ENDPOINT ({constants.ENDPOINT}), and run again: completed files are kept"
    )


def _no_file(repo: str, path: str, commit: str) -> str:
    """The message for a missing file, with the most similar names in the repository."""
    known = _listed(repo, commit)
    if not known:
        return f"{constants.HF_HUB_CACHE} does not hold {path}: run once online, without HF_HUB_OFFLINE"
    near = difflib.get_close_matches(path, known, n=3)
    return f"it has no file {path}" + (f"; it has {', '.join(near)}" if near else "")


def _listed(repo: str, commit: str) -> list[str]:
    """The files of a repository, as the cache lists them; an older huggingface_hub keeps no list and asks the hub."""
    try:
        if (cached := getattr(huggingface_hub, "get_cached_repo_tree", None)) is not None:
            return [file.path for file in cached(repo, revision=commit)]
        return huggingface_hub.HfApi().list_repo_files(repo, revision=commit)
    except Exception:  # another client filled the cache, or there is no connection
        return []
