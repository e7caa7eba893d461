"""The pages in a browser: quiet, linked, legible in the light, in the dark, on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error

from candle_mi_parity.report import diff_views, history, page
from tests.support.browsing import CHECKS, browsing, chromium
from tests.support.results import a_report, differing, told

# One browser, where workers are told to keep groups together.
pytestmark = pytest.mark.xdist_group("browser")

OUTSIDE = '<img src="http://parity.invalid/x.png"></main>'
POLICY = 'http-equiv="Content-Security-Policy"'
PLANTED = {
    "an image from elsewhere, which the policy stops": ("quiet", {"</main>": OUTSIDE}, "Content Security Policy"),
    "the same without the policy": (
        "quiet",
        {"</main>": OUTSIDE, POLICY: ""},
        "request: http://parity.invalid/x.png",
    ),
    "a script that the policy stops": ("quiet", {"</main>": "<script>alert(1)</script></main>"}, "console, error"),
    "the same without the policy, a dialog": (
        "quiet",
        {"</main>": "<script>alert(1)</script></main>", POLICY: ""},
        "dialog: 1",
    ),
    "a script that fails": ("quiet", {"</main>": "<script>absent()</script></main>", POLICY: ""}, "page error"),
    "a warning": (
        "quiet",
        {"</main>": "<script>console.warn('w')</script></main>", POLICY: ""},
        "console, warning: w",
    ),
    "a dangling link": ("links", {'id="case-1"': 'id="case-99"'}, "#case-1 of knownfam/known points at nothing"),
    "a link to another case": (
        "links",
        {'href="#case-1"': 'href="#case-2"'},
        "#case-2 of knownfam/known leads to ✗ FAIL failfam/fail",
    ),
    "a link out of the page": ("links", {'href="#case-1"': 'href="other.html"'}, "other.html leads out of the page"),
    "evidence that stays hidden": ("links", {"</style>": ".evidence { display: none }</style>"}, "is not in view"),
    "a case without a link": ("links", {'<a href="#case-1"': "<a"}, "no link: rope_theta is not read"),
    "pale text": ("light", {"</style>": ".sentence { color: #aaaaaa }</style>"}, "3 cases diverge"),
    "pale text by opacity": ("light", {"</style>": ".sentence { opacity: 0.4 }</style>"}, "3 cases diverge"),
    "a pale word in a plot": ("light", {"</style>": "svg text { fill: #cccccc !important }</style>"}, "'block 0'"),
    "a cell on its own colour": ("dark", {"</style>": ".matrix .KNOWN { --b: var(--known) }</style>"}, "'4.3e3'"),
    "black in the dark": ("dark", {"</style>": "td, th, p { color: #222222 }</style>"}, "has contrast 1."),
    "a box too wide": ("phone", {"</main>": '<div style="width: 2000px">x</div></main>'}, "the page is 2"),
    "a box too wide, cut off": (
        "phone",
        {"</main>": '<div style="width: 2000px">x</div></main>', "</style>": "html { overflow-x: clip }</style>"},
        "beside the screen: <div",
    ),
    "a size that no phone shows": ("phone", {"</style>": ".matrix th { font-size: 9px }</style>"}, "is 9.0 px high"),
    "a plot that shrinks": ("phone", {"min-width: 620px": "min-width: 0"}, "'block 0' is"),
    "a column that breaks words": ("phone", {"</style>": ".counts small { width: 12px }</style>"}, "broken: "),
    "a matrix too wide for a tablet": ("tablet", {"(max-width: 1000px)": "(max-width: 100px)"}, "broken: "),
    "a matrix too wide for paper": ("paper", {"(max-width: 1000px), print": "(max-width: 100px)"}, "broken: "),
    "details folded on paper": ("paper", {"content-visibility: visible": "color: inherit"}, "folded on paper: "),
    "a table wider than paper": (
        "paper",
        {"</style>": ".plain { width: 900px }</style>"},
        "beside the sheet: <table",
    ),
}
"""What is planted in the report: the check that must see it, what replaces what, and a part of what it says."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three pages, small, with names that attack, as files."""
    directory = tmp_path_factory.mktemp("pages")
    texts = {
        "report": page.render(a_report()),
        "diff": diff_views.page(differing()),
        "history": history.page(told()),
    }
    for name, text in texts.items():
        (directory / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: directory / f"{name}.html" for name in texts}


@pytest.mark.parametrize("name", ["report", "diff", "history"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_page_is_fit_for_its_readers(browser: Browser, pages: dict[str, Path], check: str, name: str) -> None:
    faults = CHECKS[check](browser, pages[name])
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_seen(browser: Browser, pages: dict[str, Path], tmp_path: Path, name: str) -> None:
    check, changes, said = PLANTED[name]
    text = pages["report"].read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"nothing to plant in: {old}"
        text = text.replace(old, new)
    planted = tmp_path / "planted.html"
    planted.write_text(text, encoding="utf-8")
    assert said in "\n".join(CHECKS[check](browser, planted))


def test_a_check_that_sees_nothing_fails(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "empty.html"
    page.write_text("<body style='background: white'>x")
    for check in ("light", "dark", "phone"):
        with pytest.raises(AssertionError, match="1 texts"):
            CHECKS[check](browser, page)
    with pytest.raises(AssertionError, match="has no link"):
        CHECKS["links"](browser, page)
    page.write_text("x")
    with pytest.raises(Error, match="nothing opaque lies under the text"):
        CHECKS["dark"](browser, page)


def test_without_a_browser_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=r"none of chromium, .* install Debian's package chromium"):
        chromium()
