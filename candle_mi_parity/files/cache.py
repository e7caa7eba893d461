"""The cache: directories and JSON values under content keys, each made once and atomically."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files import atomic


def publish(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a directory once: fill a temporary one and rename it.

    If two processes ask for the same directory, the second waits for the first. An empty directory counts as absent,
    so that deleting its files is enough to have it made again.

    :param make: fills the directory that it is given.
    :raises ModelError: the cache cannot be written.
    """
    if _is_made(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        lock.acquire()
    except OSError as error:
        raise ModelError(f"cannot write to the cache {target.parent}: {error.strerror}") from error
    making = target.parent / f".{target.name}.making"
    try:
        if not _is_made(target):
            shutil.rmtree(making, ignore_errors=True)  # left by a killed process
            making.mkdir()
            make(making)
            atomic.put(making, target)
    except (OSError, SafetensorError) as error:  # on a full disk safetensors raises its own error
        raise ModelError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
        lock.release()
    return target


def _is_made(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def content_key(*parts: object) -> str:
    """A directory name: a digest of JSON-serialisable parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def cached(cache: Path, kind: str, key: object, compute: Callable[[], Any]) -> Any:
    """A JSON value that is computed once for each ``key``."""

    def write(out: Path) -> None:
        (out / "value.json").write_text(json.dumps(compute()), encoding="utf-8")

    directory = publish(cache / kind / content_key(key), write)
    return json.loads((directory / "value.json").read_text(encoding="utf-8"))
