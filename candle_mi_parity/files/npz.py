"""Reading untrusted NPZ files: sizes are checked before any array is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.untrusted import require_memory, require_regular

EXPANSION = 64
"""The largest ratio of uncompressed to compressed size; weights compress far less."""
SMALL = 1 << 20
"""Bytes below which the ratio is not checked."""


def read_npz(path: Path, fault: type[ParityError]) -> dict[str, np.ndarray]:
    """Name → array; nothing is unpickled.

    :param fault: the exception for a file that is not an NPZ, holds an array twice, or expands beyond
        :data:`EXPANSION` or the memory.
    """
    try:
        size = require_regular(path).st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len({member.filename.removesuffix(".npy") for member in members}) != len(members):
                raise ValueError("an array occurs twice")
            whole = sum(member.file_size for member in members)
            if whole > max(SMALL, EXPANSION * size):
                raise ValueError(f"{whole} bytes out of {size}: more than weights can have been compressed from")
            require_memory(2 * whole, str(path), fault)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except ParityError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged archive
        raise fault(f"{path}: not a readable NPZ: {one_line(str(error)) or type(error).__name__}") from error
