"""A browser that opens pages from disk and lets nothing pass: no error, no request."""

import os
from pathlib import Path

import pytest

from bench.pages.looks import CSS

_PAGES = Path(__file__).parents[2] / "bench" / "pages"
_CHROMIUM = "/usr/bin/chromium"


def _missing(what: str) -> None:
    """Skip, but never where everything has to be tested."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}: the browser tests have to run where CI is set")
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    if not Path(_CHROMIUM).exists():
        _missing(f"there is no {_CHROMIUM}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens HTML, or a file of it; the test fails on what is in `open_page.wrong` at its end: any
    error on the page and any request that is not the page."""
    opened, wrong = [], []

    def open_page(html: str | Path, width: int = 1280, dark: bool = False, **options):
        path = html
        if isinstance(html, str):
            path = tmp_path / f"page{len(opened)}.html"
            path.write_text(html, encoding="utf-8")
        address = path.resolve().as_uri()
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if dark else "light",
            **options,
        )
        page = context.new_page()
        opened.append(context)
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url) if asked.url != address else None)
        page.goto(address)
        return page

    open_page.wrong = wrong
    yield open_page
    for context in opened:
        context.close()
    assert wrong == []


@pytest.fixture(scope="session")
def whole():
    """Makes a page of the body's HTML, with the style and the script of all pages."""
    style = CSS + (_PAGES / "page.css").read_text()
    script = (_PAGES / "page.js").read_text()

    def whole(body: str) -> str:
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>page</title>'
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            f"<style>{style}</style><body>{body}<script>{script}</script></body></html>"
        )

    return whole
