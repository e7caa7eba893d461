"""The one environment of all HTML pages: every text is escaped and printable, a misspelt name is an error.

What a page shows comes from traces and checkpoints that nobody vouches for.
"""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from candle_mi_parity.printable import number, printable

_ENVIRONMENT = Environment(
    loader=PackageLoader("candle_mi_parity"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: printable(value) if type(value) is str else value,
)
_ENVIRONMENT.filters["number"] = number


def rendered(template: str, **values: object) -> str:
    """A page from its file in ``templates/``.

    :raises jinja2.UndefinedError: the template uses a name that is not given.
    """
    return _ENVIRONMENT.get_template(template).render(**values)
