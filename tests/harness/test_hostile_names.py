"""Every view is given names that attack it: none obeys one, and each page forbids scripts and has no handler."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from candle_mi_parity.files.escape import printable, templates
from candle_mi_parity.report import diff_views, history, page, report, views_ci
from candle_mi_parity.repro.write import _cell
from tests.support.results import HOSTILE, a_report, differing, told

TEMPLATES, PAGES_TEMPLATES = templates(html=False), templates(html=True)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"


def shown(show: Callable[[Console], None]) -> str:
    """What a terminal is sent, without rich's own colours."""
    console = Console(width=200, color_system=None, force_terminal=False)
    with console.capture() as capture:
        show(console)
    return capture.get()


PAGES: dict[str, Callable[[], str]] = {
    "report.html": lambda: page.render(a_report()),
    "diff.html": lambda: diff_views.page(differing()),
    "history.html": lambda: history.page(told()),
}
VIEWS: dict[str, Callable[[], str]] = {
    **PAGES,
    "terminal of run": lambda: shown(lambda console: report.terminal(a_report(), console)),
    "terminal of diff": lambda: shown(lambda console: diff_views.terminal(differing(), console)),
    "terminal of ratios": lambda: shown(lambda console: console.print(report.clean_ratios(a_report()))),
    "junit.xml": lambda: views_ci.junit(a_report()),
    "summary.md": lambda: views_ci.summary(a_report()),
    "annotations": lambda: "\n".join(views_ci.workflow_commands(a_report())),
    **{name: lambda name=name: reproduced(name) for name in ("ISSUE.md", "test.rs", "check.py", "Cargo.toml")},  # type: ignore[misc]
}


class _Tags(HTMLParser):
    """Tags, handlers, and what a page would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.odd: list[str] = []
        self.policies: list[str | None] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        held = dict(attrs)
        self.odd += [name for name in held if name.startswith("on") or name == "srcdoc"]
        links = [held.get(name) or "" for name in ("href", "src", "action", "xlink:href")]
        self.odd += [link for link in links if link and not link.startswith(("#", "data:image/png;base64,"))]
        if held.get("http-equiv") == "Content-Security-Policy":
            self.policies.append(held.get("content"))


def faults(name: str, text: str) -> list[str]:
    """What a view does that no name may make it do."""
    found = [f"sends {c!a}" for c in sorted({c for c in text if not c.isprintable() and c not in "\n\t"})]
    if name in PAGES:
        tags = _Tags(text)
        found += [f"holds a {tag}" for tag in tags.tags & {"script", "iframe", "object", "embed", "link", "base"}]
        found += [f"would do {odd}" for odd in tags.odd]
        found += [] if tags.policies == [POLICY] else [f"its policies are {tags.policies}"]
    return found


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_obeys_no_name(name: str) -> None:
    text = VIEWS[name]()
    assert "owned" in text, "the hostile name is not shown: nothing is tested"
    assert not faults(name, text)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_shows_names_as_they_are_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its twin: the same views with what makes a name harmless taken away."""
    plain: Any = lambda text, *_: text  # noqa: E731
    for module in (views_ci, report, diff_views, history, page):
        for function in ("printable", "one_line", "cell"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, plain)
    monkeypatch.setattr(PAGES_TEMPLATES, "finalize", None)
    monkeypatch.setattr(TEMPLATES, "finalize", None)
    PAGES_TEMPLATES.cache.clear()  # type: ignore[union-attr]
    TEMPLATES.cache.clear()  # type: ignore[union-attr]
    try:
        assert faults(name, VIEWS[name]()), "nothing in this view shows the name as it is"
    finally:
        PAGES_TEMPLATES.cache.clear()  # type: ignore[union-attr]
        TEMPLATES.cache.clear()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "harm",
    [
        "<script>alert(1)</script>",
        "<p onclick=x>",
        "<a href=javascript:x>",
        "<a href='https://example.org'>",
        "<iframe>",
        "\x1b[2J",
    ],
)
def test_a_page_with_harm_in_it_is_caught(harm: str) -> None:
    good = PAGES["report.html"]()
    assert faults("report.html", good.replace("</body>", f"{harm}</body>"))
    assert faults("report.html", good.replace(POLICY, POLICY.replace("'none'", "*", 1)))
    assert faults("report.html", good.replace("Content-Security-Policy", "refresh"))


def reproduced(name: str) -> str:
    """A file of a reproduction whose every text is the hostile one."""
    given = {"config": HOSTILE, "lines": HOSTILE, "sae": SimpleNamespace(hook=HOSTILE)}
    return TEMPLATES.get_template(f"{name}.j2").render(dict.fromkeys(TEXTS.split(), HOSTILE) | LISTS | given)


LISTS: dict[str, Any] = {
    "edits": [],
    "probe": [HOSTILE],
    "tokens": [1],
    "index": [0],
    "differing": [(HOSTILE, HOSTILE, HOSTILE)],
}


TEXTS = """slug case command version title model_type torch transformers tensor shape rows last dtype candle_dtype
layers width heads got expected absolute noise ratio position_ratio element_gate position_gate detail samples imports
value extra"""


@pytest.mark.parametrize("text", ["a`b", "a|b", "a\nb", HOSTILE])
def test_a_cell_of_the_issue_s_table_stays_one_cell(text: str) -> None:
    cell = _cell(text)
    assert "`" not in cell and "\n" not in cell and not re.search(r"(?<!\\)\|", cell)
    assert printable(cell) == cell
