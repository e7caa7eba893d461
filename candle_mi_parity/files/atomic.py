"""Files and directories that are whole or absent, whatever ends the process or the machine.

A file or directory is made beside its final name, flushed to disk, renamed, and the directory that holds the name is
flushed: a rename alone may reach the disk before the contents do, and a power loss then leaves a name over zeros.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def put(made: Path, target: Path) -> None:
    """Give what was made its name: a file, or a directory with all that lies below it.

    :raises OSError: it cannot be flushed or renamed; ``target`` is then as it was.
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
    """The same as :func:`write_bytes`, of UTF-8."""
    write_bytes(text.encode("utf-8"), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file whole or not at all, with the permissions of the umask; its directory is made if absent.

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
