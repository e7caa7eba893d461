"""Atomic writes: a file or directory is complete or absent, also after a crash or a power loss.

It is written beside its final name, flushed to disk and renamed; then its parent directory is flushed.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def put(made: Path, target: Path) -> None:
    """Flush a file or a directory tree and rename it to ``target``.

    :raises OSError: that fails; ``target`` is then unchanged.
    """
    for directory, _, names in os.walk(made):
        for name in names:
            _flush(Path(directory, name))
        _flush(Path(directory))
    if made.is_file():
        _flush(made)
    made.replace(target)
    _flush(target.parent)


def write_text(text: str, path: Path) -> None:
    """As :func:`write_bytes`, with text in UTF-8."""
    write_bytes(text.encode("utf-8"), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file atomically; its directory is created if absent.

    :raises OSError: the disk is full or read-only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        put(temporary, path)
    finally:  # Ctrl-C too leaves nothing behind
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
