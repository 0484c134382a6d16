"""Pages as text: nothing that a name holds is markup, nothing is fetched, and files of others stay."""

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from burnish.ir.errors import InputError
from burnish.tools import page as package
from burnish.tools.page import render
from burnish.tools.page.parts import Chart, Entry, Page, Point, Section, Series, State, Table, name

HERE = Path(package.__file__).parent
EVIL = '</script><script>alert(1)</script><!-- " onload="alert(2)" \u202e\u2066 `x` & \ud800 \x00'


class _Tags(HTMLParser):
    """All tags with their attributes, and all comments."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.comments: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def test_nothing_that_a_name_holds_is_markup() -> None:
    table = Table(EVIL, (EVIL,), ((EVIL,),), EVIL)
    chart = Chart(EVIL, EVIL, EVIL, (Series(EVIL, (Point(0, 1, EVIL),)),), table, (EVIL,), note=EVIL)
    entry = Entry(EVIL, State.BAD, EVIL, EVIL, (EVIL,), (table,))
    page = Page(EVIL, EVIL, State.BAD, EVIL, EVIL, (Section(EVIL, "s", (table, chart, entry), (EVIL,)),), foot=(EVIL,))
    text = render.html(page)
    found = _Tags()
    found.feed(text)
    assert [dict(attributes) for tag, attributes in found.tags if tag == "script"] == [
        {"type": "application/json"},
        {},
        {},
    ]
    assert not [name for _, attributes in found.tags for name, _ in attributes if name.startswith("on")]
    assert found.comments == [" a report of burnish "]
    assert "\u202e" not in text and "\\u202e" in text
    text.encode()


def test_a_chart_holds_no_number_that_json_lacks() -> None:
    points = tuple(Point(float(x), y) for x, y in enumerate((1.0, float("nan"), float("inf"), 0.0)))
    chart = Chart("t", "x", "y", (Series("s", points),), Table("", ("a",), ()))
    assert [one["y"] for one in json.loads(str(render.drawing(chart)))["series"][0]["points"]] == [1.0, 0.0]


def test_nothing_is_fetched_and_the_library_is_there_only_where_something_is_drawn() -> None:
    table = Table("t", ("a",), (("b",),))
    plain = render.html(Page("m", "k", State.GOOD, "fine", "All is well.", (Section("S", "s", (table,)),)))
    assert "Content-Security-Policy" in plain and "default-src 'none'" in plain
    assert "Chart.js" not in plain
    drawn = Section("S", "s", (Chart("t", "x", "y", (), table),))
    both = render.html(Page("m", "k", State.GOOD, "fine", "All is well.", (drawn,)))
    assert "Chart.js" in both and "sourceMappingURL" not in both
    for text in (plain, both):
        assert not re.search(r"""(src|href)=["']?(https?:|//|file:)""", text)


def test_the_library_is_the_one_that_was_published_and_its_licence_is_beside_it() -> None:
    said = (HERE / "vendor" / "versions.txt").read_text()
    digest = hashlib.sha256((HERE / "vendor" / "chart.umd.min.js").read_bytes()).hexdigest()
    assert digest in said and "chart.js 4.6.1" in said
    assert "MIT License" in (HERE / "vendor" / "chart.LICENSE.md").read_text()


def test_the_files_of_pages_are_in_the_wheel(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling")
    root = Path(__file__).parents[3]
    files = {one.distribution_path for one in wheel.WheelBuilder(str(root)).recurse_included_files()}
    wanted = {f"burnish/{one.relative_to(HERE.parents[1])}" for one in HERE.rglob("*.*") if one.suffix != ".pyc"}
    assert wanted <= files


def test_a_long_name_loses_its_middle() -> None:
    assert len(name("x" * 10_000)) < 200
    assert name("short") == "short" and name(None) == "?"


def test_a_page_is_written_whole_and_knows_itself_again(tmp_path: Path) -> None:
    page = Page("m", "k", State.GOOD, "fine", "All is well.", ())
    render.write(page, tmp_path / "a.html")
    assert render.is_page((tmp_path / "a.html").read_bytes())
    assert not render.is_page(b"<!doctype html>\n<html>") and render.is_page(b"")
    assert [one.name for one in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(InputError, match="cannot be written"):
        render.write(page, tmp_path / "no" / "a.html")
