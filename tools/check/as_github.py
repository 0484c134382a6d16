"""What `check` found for GitHub Actions: workflow commands that annotate files, and a step summary in Markdown.

Names come from models and may hold anything: none of it is read as a command, as Markdown or as HTML.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from burnish.tools import terminal
from burnish.tools.check import said
from burnish.tools.check.difference import Difference, Report, Verdict
from burnish.tools.check.pointed import in_repository, line
from burnish.tools.terminal import printable

ROWS = 200
"""Differences shown of a model in the step summary, which GitHub cuts at 1 MiB."""

_COMMANDS = {Verdict.REGRESSION: "error", Verdict.TOLERATED: "notice", Verdict.NOTE: "notice"}
_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|&~@:.$]")


def publish(reports: Sequence[Report], failed: Mapping[str, str], head: str = "") -> None:
    """Annotate (on stderr) and add to the step summary, where the environment is GitHub Actions.

    Args:
        reports, failed: as for `commands`.
        head: Markdown above the summary, which then has sections for what regressed and what failed only.

    Raises:
        OSError: the step summary cannot be written.
    """
    if not terminal.in_actions():
        return
    for command in commands(reports, failed):
        print(command, file=sys.stderr)
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if target:
        with open(target, "a", encoding="utf-8") as stream:
            shown = [one for one in reports if not (head and one.passed)]
            stream.write(f"{head}{summary(shown, failed)}\n")


def commands(reports: Sequence[Report], failed: Mapping[str, str] | None = None) -> Iterator[str]:
    """A workflow command for each difference, regressions of all models first: GitHub shows ten of a kind per step.

    Args:
        reports: one for each model.
        failed: models that could not be checked, with the reason.
    """
    for name, reason in (failed or {}).items():
        yield _command("error", printable(reason), file=in_repository(name), title=f"{name} was not checked")
    for verdict in (Verdict.REGRESSION, Verdict.NOTE, Verdict.TOLERATED):
        for report in reports:
            for one in report.differences:
                if one.verdict is verdict:
                    yield _annotation(report, one)


def _annotation(report: Report, one: Difference) -> str:
    where = line(report, one)
    at = {"file": in_repository(report.model)}
    if where is not None:
        at = {"file": in_repository(report.lock), "line": str(where)}
    shown = said.arrow(one)
    message = f"{said.told(one)}\n{shown}" if shown else said.told(one)
    return _command(_COMMANDS[one.verdict], message, **at, title=f"{one.field.value} of {report.model}")


def _command(name: str, message: str, **properties: str) -> str:
    given = ",".join(f"{key}={_property(printable(value))}" for key, value in properties.items())
    return f"::{name} {given}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def summary(reports: Sequence[Report], failed: Mapping[str, str] | None = None) -> str:
    """The step summary: for each model its verdict as a heading and its differences as a table."""
    parts = [
        f"### {markdown(name)} was not checked\n\nReason: {markdown(why)}\n" for name, why in (failed or {}).items()
    ]
    for report in sorted(reports, key=lambda one: one.passed):
        parts.append(f"### {markdown(said.sentence(report))}\n")
        rows = [_row(one) for one in report.differences]
        if rows:
            more = [f"and {len(rows) - ROWS} more\n"] if len(rows) > ROWS else []
            table = "\n".join(["| | field | what | old | new |", "| --- | --- | --- | --- | --- |", *rows[:ROWS], ""])
            parts += [table, *more]
    return "\n".join(parts)


def _row(one: Difference) -> str:
    old, new = map(markdown, said.change(one) or ("", ""))
    word = "**regression**" if one.verdict is Verdict.REGRESSION else one.verdict.value
    return f"| {word} | {one.field.value} | {markdown(said.told(one))} | {old} | {new} |"


def markdown(text: str) -> str:
    """Text as Markdown in one line that shows it as it is, save that what stands between backticks is shown as code."""
    parts = printable(text).split("`")
    if len(parts) % 2 == 0:
        parts[-2:] = [f"{parts[-2]}`{parts[-1]}"]
    escaped = [_SPECIAL.sub(lambda found: f"&#{ord(found[0])};", part) for part in parts]
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(escaped))
