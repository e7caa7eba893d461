"""How text and numbers are shown. Text comes from a trace, a checkpoint or an error, and a terminal obeys it."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def printable(text: str) -> str:
    """Control characters, escapes and text-direction marks are spelt out (``\\x1b``); a newline stays one."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def cell(text: str) -> str:
    """The same for a table of rich, which reads square brackets as markup."""
    from rich.markup import escape

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


@cache
def templates(html: bool) -> Environment:
    """The templates of ``templates/``: every text printable, a misspelt name an error.

    :param html: whether each text is escaped for HTML too.
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

    :raises jinja2.UndefinedError: the template uses a name that is not given.
    """
    return templates(html=True).get_template(template).render(**values)
