"""Reports in a real browser: readable, reachable with the keyboard, quiet, and quick."""

import time
from pathlib import Path

import onnx
import onnx.parser
import pytest

import burnish
from burnish.tools import report
from burnish.tools.check.check import check
from burnish.tools.check.take import Request, take
from burnish.tools.page import render
from burnish.tools.page.alignment import Part, pair
from burnish.tools.page.check_page import check_page
from burnish.tools.page.graphs import graphs
from burnish.tools.page.optimize_page import optimize_page
from burnish.tools.page.parts import Page, Section, State

DEMO = Path(burnish.tools.__file__).parent / "demo"

CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [x, y, z] = [r, g, b].map((c) => linear(c / 255));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (e) => {
    const [r, g, b, alpha = 1] = parse(getComputedStyle(e).backgroundColor);
    return alpha > 0 ? [r, g, b] : behind(e.parentElement);
  };
  const bad = new Set();
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), back = behind(e), alpha = Number(style.opacity);
    const ink = parse(style.color).slice(0, 3);
    const mixed = ink.map((c, i) => c * alpha + back[i] * (1 - alpha));
    const [a, b] = [light(mixed), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.add(`${e.tagName}.${e.className} ${ratio.toFixed(2)}`);
  }
  return [...bad];
}"""

DRAWN = """() => [...document.querySelectorAll("canvas")].map((canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const data = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  const colors = new Set();
  for (let at = 0; at < data.length; at += 4) if (data[at + 3] > 200) colors.add(data.slice(at, at + 3).join());
  return colors.size;
})"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that made lossy edits: the page with the most to show."""
    folder = tmp_path_factory.mktemp("report")
    result = burnish.optimize(
        DEMO / "digits_resnet.onnx", data=str(DEMO / "digits.npz"), passes=["project-rank{ranks=4}"], max_drop="5%"
    )
    report.write(result, folder / "out.html")
    return folder / "out.html"


@pytest.fixture(scope="module")
def checked(changed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a model that changed since it was locked."""
    folder = tmp_path_factory.mktemp("checked")
    render.write(check_page(*changed), folder / "out.html")
    return folder / "out.html"


@pytest.mark.parametrize(("made", "charts"), [("written", 5), ("checked", 2)])
def test_it_is_one_quiet_file_that_draws_its_charts_in_light_and_dark(made, charts, request, visit):
    written = request.getfixturevalue(made)
    pages = {scheme: visit(written, color_scheme=scheme) for scheme in ("light", "dark")}
    for page in pages.values():
        counts = page.evaluate(DRAWN)
        assert len(counts) == charts and min(counts) > 3
        page.click("#expand")
        assert page.evaluate(CONTRAST) == []
    back = "getComputedStyle(document.body).backgroundColor"
    light, dark = (page.evaluate(back) for page in pages.values())
    assert light != dark
    pages["light"].click("#theme")
    assert pages["light"].evaluate(back) == dark
    assert min(pages["light"].evaluate(DRAWN)) > 3


@pytest.mark.parametrize(("made", "width"), [("written", 1280), ("written", 390), ("checked", 390)])
def test_the_page_is_never_wider_than_the_window(made, width, request, visit):
    page = visit(request.getfixturevalue(made), viewport={"width": width, "height": 800})
    page.click("#expand")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_everything_that_opens_is_reached_and_opened_with_the_keyboard(written, visit):
    page = visit(written)
    seen, summaries = set(), page.locator("summary:visible").count()
    for _ in range(200):
        page.keyboard.press("Tab")
        place = page.evaluate(
            "(e => e.tagName === 'SUMMARY' ? [...document.querySelectorAll('summary')].indexOf(e) : e.tagName)"
            "(document.activeElement)"
        )
        if place == "BODY":
            break
        if isinstance(place, int) and not seen:
            opened = "document.activeElement.parentElement.open"
            page.keyboard.press("Enter")
            assert page.evaluate(opened)
            page.keyboard.press("Space")
            assert not page.evaluate(opened)
        seen |= {place}
    assert len([one for one in seen if isinstance(one, int)]) == summaries
    assert {"A", "INPUT", "BUTTON"} <= seen


def test_buttons_and_filter_show_what_is_asked_for(written, visit):
    page = visit(written)
    opened = "document.querySelectorAll('main details[open]').length"
    page.click("#expand")
    assert page.evaluate(opened) == page.locator("main details").count()
    page.click("#collapse")
    assert page.evaluate(opened) == 0
    page.fill("#filter", "fold-batchnorm")
    page.wait_for_selector("#found:not(:empty)")
    assert "fold-batchnorm" in " ".join(page.locator(".entry:visible").all_text_contents())
    assert page.locator(".entry:visible").count() < page.locator(".entry").count()
    page.fill("#filter", "no such thing")
    page.wait_for_selector("#found:has-text('0 lines')")
    assert page.locator(".piece:visible, .entry:visible").count() == 0
    page.fill("#filter", "")
    page.wait_for_selector("#found:empty", state="attached")
    assert page.evaluate(opened) == 0
    assert page.locator(".piece:visible").count() == page.locator(".piece").count()
    page.click("#changed")
    assert page.locator(".entry[data-state=plain]:visible").count() == 0
    assert page.locator(".entry[data-state=good]:visible").count() > 0


def test_a_difference_leads_to_its_place_in_the_graph(checked, visit):
    page = visit(checked)
    page.locator(".entry[data-state=bad] summary", has_text="Erf is now Tanh").click()
    page.locator(".entry[open] a").click()
    page.wait_for_selector(".piece[open]")
    assert page.locator(".piece[open] .what").all_text_contents() == ["block 1"]
    assert "Tanh(" in (page.locator(".piece[open] tr.added:visible").first.text_content() or "")


def test_it_reads_well_to_those_who_do_not_see_it(written, visit):
    page = visit(written)
    found = page.evaluate(
        """() => (all => ({
          titles: all("h1, h2, h3").map((e) => Number(e.tagName[1])),
          landmarks: ["header", "nav", "main", "footer"].filter((e) => all(e).length !== 1),
          unnamed: all("button, input, canvas, th, summary, [role=region], [role=group]").filter((e) =>
            !(e.textContent.trim() || e.getAttribute("aria-label"))).length,
          doubled: all("[id]").length - new Set(all("[id]").map((e) => e.id)).size,
          links: all("nav a").filter((e) => !document.getElementById(e.hash.slice(1))).length,
          language: document.documentElement.lang,
        }))(selector => [...document.querySelectorAll(selector)])"""
    )
    titles = found.pop("titles")
    assert titles[0] == 1 and titles.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(titles, titles[1:], strict=False))
    assert found == {"landmarks": [], "unnamed": 0, "doubled": 0, "links": 0, "language": "en"}


def test_without_scripts_all_is_there_but_the_pictures(written, visit):
    page = visit(written, drawn=False, java_script_enabled=False)
    assert page.locator("canvas:visible").count() == 0
    assert page.locator(".tools:visible").count() == 0
    page.locator(".numbers summary").first.click()
    assert page.locator(".numbers table:visible").count() == 1


def hostile() -> tuple[onnx.ModelProto, str]:
    """A model whose names are markup, and one of the names."""
    evil = ["</script><script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "\u202eredro", "n" * 10_000]
    graph = "g (float[2] x) => (float[2] y) { a = Neg (x) b = Abs (a) y = Relu (b) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
    proto.graph.name = evil[0]
    for node, called in zip(proto.graph.node, evil, strict=False):
        node.name = called
    for inner, called in (("a", evil[1]), ("b", evil[3])):
        for node in proto.graph.node:
            node.input[:] = [called if one == inner else one for one in node.input]
            node.output[:] = [called if one == inner else one for one in node.output]
    return proto, evil[0]


@pytest.mark.parametrize("kind", ["optimize", "check"])
def test_names_in_a_model_cannot_break_out(kind, visit):
    proto, name = hostile()
    if kind == "optimize":
        result = burnish.optimize(proto, verify="off")
        text = render.html(optimize_page(result, result.original))
    else:
        old = burnish.load(proto)
        proto.graph.node[1].op_type = "Sqrt"
        proto.graph.input[0].name = proto.graph.node[0].input[0] = name
        new, asked = burnish.load(proto), Request(run=False)
        report = check(new, take(old, asked), asked, model_name=name, lock_name=f"{name}.yaml")
        text = render.html(check_page(report, old, new))
    page = visit(text)
    page.click("#expand")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert name in (page.text_content("main") or "")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_thirty_blocks_that_all_differ_open_at_once(visit):
    def blocks(word: str) -> list[Part]:
        made = []
        for n in range(30):
            lines = tuple(f"MatMul(Add, float[{576 + n},{k}]) {word if k % 3 else ''}" for k in range(60))
            names = tuple(f"/model/layers.{n}/self_attn/{k}/MatMul" for k in range(60))
            made.append(Part(f"block {n}", f"{word}{n}", "", lines, names))
        return made

    shown = Section("Graph", "graph", (graphs(pair(blocks("a"), blocks("b")), "before", "after"),))
    text = render.html(Page("thirty blocks", "optimize", State.GOOD, "fine", "All differ.", (shown,)))
    assert len(text) < 2e6
    loaded, opened = [], []
    for _ in range(3):  # the quickest of three counts: the machine may be busy with other tests
        started = time.perf_counter()
        page = visit(text)
        loaded.append(time.perf_counter() - started)
        opened.append(
            page.evaluate(
                """() => new Promise((done) => {
                  const before = performance.now();
                  document.getElementById("expand").click();
                  requestAnimationFrame(() => setTimeout(() => done((performance.now() - before) / 1000)));
                })"""
            )
        )
    assert page.locator("main details[open]").count() == 30
    assert min(loaded) < 2 and min(opened) < 2
