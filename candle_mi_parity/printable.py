"""How text and numbers are shown. Text comes from a trace, a checkpoint or an error, and a terminal obeys it."""

from __future__ import annotations

import math

from rich.markup import escape


def printable(text: str) -> str:
    """Control characters, escapes and text-direction marks are spelt out (``\\x1b``); a newline stays one."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def cell(text: str) -> str:
    """The same for a table of rich, which reads square brackets as markup."""
    return escape(printable(text))


def one_line(text: str, limit: int = 300) -> str:
    """The same on one line, cut where it is long."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= limit else f"{flat[: limit - 1]}…"


def number(value: float | None, digits: int = 3) -> str:
    """As a person reads it; a dash for nothing."""
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else "NaN" if math.isnan(value) else f"{value:.{digits}g}"
