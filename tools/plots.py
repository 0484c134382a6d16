"""What the pictures of `burnish inspect` share: one look, colours that colour-blind readers tell apart, whole files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.ir.errors import InputError, MissingPackageError
from burnish.tools import terminal, whole_file

SUFFIXES = (".svg", ".png")

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito (2008), in the order to use it; give lines and points different marks besides."""

MARKS = ("o", "s", "^", "D", "v", "P", "X")

GREY = "#767676"


def check(path: str) -> None:
    """Refuse a picture that could not be written, before any work is done.

    Raises:
        InputError: neither svg nor png, no such folder, or something there that is no file.
        MissingPackageError: matplotlib is not installed.
    """
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"a picture cannot be written as `{file.suffix or file.name}`", place=path, hint="name an .svg or .png file"
        )
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK) or (file.exists() and not file.is_file()):
        raise InputError("the picture cannot be written there", place=path, hint="name a file in a folder that exists")
    _matplotlib()


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingPackageError(
            "drawing needs matplotlib, which is not installed", hint="pip install 'burnish[plot]'"
        ) from error
    return mpl


@contextmanager
def style() -> Iterator[None]:
    """The look of the pictures, for what is drawn meanwhile."""
    mpl = _matplotlib()
    from cycler import cycler

    look = {
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.6,
        "figure.constrained_layout.use": True,
        "figure.dpi": 130,
        "font.size": 9,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "burnish",
        "text.parse_math": False,
    }
    with mpl.rc_context(look):
        yield


def figure(width: float = 8.0, height: float = 4.8, **grid: Any) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches and its axes, for `Figure.subplots(**grid)`; no window is opened."""
    _matplotlib()
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height))
    return made, made.subplots(**grid)


def bytes_unit(largest: float) -> tuple[float, str]:
    """A unit in which `largest` bytes are a number between 1 and 1000: its bytes and its name."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= unit:
            return unit, name
    return 1.0, "B"


def plain_ticks(axes: Any) -> None:
    """Label logarithmic axes with plain numbers, from 1000 on with the letters of thousands: 0.1, 10, 1 M."""
    _matplotlib()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            axis.set_major_locator(LogLocator(numticks=12))
            axis.set_major_formatter(FuncFormatter(lambda number, place: terminal.quantity(number)))
            axis.set_minor_formatter(NullFormatter())


def save(drawing: Any, path: str | Path) -> None:
    """Write a figure whole or not at all; raises like `check`."""
    check(str(path))
    form = Path(path).suffix.lower().lstrip(".")
    content = io.BytesIO()
    drawing.savefig(content, format=form, metadata={"Date": None} if form == "svg" else None)
    whole_file.write(path, content.getvalue())
