"""A real browser for the tests of reports, and what a visit to a page must not do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu")


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Headless Chromium; the tests that need it are skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page, as text or file, in a new window; fails when it says anything, or asks for anything but itself."""
    said: list[str] = []
    asked: list[str] = []
    windows: list[Any] = []

    def opened(page: str | Path, drawn: bool = True, **settings: Any) -> Any:
        file = page
        if isinstance(page, str):
            file = tmp_path / f"page{len(windows)}.html"
            file.write_text(page, encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        context.set_default_timeout(5000)
        window = context.new_page()
        window.on("console", lambda message: said.append(message.text))
        window.on("pageerror", lambda error: said.append(str(error)))
        window.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        window.on("request", lambda request: asked.append(request.url))
        window.goto(f"file://{file}")
        if drawn:
            window.wait_for_selector("html[data-drawn]")
        windows.append((context, f"file://{file}"))
        return window

    yield opened
    for context, _ in windows:
        context.close()
    assert said == []
    assert asked == [address for _, address in windows]
