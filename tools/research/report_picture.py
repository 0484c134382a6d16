"""The picture of a report in the docs, docs/results/report.png: `python -m burnish.tools.research.report_picture`.

Optimizes the embedded transformer within a budget, opens the report in headless Chromium and takes its head in
light, a changed block and the charts in dark. Needs playwright and Debian's chromium.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

import burnish
from burnish.tools import report

DEMO = Path(__file__).parent.parent / "demo"
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "results" / "report.png"
WIDTH, HEIGHT = 1280, 900


def main() -> None:
    """Make the report and the picture."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "out.html"
        result = burnish.optimize(
            DEMO / "digits_vit.onnx",
            Path(folder) / "out.onnx",
            data=str(DEMO / "digits.npz"),
            passes=["project-rank"],
            max_drop="2%",
        )
        report.write(result, page)
        with sync_playwright() as driver:
            program = shutil.which("chromium")
            browser = driver.chromium.launch(executable_path=program, args=["--headless", "--no-sandbox"])
            shots = [
                _shot(browser, page, "light", "header", 1020),
                _shot(browser, page, "dark", "#graph", 560),
                _shot(browser, page, "dark", "#plans", 500),
            ]
            browser.close()
    whole = Image.new("RGB", (WIDTH, sum(shot.height for shot in shots)))
    top = 0
    for shot in shots:
        whole.paste(shot, (0, top))
        top += shot.height
    whole.quantize(256).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


def _shot(browser: Browser, page: Path, scheme: str, place: str, height: int) -> Image.Image:
    window = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)  # type: ignore[arg-type]
    window.goto(f"file://{page}")
    window.wait_for_selector("html[data-drawn]")
    for fold in window.locator(".piece[data-state=changed]").all()[1:2]:
        fold.evaluate("fold => { fold.open = true; }")
    box = window.locator(place).bounding_box()
    assert box is not None
    clip = {"x": 0.0, "y": max(box["y"] - 16, 0.0), "width": float(WIDTH), "height": float(height)}
    window.add_style_tag(content=".bar { position: static !important; }")
    found = window.screenshot(full_page=True, clip=clip)  # type: ignore[arg-type]
    window.close()
    return Image.open(io.BytesIO(found)).convert("RGB")


if __name__ == "__main__":
    main()
