"""Rows of TOML tables as text, to be copied into the file of the tables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

Row = Mapping[str, object]


def toml_rows(tables: Mapping[str, Row | list[Row]]) -> str:
    """A list of rows as an array of tables, a mapping as a table, each field on a line; what is None is left out."""
    parts = []
    for name, held in tables.items():
        rows, heading = (held, f"[[{_key(name)}]]") if isinstance(held, list) else ([held], f"[{_key(name)}]")
        for row in rows:
            fields = [f"{_key(key)} = {_value(item)}" for key, item in _given(row).items()]
            parts.append("\n".join([heading, *fields]))
    return "\n\n".join(parts) + "\n"


def _given(row: Row) -> dict[str, object]:
    return {key: item for key, item in row.items() if item is not None}


def _value(value: object) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        held = {key: item for key, item in value.items() if item is not None}
        return (
            "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in held.items()) + " }" if held else "{}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        # JSON leaves some control characters and text-direction marks as they are, and TOML forbids \x7f.
        escaped = json.dumps(value, ensure_ascii=False)
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)
    # TOML spells the numbers that JSON does not have as Python does.
    return repr(value) if isinstance(value, float) else json.dumps(value)


def _key(key: object) -> str:
    return str(key) if re.fullmatch(r"[A-Za-z0-9_-]+", str(key)) else _value(str(key))
