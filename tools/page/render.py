"""A page as HTML: one file, nothing fetched, all text escaped."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from burnish.ir.errors import InputError
from burnish.tools import plots, terminal, whole_file
from burnish.tools.page.parts import Chart, Page, Series, State

START = b"<!doctype html>\n<!-- a report of burnish -->"
"""How every report begins."""

LONGEST = 4000
"""Characters of a text that are written; no name of a node makes a page that a browser cannot lay out."""

_HERE = Path(__file__).parent
_MARKS = {
    State.SAME: "same",
    State.CHANGED: "changed",
    State.WEIGHTS: "weights",
    State.ADDED: "added",
    State.REMOVED: "removed",
}


def html(page: Page) -> str:
    """The page as the text of an HTML file."""
    made = (
        _environment()
        .get_template("page.html")
        .render(
            page=page,
            style=_asset("page.css"),
            script=_asset("page.js"),
            library=chart_library() if page.has_charts else None,
        )
    )
    return made.lstrip()


def write(page: Page, path: str | Path) -> None:
    """Write a page whole or not at all.

    Raises:
        InputError: when the file cannot be written.
    """
    whole_file.write(path, html(page))


def is_page(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a report as `write` makes them, or empty."""
    return not head or head.startswith(START)


def check_target(path: str) -> None:
    """Refuse a page that could not be written, or would replace what is no page of ours, before any work is done.

    Raises:
        InputError: it is not called `.html`, its folder cannot be written to, or something else is there.
    """
    file = Path(path)
    if not is_called_page(file):
        raise InputError("a page to read is written as .html", place=path, hint="name an .html file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK) or (file.exists() and not file.is_file()):
        raise InputError("the report cannot be written there", place=path, hint="name a file in a folder that exists")
    if file.exists():
        with file.open("rb") as stream:
            if not is_page(stream.read(len(START))):
                raise InputError("there is a file that is no report", place=path, hint="give the report another name")


def is_called_page(path: str | Path) -> bool:
    """Whether a report of this name is a page."""
    return Path(path).suffix.lower() in (".html", ".htm")


def chart_library() -> Markup:
    """Chart.js, without the line that would have a browser look for another file.

    Raises:
        InputError: the installed file is not the one that burnish came with.
    """
    file = _HERE / "vendor" / "chart.umd.min.js"
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() not in (_HERE / "vendor" / "versions.txt").read_text(encoding="ascii"):
        raise InputError("the chart library is damaged", place=str(file), hint="install burnish anew")
    code = content.decode("utf-8")
    return Markup("\n".join(line for line in code.splitlines() if not line.startswith("//# sourceMappingURL")))


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.globals.update(drawing=drawing, marks=_MARKS, count=terminal.count)
    made.filters.update(groupwise=_groupwise, ticked=_ticked)
    return made


def _asset(file: str) -> Markup:
    return Markup((_HERE / file).read_text(encoding="utf-8"))


def _shown(thing: Any) -> Any:
    """What is written of a text: control characters and marks of direction as escapes, and no more than `LONGEST`."""
    if isinstance(thing, str) and not isinstance(thing, Markup):
        return _plain(thing)
    return thing


def _plain(text: str) -> str:
    text = terminal.printable(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _ticked(text: str) -> Markup:
    """Text in which what stands between backquotes is code; an odd backquote stays one."""
    pieces = _plain(text).split("`")
    if len(pieces) % 2 == 0:
        pieces[-2:] = ["`".join(pieces[-2:])]
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if number % 2 else escape(piece) for number, piece in enumerate(pieces)
    )


def _groupwise(parts: Iterable[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Neighbouring parts of one kind together."""
    for kind, some in groupby(parts, key=lambda part: part.kind):
        yield str(kind), list(some)


def drawing(chart: Chart) -> Markup:
    """What the script of the page draws, as JSON that no markup can end."""
    data = {
        "x": _plain(chart.x),
        "y": _plain(chart.y),
        "labels": [_plain(one) for one in chart.labels],
        "logarithmic": chart.logarithmic,
        "places": chart.places,
        "series": [_series(one, number, chart.logarithmic) for number, one in enumerate(chart.series)],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


_SHAPES = ("circle", "rect", "triangle", "rectRot", "star", "crossRot", "cross")
"""Of points, so that colour is not all that tells series apart."""


def _series(one: Series, number: int, logarithmic: bool) -> dict[str, Any]:
    known = [p for p in one.points if math.isfinite(p.x) and math.isfinite(p.y) and (p.y > 0 or not logarithmic)]
    return {
        "name": _plain(one.name),
        "color": plots.COLORS[(number if one.color is None else one.color) % 6],
        "mark": _SHAPES[number % len(_SHAPES)],
        "line": one.line,
        "dashed": one.dashed,
        "points": [{"x": point.x, "y": point.y, "label": _plain(point.label)} for point in known],
    }
