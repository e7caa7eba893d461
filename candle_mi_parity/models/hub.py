"""Everything that is downloaded: models and SAE files of the Hugging Face hub, through its client's own cache.

A revision is resolved to its commit, and every file is held against the digest that the hub declares for it, when it
arrives and whenever it is used again. huggingface_hub reads ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and
``HF_ENDPOINT``, draws its bars and, where a connection breaks, asks for the rest of the file.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import functools
import glob
import hashlib
import os
import re
import shlex
import time
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
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

PAUSE_SECONDS = 5
"""Before the one second try after a 5xx, which the client itself does not repeat for every kind of request."""


def fetch_model(model: HubModel) -> tuple[Path, Download]:
    """The snapshot directory of a model: config, weights, tokenizer.

    :raises HubError: it cannot be had, or a file is not what the hub declares.
    """
    return _fetch(model.repo, model.revision, MODEL_FILES)


def fetch_config(model: HubModel) -> Path:
    """The snapshot directory with ``config.json`` alone.

    :raises HubError: as of :func:`fetch_model`.
    """
    return _fetch(model.repo, model.revision, ("config.json",))[0]


def to_download(model: HubModel) -> str:
    """What :func:`fetch_model` will download, in words."""
    try:
        listed: Any = snapshot_download(
            model.repo, revision=model.revision, allow_patterns=list(MODEL_FILES), dry_run=True
        )
    except Exception as error:  # the download itself says why, in one line
        return f"{model.repo}@{model.revision}: what has to be downloaded is not known ({type(error).__name__})"
    wanted = [file for file in listed if file.will_download]
    size = sum(file.file_size for file in wanted) / 1e6
    return f"{model.repo}@{model.revision}: {len(wanted)} files to download, {size:.0f} MB"


def fetch_sae(sae: SaeFile) -> tuple[Path, Download]:
    """One NPZ file of a repository of SAEs, or a folder as SAELens writes it; ``.`` is the repository itself.

    :raises HubError: as of :func:`fetch_model`, or there is no such file; names those that are spelt alike.
    """
    assert sae.repo is not None
    revision = sae.revision or constants.DEFAULT_REVISION
    if not sae.path.endswith(".npz"):
        folder = "" if sae.path == "." else f"{glob.escape(sae.path)}/"
        directory, download = _fetch(sae.repo, revision, (f"{folder}cfg.json", f"{folder}*.safetensors"))
        if not (directory / sae.path / "cfg.json").is_file():
            raise HubError(_cannot(sae.repo, revision, _no_file(sae.repo, f"{folder}cfg.json", download.commit)))
        return directory / sae.path, download
    directory, download = _fetch(sae.repo, revision, (glob.escape(sae.path),))
    if sae.path not in download.files:
        raise HubError(_cannot(sae.repo, revision, _no_file(sae.repo, sae.path, download.commit)))
    return directory / sae.path, download


@functools.cache
def _fetch(repo: str, revision: str, wanted: tuple[str, ...]) -> tuple[Path, Download]:
    """Once a process, so that a run sees one commit of a branch and reads the files once."""
    try:
        directory = _snapshot(repo, revision, wanted)
    except Exception as error:  # whatever the client, its transport or the disk raises; our own checks come after
        raise HubError(_cannot(repo, revision, _reason(error, repo, revision, wanted))) from error
    paths = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]
    files = [path for path in paths if _is_wanted(path, wanted)]
    for name in files:
        _check(repo, directory / name)
    return directory, Download(
        repo, revision, directory.name, {name: file_digest(directory / name) for name in files}
    )


def _snapshot(repo: str, revision: str, wanted: tuple[str, ...]) -> Path:
    with warnings.catch_warnings():
        # The client only warns, and would go on until the disk is full.
        warnings.filterwarnings("error", message="Not enough free disk space")
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted)))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            root = _root(error)
            if not isinstance(root, HfHubHTTPError) or root.response.status_code < 500:
                raise
            time.sleep(PAUSE_SECONDS)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted)))


def _is_wanted(path: str, wanted: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in wanted)


def _check(repo: str, path: Path) -> None:
    """Hold a file against what the hub declares: the cache names each blob by it, sha256 or git's own digest.

    :raises HubError: with both digests and the command that removes the file.
    """
    blob = Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path
    expected = blob.name
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):
        raise HubError(
            f"{repo}: {path} cannot be checked: it is no link to blobs/DIGEST as the hub's client makes it "
            "(HF_HUB_DISABLE_SYMLINKS, or a copied cache): set HF_HOME to a directory with symbolic links"
        )
    found = file_digest(path) if len(expected) == 64 else _git_digest(path)
    if found != expected:
        # A blob may itself be a link, into the store that several repositories share.
        remove = shlex.join(["rm", *dict.fromkeys([str(blob), str(blob.resolve())])])
        raise HubError(
            f"{repo}: {path.name} is not what the hub declares: found {found} ({path.stat().st_size} bytes), "
            f"expected {expected}; remove it with `{remove}` and run again"
        )


def _git_digest(path: Path) -> str:
    """How git names a file's content, and the hub a file that is not in LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _cannot(repo: str, revision: str, reason: str) -> str:
    return f"cannot get {repo}@{revision} from the hub: {reason}"


def _root(error: BaseException) -> BaseException:
    """What the client met first; it hides that behind "not found on the local disk"."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: Exception, repo: str, revision: str, wanted: tuple[str, ...]) -> str:
    """Why, and the remedy, in one line."""
    root = _root(error)
    if isinstance(root, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set and {constants.HF_HUB_CACHE} does not hold {_lacking(repo, revision, wanted)}: "
            "run once without, or set HF_HOME to the cache that has it"
        )
    if isinstance(root, HfHubHTTPError):
        return _refusal(root, repo, revision)
    if short := re.search(r"should be of size (\d+) but has size (\d+)", str(root)):
        # The client names it by an address; the listing knows it by its size.
        named = [path for path, size in _listing(repo, revision).items() if size == int(short[1])]
        which = " or ".join(named) or "a file"
        return f"{which} arrived with {short[2]} of {short[1]} bytes: run again; what is complete is kept"
    if isinstance(root, UserWarning) or getattr(root, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{one_line(str(root))}: free some space, or set HF_HOME to a larger disk; what is complete is kept"
    return (
        f"{type(root).__name__}: {one_line(str(root))}; look at the connection, a proxy and HF_ENDPOINT "
        f"({constants.ENDPOINT}), and run again: what is complete is kept"
    )


def _refusal(error: HfHubHTTPError, repo: str, revision: str) -> str:
    """Why the hub said no."""
    status, token = error.response.status_code, f"a token ({SITE}/settings/tokens) in HF_TOKEN"
    if isinstance(error, GatedRepoError):
        who = (
            "it is gated and no token was sent" if status == 401 else "it is gated and the token's account is not in"
        )
        return f"{who} (HTTP {status}): accept the licence at {SITE}/{repo}, then run with {token} of that account"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision}: {SITE}/{repo}/commits/main lists them"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private (HTTP {status}): correct the name, or run with {token}"
    if status == 401:
        return f"the hub does not accept the token (HTTP 401): put {token}, or unset it where none is needed"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        later = f"{wait} seconds" if wait else "some minutes"
        return f"too many requests (HTTP 429): run again in {later}; the limit is higher with {token}"
    if status >= 500:
        return f"{constants.ENDPOINT} is out of order (HTTP {status}): run again later; what is complete is kept"
    return one_line(str(error))


def _listing(repo: str, revision: str) -> dict[str, int]:
    """Paths and sizes of a repository's files as the cache knows them; empty where another client filled it."""
    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=revision)}
    except CachedRepoTreeNotFoundError:
        return {}


def _lacking(repo: str, revision: str, wanted: tuple[str, ...]) -> str:
    """What of the wanted files is not here."""
    listed = [path for path in _listing(repo, revision) if _is_wanted(path, wanted)]
    missing = [path for path in listed if not isinstance(try_to_load_from_cache(repo, path, revision=revision), str)]
    return ", ".join(missing) or "it"


def _no_file(repo: str, path: str, commit: str) -> str:
    """That a file is not there, and the names that are nearest to it."""
    known = _listing(repo, commit)
    if not known:
        return (
            f"{constants.HF_HUB_CACHE} does not hold {path}: run once with the hub in reach, without HF_HUB_OFFLINE"
        )
    near = difflib.get_close_matches(path, list(known), n=3)
    return f"it has no file {path}" + (f"; it has {', '.join(near)}" if near else "")
