"""A real browser for the tests of reports, what a visit to a page must not do, and a model that changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import burnish
from burnish.tools.check.check import check
from burnish.tools.check.difference import Report
from burnish.tools.check.take import Request, take

MODEL = Path(burnish.tools.__file__).parent / "demo" / "digits_vit.onnx"
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


@pytest.fixture(scope="package")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Any, Any]:
    """A report of a moved weight, another epsilon and another activation; the locked model and the changed one."""
    folder = tmp_path_factory.mktemp("changed")
    proto = onnx.load(MODEL)
    weight = next(one for one in proto.graph.initializer if len(one.dims) == 2)
    array = numpy_helper.to_array(weight)
    noise = 1 + 1e-2 * np.random.default_rng(0).standard_normal(array.shape)
    weight.CopyFrom(numpy_helper.from_array((array * noise).astype(array.dtype), weight.name))
    norms = [node for node in proto.graph.node if node.op_type == "LayerNormalization"]
    next(one for one in norms[2].attribute if one.name == "epsilon").f = 1e-3
    [node for node in proto.graph.node if node.op_type == "Erf"][1].op_type = "Tanh"
    onnx.save(proto, folder / "new.onnx")
    old, new = burnish.load(MODEL), burnish.load(folder / "new.onnx")
    lock = take(old, Request())
    return check(new, lock, Request(), old=old, model_name=str(folder / "new.onnx"), lock_name="a.lock.yaml"), old, new
