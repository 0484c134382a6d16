"""What `check` says of real changes of exported models: the page docs/results/check.md.

`python -m burnish.tools.research.check_cases [WORD...]` writes the page, or prints the cases whose titles hold a word.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from burnish.frontends import onnx_file
from burnish.tools.check import said
from burnish.tools.check.check import check
from burnish.tools.check.difference import Difference, Report
from burnish.tools.check.take import Request, take
from burnish.tools.research.check_changes import Case, cases

_SHOWN = 4


@dataclass(frozen=True)
class Result:
    """A case and what was said of it; `right` when what had to be said was said."""

    case: Case
    report: Report
    right: bool


def run(case: Case, folder: Path) -> Result:
    """Export both models, lock one, check the other."""
    old, new = folder / "old.onnx", folder / "new.onnx"
    case.old(old)
    case.new(new)
    before = onnx_file.read(old)
    lock = take(before, Request())
    report = check(
        onnx_file.read(new),
        lock,
        Request(),
        case.tolerances,
        before if case.with_old else None,
        "model.onnx",
        "model.lock.yaml",
    )
    return Result(case, report, right(case, report))


def right(case: Case, report: Report) -> bool:
    """Whether the report says what has to be said, and says nothing of a model that is the same."""
    if not case.says:
        return report.passed
    first = report.regressions[0] if report.regressions else None
    return first is not None and all(word in _told(first) for word in case.says)


def _told(one: Difference) -> str:
    return f"{said.told(one)} {said.arrow(one)}".rstrip()


def rows(results: Iterable[Result]) -> Iterator[str]:
    """The lines of a table of cases."""
    yield "| case | regressions | what `check` says | named |"
    yield "| --- | --- | --- | --- |"
    for one in results:
        found = [_told(each) for each in one.report.regressions] or [said.sentence(one.report)]
        shown = found[:_SHOWN] + ([f"… {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])
        sentences = "<br>".join(each.replace("|", "\\|").replace("\n", " ") for each in shown)
        count = len(one.report.regressions)
        yield f"| {one.case.title} | {count or 'none'} | {sentences} | {'yes' if one.right else '**no**'} |"


def main(arguments: list[str]) -> int:
    """Print or write; 1 when something was not named."""
    import torch

    torch.set_num_threads(1)
    wrong = 0
    parts: dict[str, list[Result]] = {}
    for part, listed in cases().items():
        for case in listed:
            if arguments and not any(word in case.title for word in arguments):
                continue
            with tempfile.TemporaryDirectory() as folder:
                result = run(case, Path(folder))
            wrong += not result.right
            parts.setdefault(part, []).append(result)
            print(f"{'ok ' if result.right else 'BAD'} {case.title}")
            for line in said.lines(result.report):
                print(f"      {line}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
