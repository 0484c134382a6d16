"""What `check matrix` found: a table for people, Markdown for a step summary, a document for programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import burnish
from burnish.tools import terminal
from burnish.tools.check import as_github, as_json, said
from burnish.tools.check.difference import Field, Report
from burnish.tools.check.matrix import Row, State, exit_code

_NUMBER = re.compile(r"[\d.]+(e[-+]?\d+)?")
COLUMNS = ("model", "verdict", ">nodes", ">weights", ">outputs moved", "what")


def sentence(rows: Sequence[Row]) -> str:
    """How many models there are and what came of them."""
    told = [f"{number} {state}" for state in State if (number := sum(row.state is state for row in rows))]
    return f"{terminal.count(len(rows), 'model')}{': ' if told else ''}{', '.join(told)}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, for `COLUMNS`."""
    report = row.report
    if report is None:
        return row.name, row.state.value, "", "", "", row.reason.splitlines()[0] if row.reason else ""
    old, new = report.old.sizes, report.new.sizes
    return (
        row.name,
        row.state.value,
        _change(old.nodes, new.nodes, str),
        _change(sum(old.bytes.values()), sum(new.bytes.values()), terminal.size),
        moved(report),
        _first(row),
    )


def moved(report: Report) -> str:
    """How far the output moved that moved furthest, relative to its size.

    Returns:
        A number; `no` within rounding; `differs` for another type, NaN and what has no size; empty when not run.
    """
    sizes = [one.new for one in report.differences if one.field is Field.VALUES and one.place]
    if not sizes:
        return "no" if report.old.values and report.new.values else ""
    return max(sizes, key=float) if all(map(_NUMBER.fullmatch, sizes)) else "differs"


def _change(old: int, new: int, shown: Callable[[int], str]) -> str:
    return shown(new) if old == new else f"{shown(old)} -> {shown(new)}"


def _first(row: Row) -> str:
    found = row.report.regressions if row.report is not None else ()
    return "" if not found else said.told(found[0]) + (f", and {len(found) - 1} more" if len(found) > 1 else "")


def markdown(rows: Iterable[Row]) -> str:
    """All rows as a Markdown table; names are shown as they are."""
    head = [column.lstrip(">") for column in COLUMNS]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(map(as_github.markdown, cells(row)))} |" for row in rows]
    return "\n".join(lines) + "\n"


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """All that was found, in plain types.

    Returns:
        `version` of this form; `burnish`, the program's version; `sentence`; `exit_code`; `models`: each with `model`
        (its path in the folders), `state`, `reason` of a failure, `outputs_moved` (see `moved`) and `report`, which is
        the document of `check run` or None.
    """
    models = [
        {
            "model": row.name,
            "state": row.state.value,
            "reason": row.reason,
            "outputs_moved": "" if row.report is None else moved(row.report),
            "report": None if row.report is None else as_json.document(row.report),
        }
        for row in rows
    ]
    return {
        "version": as_json.VERSION,
        "burnish": burnish.__version__,
        "sentence": sentence(rows),
        "exit_code": exit_code(rows),
        "models": models,
    }
