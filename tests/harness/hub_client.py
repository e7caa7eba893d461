"""A process that downloads: forked, and huggingface_hub is imported in it anew, which then reads its environment."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import types
from multiprocessing.connection import Connection

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["candle_mi_parity.models.checkpoint", "httpx2", "tqdm"])

Found = dict[str, object]


def fetch(
    asked: tuple[str, str, str], environment: dict[str, str], stderr: str, limit: int | None, free: int | None
) -> Found:
    """A download in a process of its own: where it is, its commit and its files, or the error and its class.

    :param asked: repository, revision, and the file or nothing for a model.
    :param stderr: what the process writes there; a file or a terminal.
    :param limit: bytes of the largest file that can be written, as on a full disk.
    :param free: bytes that the disk says it has.
    """
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_work, args=(theirs, asked, environment, stderr, limit, free))
    process.start()
    theirs.close()
    try:
        found: Found = ours.recv()
    except EOFError:
        found = {"kind": "died", "error": f"exit code {process.exitcode}"}
    process.join()
    return found


def _work(
    answer: Connection,
    asked: tuple[str, str, str],
    environment: dict[str, str],
    stderr: str,
    limit: int | None,
    free: int | None,
) -> None:
    # The server that forks is one for the whole process, and may have been started with more than is asked for here.
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    sys.modules.pop("candle_mi_parity.models.hub", None)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), 2)
    wait = time.sleep
    time.sleep = lambda seconds: wait(min(float(seconds), 0.01))
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, and nobody is killed
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if free is not None:
        shutil.disk_usage = lambda path: types.SimpleNamespace(free=free)  # type: ignore[assignment,return-value]
    answer.send(_fetch(*asked))


def _fetch(repo: str, revision: str, path: str) -> Found:
    from candle_mi_parity.errors import ParityError
    from candle_mi_parity.models.hub import fetch_model, fetch_sae
    from candle_mi_parity.spec.cases import HubModel, SaeFile

    try:
        if path:
            where, download = fetch_sae(SaeFile(repo=repo, revision=revision, path=path, layer=0))
        else:
            where, download = fetch_model(HubModel(source="hub", repo=repo, revision=revision))
    except ParityError as error:
        return {"kind": type(error).__name__, "error": str(error)}
    return {"where": str(where), "commit": download.commit, "files": download.files}
