"""The pages in a real Chromium: quiet, linked, legible in the light, in the dark, on a phone and on paper.

A check returns the faults that it finds, in words; one that finds no text at all fails.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright
from playwright.sync_api import TimeoutError as Unfinished

from candle_mi_parity.report import check_page, diff_views, history, page
from tests.support.results import a_report, checked, differing, told

# One browser, where workers are told to keep groups together.
pytestmark = pytest.mark.xdist_group("browser")

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
DESK, PHONE, TABLET = 1280, 360, 800
SHEETS = (718, 794)
"""Widths in CSS pixels; of A4 with margins and without."""
CONTRAST, SMALLEST = 4.5, 11.0
"""WCAG 2's for text; CSS pixels."""
FEWEST = 20
"""Texts on a page below which a check has not looked."""
SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window; its sandbox refuses to run as root."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is on PATH; install Debian's package chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver, driver.chromium.launch(executable_path=program, args=arguments) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages, small, with names that attack, as files."""
    directory = tmp_path_factory.mktemp("pages")
    texts = {"report": page.render(a_report()), "diff": diff_views.page(differing()), "history": history.page(told())}
    texts["check"] = check_page.page(checked())
    for name, text in texts.items():
        (directory / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: directory / f"{name}.html" for name in texts}


@contextmanager
def _opened(browser: Browser, width: int, scheme: Literal["light", "dark"] = "light") -> Iterator[Page]:
    """An empty one, that no network reaches."""
    size = {"width": width, "height": 800}
    with browser.new_context(offline=True, viewport=size, color_scheme=scheme) as context:  # type: ignore[arg-type]
        yield context.new_page()


def _ask(tab: Page, function: str, argument: object = None) -> Any:
    """What a function of browsing.js returns in the page."""
    return tab.evaluate(f"argument => {{ {SCRIPT}\n return {function}(argument) }}", argument)


def quiet(browser: Browser, path: Path) -> list[str]:
    """No word on the console, no error, no dialog, no request but for the file itself."""
    faults: list[str] = []

    def dismiss(dialog: Dialog) -> None:
        faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    with _opened(browser, DESK) as tab:
        tab.on("console", lambda message: faults.append(f"console, {message.type}: {message.text}"))
        tab.on("pageerror", lambda error: faults.append(f"page error: {error}"))
        tab.on("request", lambda request: faults.append(f"request: {request.url}"))
        tab.on("dialog", dismiss)
        tab.goto(path.as_uri())
        _ask(tab, "open")
        tab.mouse.wheel(0, 1e6)  # what is fetched when it comes into view
        try:
            tab.wait_for_load_state("networkidle", timeout=10_000)
        except Unfinished:  # told beside the request that has no end, and not instead of it
            faults.append("never idle")
    faults.remove(f"request: {path.as_uri()}")
    return faults


def links(browser: Browser, path: Path) -> list[str]:
    """Each leads to what it names, and shows it; each case that is not a pass has one in the matrix."""
    with _opened(browser, DESK) as tab:
        tab.goto(path.as_uri())
        faults = [f"no link: {title}" for title in _ask(tab, "unlinked")]
        for link, (address, name) in zip(tab.locator("a[href]").all(), _ask(tab, "links"), strict=True):
            if not address.startswith("#"):
                faults.append(f"{address} leads out of the page")
                continue
            link.click()
            fault = _ask(tab, "arrival", name)
            faults += [f"{address} of {name} {fault}"] if fault else []
        assert tab.locator("a[href]").count(), f"{path} has no link"
    return faults


def contrast(browser: Browser, path: Path, scheme: Literal["light", "dark"]) -> list[str]:
    """Every text stands out from what lies under it."""
    with _opened(browser, DESK, scheme) as tab:
        tab.goto(path.as_uri())
        _ask(tab, "open")
        found = _ask(tab, "contrasts")
    assert len(found) >= FEWEST, f"{path}: {len(found)} texts"
    return [f"{text!r} has contrast {ratio:.2f}" for text, ratio in found if not ratio >= CONTRAST]


def narrow(browser: Browser, path: Path, width: int) -> list[str]:
    """Nothing lies beside the screen but in a box that scrolls by itself; no letter too small, no word broken."""
    with _opened(browser, width) as tab:
        tab.goto(path.as_uri())
        _ask(tab, "open")
        found = tab.evaluate("() => document.documentElement.scrollWidth")
        faults = [f"the page is {found} px wide"] if found > width else []
        faults += [f"beside the screen: {element}" for element in _ask(tab, "beyond", True)]
        faults += [f"broken: {word}" for word in _ask(tab, "broken")]
        sizes = _ask(tab, "sizes")
    assert len(sizes) >= FEWEST, f"{path}: {len(sizes)} texts"
    return faults + [f"{text!r} is {size:.1f} px high" for text, size in sizes if not size >= SMALLEST]


def paper(browser: Browser, path: Path) -> list[str]:
    """Details are open without a click, no word is broken, nothing lies beside the sheet, which cannot scroll."""
    faults = []
    for width in SHEETS:
        with _opened(browser, width) as tab:
            tab.emulate_media(media="print")
            tab.goto(path.as_uri())
            faults += [f"folded on paper: {title}" for title in _ask(tab, "folded")]
            faults += [f"broken: {word}" for word in _ask(tab, "broken")]
            faults += [f"beside the sheet: {element}" for element in _ask(tab, "beyond", False)]
    return faults


CHECKS: dict[str, Callable[[Browser, Path], list[str]]] = {
    "quiet": quiet,
    "links": links,
    "light": partial(contrast, scheme="light"),
    "dark": partial(contrast, scheme="dark"),
    "phone": partial(narrow, width=PHONE),
    "tablet": partial(narrow, width=TABLET),
    "paper": paper,
}


PAIRS = [(check, name) for check in CHECKS for name in ("report", "diff", "history", "check")]
PAIRS.remove(("links", "check"))  # which has none


@pytest.mark.parametrize(("check", "name"), PAIRS)
def test_a_page_is_fit_for_its_readers(browser: Browser, pages: dict[str, Path], check: str, name: str) -> None:
    faults = CHECKS[check](browser, pages[name])
    assert not faults, "\n".join(faults)
