"""The report of `check matrix` as a page."""

from __future__ import annotations

from collections.abc import Sequence

import burnish
from burnish.tools import terminal
from burnish.tools.check import matrix_said, said
from burnish.tools.check.matrix import Row, exit_code
from burnish.tools.check.matrix import State as Outcome
from burnish.tools.page.parts import Entry, Figure, Page, Section, State, Table, name

_STATES = {
    Outcome.FAILED: State.BAD,
    Outcome.REGRESSION: State.BAD,
    Outcome.REMOVED: State.BAD,
    Outcome.ADDED: State.ADDED,
    Outcome.FINE: State.GOOD,
}


def matrix_page(rows: Sequence[Row]) -> Page:
    """What `check matrix` found, for people."""
    counts = [(state, sum(row.state is state for row in rows)) for state in Outcome]
    table = Table("", matrix_said.COLUMNS, tuple(_cells(row) for row in rows))
    return Page(
        title=terminal.count(len(rows), "model"),
        kind="check matrix",
        state=State.BAD if exit_code(rows) else State.GOOD,
        mark=("passed", "regressed", "not all checked")[exit_code(rows)],
        summary=f"{matrix_said.sentence(rows)}.",
        figures=tuple(
            Figure(str(number), state.value, "", _STATES[state] if state is not Outcome.ADDED else State.PLAIN)
            for state, number in counts
            if number
        ),
        sections=(
            Section("All models", "models", (table,)),
            Section("Differences", "differences", tuple(_entry(row) for row in rows)),
        ),
        foot=(f"Made by burnish {burnish.__version__}.",),
    )


def _cells(row: Row) -> tuple[str, ...]:
    return tuple(cell and name(cell.replace("->", "→")) for cell in matrix_said.cells(row))


def _entry(row: Row) -> Entry:
    *_, what = _cells(row)
    found = () if row.report is None else row.report.differences
    lines = tuple(
        (one.verdict.value, one.field.value, said.told(one), " → ".join(said.change(one) or ()), one.place)
        for one in found
    )
    tables = (Table("", ("verdict", "of", "difference", "values", "where"), lines),) if lines else ()
    if row.reason:
        texts: tuple[str, ...] = (row.reason,)
    else:
        alone = {Outcome.ADDED: "It is new.", Outcome.REMOVED: "It is gone."}
        texts = () if lines else (alone.get(row.state, "Nothing differs."),)
    return Entry(name(row.name), _STATES[row.state], row.state.value, what, texts, tables)
