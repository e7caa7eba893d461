"""Showing text and numbers: text of traces, checkpoints and errors may hold escape sequences or markup."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def printable(text: str) -> str:
    """Escape control characters and text-direction marks (``\\x1b``), but not newlines."""
    if text.isprintable():  # nearly always, and faster than a look at each character
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def cell(text: str) -> str:
    """As :func:`printable`, for a table of rich, which reads square brackets as markup."""
    from rich.markup import escape

    return escape(printable(text))


def one_line(text: str, limit: int = 300) -> str:
    """As :func:`printable`, on one line of at most ``limit`` characters."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= limit else f"{flat[: limit - 1]}…"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; a dash for None."""
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else "NaN" if math.isnan(value) else f"{value:.{digits}g}"


def few(names: list[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


@cache
def templates(html: bool) -> Environment:
    """The environment of ``templates/``: values are made printable, and an undefined name is an error.

    :param html: whether values are also escaped for HTML.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("candle_mi_parity"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["number"] = number
    return environment


def rendered(template: str, **values: object) -> str:
    """An HTML page from its file in ``templates/``.

    :raises jinja2.UndefinedError: the template uses a name that is missing in ``values``.
    """
    return templates(html=True).get_template(template).render(**values)
