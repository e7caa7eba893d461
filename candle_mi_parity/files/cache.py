"""The cache: directories and values under a key of their content, made once and whole or absent."""

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
    """Make a directory once: fill one beside it, then rename, so that nobody reads half of it.

    Of two processes that ask for the same one, the second waits for the first. An empty directory is not there:
    whoever follows "delete it" deletes the file.
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
            shutil.rmtree(making, ignore_errors=True)  # of a process that was killed
            making.mkdir()
            make(making)
            atomic.put(making, target)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise ModelError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
        lock.release()
    return target


def _is_made(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def content_key(*parts: object) -> str:
    """A directory name for content: a digest of JSON-ready parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def cached(cache: Path, kind: str, key: object, compute: Callable[[], Any]) -> Any:
    """A JSON value kept under a content key."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]

    def write(out: Path) -> None:
        (out / "value.json").write_text(json.dumps(compute()), encoding="utf-8")

    directory = publish(cache / kind / name, write)
    return json.loads((directory / "value.json").read_text(encoding="utf-8"))
