"""What a page consists of, before it is HTML. All text is plain: whatever a name holds, it is escaped when written."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

NAME_LENGTH = 160
"""Characters of a name that are shown; of a longer one the middle is left out."""


class State(StrEnum):
    """What is said of a part with a mark and a colour."""

    GOOD = "good"
    BAD = "bad"
    WARN = "warn"
    PLAIN = "plain"
    SAME = "same"
    CHANGED = "changed"
    WEIGHTS = "weights"
    ADDED = "added"
    REMOVED = "removed"


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        title: what is listed.
        columns: their names; those that begin with `>` hold numbers and are right-aligned.
        rows: as many cells each as there are columns.
        note: what is to be known of it, in a sentence.
        folded: shown only when it is opened.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Point:
    """A point of a chart; `label` is what is said where it is touched."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour; joined by a line if asked, which may be dashed.

    `color` is a place in `burnish.tools.plots.COLORS`; by default that of the series among all.
    """

    name: str
    points: tuple[Point, ...]
    line: bool = False
    dashed: bool = False
    color: int | None = None


@dataclass(frozen=True)
class Chart:
    """A picture of numbers, with the same numbers as a table.

    Attributes:
        title: what is shown.
        x, y: the axes and their units.
        series: what is drawn. Bars stand at the whole numbers of `labels`.
        table: all numbers, those too that a picture cannot show, such as infinite ones.
        labels: of the bars, from 0 on; empty for points at any place.
        logarithmic: whether the y axis is.
        places: of points that stand at whole numbers from 0 on, how many there are.
        note: what is to be known of it, in a sentence.
    """

    kind: ClassVar[str] = "chart"
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    table: Table
    labels: tuple[str, ...] = ()
    logarithmic: bool = False
    places: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A line of one or of both graphs beside each other.

    Attributes:
        old, new: the text; None on the side that has no such line.
        old_names, new_names: of the nodes that it stands for, one for each block that is shown by it.
    """

    old: str | None
    new: str | None
    old_names: tuple[str, ...] = ()
    new_names: tuple[str, ...] = ()

    @property
    def state(self) -> State:
        """Whether both sides have it."""
        if self.old is None or self.new is None:
            return State.ADDED if self.old is None else State.REMOVED
        return State.SAME if self.old == self.new else State.CHANGED


@dataclass(frozen=True)
class Piece:
    """A part of both graphs, or several blocks that are all alike.

    Attributes:
        title: what it is called.
        state: what became of it.
        counts: how many nodes it has.
        lines: its lines.
        covers: the names of all segments that it stands for.
        anchor: what links lead to.
    """

    title: str
    state: State
    counts: str
    lines: tuple[Line, ...]
    covers: frozenset[str] = frozenset()
    anchor: str = ""

    @property
    def holds(self) -> frozenset[str]:
        """The names of its segments and of its nodes."""
        return self.covers.union(*(line.old_names + line.new_names for line in self.lines))


@dataclass(frozen=True)
class Graphs:
    """Two graphs side by side, or one alone when `new` is empty."""

    kind: ClassVar[str] = "graphs"
    old: str
    new: str
    pieces: tuple[Piece, ...]
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """Something that can be opened: a pass, a difference.

    Attributes:
        title: what it is called.
        state: its colour.
        mark: the word for its state: `changed 12`.
        said: shown beside it while it is closed.
        paragraphs, tables: shown when it is open.
        code: the title is a name and not a sentence.
        anchor: of the part of a graph that it is about; empty for none.
    """

    kind: ClassVar[str] = "entry"
    title: str
    state: State
    mark: str
    said: str = ""
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    code: bool = True
    anchor: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading, which the list of contents leads to."""

    title: str
    anchor: str
    parts: tuple[Table | Chart | Graphs | Entry, ...] = ()
    lead: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A number to remember: `-65 %`, what it is of, and what it was and is."""

    number: str
    name: str
    said: str = ""
    state: State = State.PLAIN


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: what it is about: the name of a model.
        kind: what was done: `optimize`, `check run`.
        state, mark: the outcome as a colour and a word or two.
        summary: the outcome in one sentence.
        sections: in order.
        figures: the few numbers that matter most.
        foot: how it was made.
    """

    title: str
    kind: str
    state: State
    mark: str
    summary: str
    sections: tuple[Section, ...]
    figures: tuple[Figure, ...] = ()
    foot: tuple[str, ...] = field(default=())

    @property
    def has_charts(self) -> bool:
        """Whether anything has to be drawn."""
        return any(part.kind == "chart" for section in self.sections for part in section.parts)


def name(text: str | None) -> str:
    """A name as it is shown: `?` where there is none, without its middle where it is very long."""
    text = text or "?"
    half = NAME_LENGTH // 2
    return text if len(text) <= NAME_LENGTH else f"{text[:half]} … {text[-half:]}"
