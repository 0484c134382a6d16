"""What `check` says of real changes of exported models: the page docs/results/check.md.

`python -m burnish.tools.research.check_cases [WORD...]` writes the page, or prints the cases whose titles hold a word.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from burnish.frontends import onnx_file
from burnish.tools.check import said
from burnish.tools.check.check import check
from burnish.tools.check.difference import Difference, Field, Report
from burnish.tools.check.take import Request, take
from burnish.tools.research import check_zoo
from burnish.tools.research.check_changes import Case, cases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "check.md"
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


def outputs(report: Report) -> str:
    """What the report tells of the outputs, shortly."""
    found = [one for one in report.differences if one.field is Field.VALUES]
    if not found:
        return "–"
    moved = [re.search(r"moved by (about )?[0-9.e-]+", one.message) for one in found]
    return ", ".join(dict.fromkeys(one[0] for one in moved if one)) or "not comparable"


def row(title: str, report: Report, named: str) -> str:
    """A line of a table: the sentences of the regressions, the most important first."""
    found = [_told(each) for each in report.regressions] or [said.sentence(report)]
    shown = found[:_SHOWN] + ([f"… and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])
    sentences = "<br>".join(escaped(each) for each in shown)
    return f"| {title} | {len(report.regressions) or 'none'} | {sentences} | {outputs(report)} | {named} |"


def escaped(text: str) -> str:
    """A sentence as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


HEAD = "| case | regressions | what `check` says | outputs | named |\n| --- | --- | --- | --- | --- |"

INTRODUCTION = """# What `check` says of real changes

Made by `python -m burnish.tools.research.check_cases`. Each model is exported before and after a change, the first is
locked with made samples, and the second is checked. The table shows the sentences of the regressions as `check run`
prints them, at most {shown} of them; notes (what follows from a regression) are left out. *Named* says whether the
first sentence names what was changed and where; *outputs* how far the outputs moved on the samples, as far as the
report tells of it. The networks are those of `check_models.py` with random weights: a BERT-like text encoder of four
layers, a vision transformer of three, and the ResNet of `burnish demo`.

"""


def page(folder: Path) -> Iterator[str]:
    """The page, part by part."""
    yield INTRODUCTION.format(shown=_SHOWN)
    for part, listed in cases().items():
        yield f"## {part}\n\n{HEAD}\n"
        for case in listed:
            result = run(case, folder)
            yield row(case.title, result.report, "yes" if result.right else "**no**") + "\n"
        yield "\n"
    yield from _respellings()
    yield from _slimmed(folder)
    yield from _timings(folder)


def _respellings() -> Iterator[str]:
    found = list(check_zoo.respellings())
    count, told = sum(one[1] for one in found), sum(one[2] for one in found)
    yield (
        "## Other names, another order\n\nEvery inner name was replaced, and nodes, initializers and functions were "
        "put into another valid order at random; in every second file the operands of commutative operators were "
        f"exchanged, too. {count} such files of {len(found)} models: **{told} differences of any kind**.\n\n"
        "| model | respelled | differences |\n| --- | --- | --- |\n"
    )
    for name, times, differences in found:
        yield f"| {name} | {times} | {differences} |\n"
    yield "\n"


def _slimmed(folder: Path) -> Iterator[str]:
    yield (
        "## Trained models, rewritten by onnxslim\n\nThe last column has what the report says of the outputs when the "
        f"old model is at hand.\n\n{HEAD.replace('named', 'with `--old`')}\n"
    )
    for name in check_zoo.TRAINED:
        plain, with_old = check_zoo.slimmed(name, folder)
        yield row(name, plain, "" if with_old is None else escaped(_values(with_old))) + "\n"
    yield "\n"


def _values(report: Report) -> str:
    return "; ".join(one.message for one in report.differences if one.field is Field.VALUES) or "–"


def _timings(folder: Path) -> Iterator[str]:
    yield (
        "## Time\n\n`check run` (reading the model and its lock, comparing) against loading the model into ONNX "
        "Runtime and running the same samples, in one process, in turns, with one thread; medians of five.\n\n"
        "| model | samples | `check run` | ONNX Runtime alone | ratio |\n| --- | --- | --- | --- | --- |\n"
    )
    for name in ("a2-minilm", "a6-ppocr-cls"):
        for what, count, ours, plain in check_zoo.timings(name, folder):
            yield f"| {name} | {count} {what} | {ours:.2f} s | {plain:.2f} s | {ours / plain:.2f} |\n"


def main(arguments: list[str]) -> int:
    """Print or write; 1 when something was not named."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments:
            PAGE.write_text("".join(page(Path(folder))).rstrip() + "\n")
            return 0
        wrong = 0
        for case in (one for listed in cases().values() for one in listed):
            if any(word in case.title for word in arguments):
                result = run(case, Path(folder))
                wrong += not result.right
                print(f"{'ok ' if result.right else 'BAD'} {case.title}")
                for line in said.lines(result.report):
                    print(f"      {line}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
