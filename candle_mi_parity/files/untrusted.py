"""Reading untrusted files: regular files up to a size limit, strict JSON, no link out of a directory."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import stat
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line

MAX_JSON_BYTES = 64 << 20
Model = TypeVar("Model", bound=BaseModel)
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    :raises OSError: see :func:`require_regular`.
    :raises ValueError: the file is longer than ``limit`` bytes, or the name is not a valid file name.
    """
    if (size := require_regular(path).st_size) > limit:
        raise ValueError(f"{size} bytes, more than {limit}")
    return path.read_bytes()


def require_regular(path: Path) -> os.stat_result:
    """The stat of a regular file, links followed.

    :raises OSError: the file is absent, a directory, or a pipe or device, whose reading may never end.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return found


def read_json(path: Path, fault: type[ParityError]) -> Any:
    """Strict JSON: no duplicate key, no NaN or Infinity, no number outside float64's range, bounded size and depth.

    :param fault: the exception that is raised; its one line names the file and the reason.
    """
    try:
        text = read_bytes(path, MAX_JSON_BYTES).decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite)
    except FileNotFoundError as error:
        raise fault(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise fault(f"{path}: not valid JSON: {one_line(str(error))}") from error


def read_object(path: Path, fault: type[ParityError]) -> dict[str, Any]:
    """As :func:`read_json`, of a JSON object."""
    found = read_json(path, fault)
    if not isinstance(found, dict):
        raise fault(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def validated(model: type[Model], document: object, where: object, fault: type[ParityError]) -> Model:
    """A document as a pydantic model.

    :param where: names the document in the message.
    :param fault: the exception that is raised; its one line holds the first error and its place.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "document"
        raise fault(f"{where}: {one_line(place)}: {one_line(first['msg'])}") from error


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
    """Refuse a directory with a link that leads out of it. A snapshot in the hub's cache may link to its blobs.

    :param fault: the exception that is raised; it names the link.
    """
    root = directory.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for entry in sorted(directory.iterdir()):
        if not entry.is_symlink() or entry.resolve().is_relative_to(root):
            continue
        # A blob may itself be a link, into the store that several repositories share.
        if blobs is None or Path(os.path.normpath(root / entry.readlink())).parent != blobs:
            raise fault(
                f"{directory}: {entry.name} is a link that leads out of the directory, and is not followed; put the "
                "file itself there"
            )


def require_memory(wanted: int, what: str, fault: type[ParityError]) -> None:
    """Refuse an allocation of more than :func:`memory_bytes`.

    :param wanted: bytes.
    """
    if wanted > (available := memory_bytes()):
        raise fault(f"{what} needs {wanted} bytes of memory, and {available} are available")


def memory_bytes() -> int:
    """The memory of the machine, or less where a control group or a limit of this process restricts it.

    It does not depend on what other processes use now, so that the same machine always takes the same decision.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    group = _CGROUP.read_text().strip() if _CGROUP.is_file() else ""
    if group.isdigit():
        limits.append(int(group))
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY:
        limits.append(own)
    return min(limits)
