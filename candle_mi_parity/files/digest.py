"""sha256 digests of files, cached for the life of the process."""

from __future__ import annotations

import hashlib
from pathlib import Path

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files.untrusted import require_regular


def digest_files(paths: list[Path]) -> str:
    """One digest for a set of files: sha256 of the lines ``name:sha256-of-bytes``, sorted by name."""
    lines = [f"{path.name}:{file_digest(path)}\n" for path in sorted(paths, key=lambda path: path.name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


_digests: dict[tuple[str, int, int, int], str] = {}


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hex; cached by path, size, mtime and inode.

    :raises ModelError: the file cannot be read.
    """
    try:
        stat = require_regular(path)
        key = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if key not in _digests:
            with path.open("rb") as file:
                _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return _digests[key]
