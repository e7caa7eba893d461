"""Untrusted files: regular ones only, no longer than a bound, strict JSON, nothing outside a directory.

A pipe would wait for ever, a device never ends, a header may claim terabytes: each is refused before it costs time
or memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line

MAX_JSON_BYTES = 64 << 20
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a regular file.

    :raises OSError: absent, a directory, a pipe, a device.
    :raises ValueError: longer than ``limit`` bytes, or a name that no file can have.
    """
    # Not to wait for the other end of a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = _regular(os.fstat(descriptor))
        if found.st_size > limit:
            raise ValueError(f"{found.st_size} bytes, more than {limit}")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise ValueError(f"more than {limit} bytes")
    return content


def require_regular(path: Path) -> os.stat_result:
    """The file's own stat, links followed.

    :raises OSError: absent, or a pipe or a device, which must not be opened.
    """
    return _regular(path.stat())


def _regular(found: os.stat_result) -> os.stat_result:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return found


def read_json(path: Path, fault: type[ParityError]) -> Any:
    """JSON with nothing forgiven: no duplicate key, no NaN or Infinity, no number too large, bounded size and depth.

    :param fault: what is raised, naming the file and the reason in one line.
    """
    try:
        text = read_bytes(path, MAX_JSON_BYTES).decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite)
    except FileNotFoundError as error:
        raise fault(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise fault(f"{path}: not valid JSON: {one_line(str(error))}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"key given twice: {Counter(name for name, _ in pairs).most_common(1)[0][0]!r}")
    return found


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large a number")
    return number


def require_inside(directory: Path, fault: type[ParityError]) -> None:
    """Refuse a directory in which a link leads out of it; the hub's cache, whose snapshots link to its blobs, may.

    :raises ParityError: of the given kind, naming the link.
    """
    root = directory.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for entry in sorted(directory.iterdir()):
        if not entry.is_symlink() or entry.resolve().is_relative_to(root):
            continue
        # A blob may itself be a link, into the store that several repositories share.
        if blobs is None or Path(os.path.normpath(root / entry.readlink())).parent != blobs:
            raise fault(f"{directory}: {entry.name} is a link that leads out of the directory; it is not followed")


def require_memory(wanted: int, what: str, fault: type[ParityError]) -> None:
    """Refuse what cannot be held, see :func:`memory_bytes`.

    :param wanted: bytes.
    """
    if wanted > (there := memory_bytes()):
        raise fault(f"{what} would take {wanted} bytes of memory, and there are {there}")


def memory_bytes() -> int:
    """What the machine has, or what its control group or the limit set on this process leaves of that.

    Not what is free just now: on the same machine the same is done.
    """
    there = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    group = _CGROUP.read_text().strip() if _CGROUP.is_file() else ""
    there += [int(group)] if group.isdigit() else []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min([*there, *([] if limit == resource.RLIM_INFINITY else [limit])])
