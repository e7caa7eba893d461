"""An untrusted NPZ file: what each array claims is checked against the archive before any is read."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.untrusted import require_memory, require_regular

EXPANSION = 64
"""Weights hardly shrink when compressed; an archive that grows by more when it is read is a bomb."""
SMALL = 1 << 20
"""Bytes below which growth does not matter."""


def read_npz(path: Path, fault: type[ParityError]) -> dict[str, np.ndarray]:
    """Name → array; nothing is unpickled.

    :param fault: what is raised, in one line: no archive, an array named twice or whose header claims another size
        than the archive holds, more than it can have been compressed from, or than there is memory.
    """
    try:
        size = require_regular(path).st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename.removesuffix(".npy") for member in members]
            if len(set(names)) != len(names):
                raise ValueError("an array is given twice")
            whole = sum(member.file_size for member in members)
            if whole > max(SMALL, EXPANSION * size):
                raise ValueError(f"{whole} bytes out of {size}: more than weights can have been compressed from")
            require_memory(2 * whole, str(path), fault)
            for member in members:
                _check_header(archive, member)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except ParityError:
        raise
    except Exception as error:  # a broken archive fails in as many ways as it has bytes
        raise fault(f"{path}: not a readable NPZ: {one_line(str(error)) or type(error).__name__}") from error


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """:raises ValueError: the array's shape needs more or less than its member of the archive is long."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read: Any = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
        needed, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if needed != there and not dtype.hasobject:
        raise ValueError(f"{member.filename} claims {dtype}{list(shape)}, {needed} bytes, and has {there}")
