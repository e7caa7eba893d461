"""The TOML tables of the suite: reading a file, and the rows of which all are made."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.untrusted import read_bytes

M = TypeVar("M", bound=BaseModel)
MAX_TOML_BYTES = 4 << 20


class TableRow(BaseModel):
    """A row of a TOML table, or a part of one; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def read_toml(path: Path, model: type[M], fault: type[ParityError]) -> M:
    """A TOML file of the suite, validated against its model.

    :param fault: the exception for a file that is unreadable, has an unknown or missing key, or a wrong type.
    """
    try:
        return model.model_validate(tomllib.loads(read_bytes(path, MAX_TOML_BYTES).decode("utf-8")))
    except ValidationError as error:  # is a ValueError too
        first = error.errors()[0]
        where = one_line(".".join(str(part) for part in first["loc"]))
        raise fault(f"{path}: {where}: {one_line(first['msg'])}") from error
    except (OSError, ValueError, RecursionError, ParityError) as error:
        raise fault(f"{path}: {one_line(str(error))}") from error
