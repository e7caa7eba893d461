"""The pages in a real Chromium: no script, no request, legible in light and dark, on a phone and on paper.

Each check returns the faults that it finds, in words.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

from candle_mi_parity.report import check_page, diff_views, history, hunt_page, page
from tests.support.results import a_history, a_hunt, a_report, checked, differing

# One browser for all tests of this file.
pytestmark = pytest.mark.xdist_group("browser")

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
DESK, PHONE, SHEET = 1280, 360, 718
"""Widths in CSS pixels; of an A4 sheet without its margins."""
CONTRAST, SMALLEST = 4.5, 11.0
"""Contrast that WCAG 2 demands of text; size of text in CSS pixels."""
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
    """The pages as files, with names that attack them."""
    directory = tmp_path_factory.mktemp("pages")
    texts = {
        "report": page.render(a_report()),
        "diff": diff_views.page(differing()),
        "history": history.page(a_history()),
        "check": check_page.page(checked()),
        "hunt": hunt_page.hunt_page(a_hunt()),
    }
    for name, text in texts.items():
        (directory / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: directory / f"{name}.html" for name in texts}


@contextmanager
def _opened(browser: Browser, width: int, scheme: Literal["light", "dark"] = "light") -> Iterator[Page]:
    """An empty page without a network."""
    size = {"width": width, "height": 800}
    with browser.new_context(offline=True, viewport=size, color_scheme=scheme) as context:  # type: ignore[arg-type]
        yield context.new_page()


def _ask(tab: Page, function: str, argument: object = None) -> Any:
    """What a function of test_browser.js returns in the page."""
    return tab.evaluate(f"argument => {{ {SCRIPT}\n return {function}(argument) }}", argument)


def quiet(browser: Browser, path: Path) -> list[str]:
    """The page writes nothing to the console, opens no dialog and requests no other file."""
    faults: list[str] = []

    def dismiss(dialog: Dialog) -> None:
        faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    with _opened(browser, DESK) as tab:
        tab.on("console", lambda message: faults.append(f"console, {message.type}: {message.text}"))
        tab.on("pageerror", lambda error: faults.append(f"error: {error}"))
        tab.on("request", lambda request: faults.append(f"request: {request.url}"))
        tab.on("dialog", dismiss)
        tab.goto(path.as_uri())
        _ask(tab, "open")
        tab.mouse.wheel(0, 1e6)  # loads what is loaded lazily
        tab.wait_for_load_state("networkidle", timeout=120_000)
    faults.remove(f"request: {path.as_uri()}")
    return faults


def contrast(browser: Browser, path: Path, scheme: Literal["light", "dark"]) -> list[str]:
    """Every text has enough contrast with its background."""
    with _opened(browser, DESK, scheme) as tab:
        tab.goto(path.as_uri())
        _ask(tab, "open")
        found = _ask(tab, "contrasts")
    assert len(found) >= 20, f"{path}: {len(found)} texts"
    return [f"{text!r} has contrast {ratio:.2f}" for text, ratio in found if not ratio >= CONTRAST]


def phone(browser: Browser, path: Path) -> list[str]:
    """Nothing lies outside the screen, except in a box that scrolls, and no letter is too small."""
    with _opened(browser, PHONE) as tab:
        tab.goto(path.as_uri())
        _ask(tab, "open")
        faults = [f"outside the screen: {element}" for element in _ask(tab, "beyond", True)]
        sizes = _ask(tab, "sizes")
    assert len(sizes) >= 20, f"{path}: {len(sizes)} texts"
    return faults + [f"{text!r} is {size:.1f} px high" for text, size in sizes if not size >= SMALLEST]


def paper(browser: Browser, path: Path) -> list[str]:
    """Details are open without a click, and nothing lies outside the sheet."""
    with _opened(browser, SHEET) as tab:
        tab.emulate_media(media="print")
        tab.goto(path.as_uri())
        faults = [f"folded on paper: {title}" for title in _ask(tab, "folded")]
        return faults + [f"outside the sheet: {element}" for element in _ask(tab, "beyond", False)]


CHECKS: dict[str, Callable[[Browser, Path], list[str]]] = {
    "quiet": quiet,
    "light": partial(contrast, scheme="light"),
    "dark": partial(contrast, scheme="dark"),
    "phone": phone,
    "paper": paper,
}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", ["report", "diff", "history", "check", "hunt"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_page_is_fit_for_its_readers(browser: Browser, pages: dict[str, Path], check: str, name: str) -> None:
    faults = CHECKS[check](browser, pages[name])
    assert not faults, "\n".join(faults)
