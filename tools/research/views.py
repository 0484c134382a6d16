"""The views held against the source of the models: every family of the zoo, as every exporter writes it.

`python -m burnish.tools.research.views` reads the packed graphs of `structures`, compares what each view finds with
`zoo_truth`, and the values there with those in the torch modules, and writes `docs/results/views.md`; the values need
what the zoo is built with. With names or parts of names it prints the cells of those files only;
`--raw` reads the files as they are instead of their normal form.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx_ir as oir

from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline
from burnish.tools.research import structures, views_values, zoo, zoo_families, zoo_truth
from burnish.tools.research.views_check import CHECKS, REFUSED, RIGHT, WRONG, Cell, check, see

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "views.md"
Cells = Mapping[str, Cell]


def cells(name: str, raw: bool = False) -> Cells:
    """What each view says of a packed file, in its normal form or as it is; all is wrong where one of them breaks."""
    model = oir.from_proto(structures.load(name))
    if not raw:
        model = Pipeline(recipes.NORMAL_FORM).rewrite(model).model
    try:
        return check(see(model), zoo_truth.of(name))
    except Exception as error:
        return dict.fromkeys(CHECKS, Cell(WRONG, f"{type(error).__name__}: {error}"))


def page(normal: Mapping[str, Cells], raw: Mapping[str, Cells], values: str) -> str:
    """The results as a page."""
    parts = [_PREFACE, _counts(normal, raw), _LEGEND]
    for view in CHECKS:
        parts.append(f"## {view.capitalize()}\n\n{_table(view, normal)}\n")
    parts.append(f"## The trained models\n\n{_real(normal)}\n")
    parts.append("## What is refused, and why\n\n" + "\n".join(_refusals(normal)))
    parts.append("## The files as they are\n\n" + _RAW + "\n\n" + "\n".join(_refusals(raw)))
    parts.append(f"## Values\n\n{_VALUES}\n\n{values}\n")
    parts.append(_FAILS + "\n\n" + "\n".join(f"- {name}: {why}" for name, why in zoo_families.FAILS.items()) + "\n")
    return "\n".join(parts)


_PREFACE = """# Views, checked

Made by `python -m burnish.tools.research.views`. The model families of the zoo with small random weights, each as
exported by torch (`ts` TorchScript, `eager` the same with attention spelt out, `dyn` dynamo unoptimized, `dynp` dynamo
with its optimizer, `op23` that with opset 23), then rewritten by `slim` onnxslim, `sim` onnxsim, `ort` ONNX Runtime's
transformer fusions (`onnxruntime.transformers.optimizer`), `fuse` onnxscript's fusions for ONNX Runtime
(`optimize_for_ort`), `int4` its MatMulNBits quantizer. `genai-*` and `tf-bert` are written by hand as the builder of
onnxruntime-genai and tf2onnx write them. What is true was read from the modules' source (`zoo_truth.py`): every number,
window, port and residual block.

A cell is **right** when all that there is was found as it is, **refused** when something was not found or is called
unknown, and **wrong** when anything was found that is not so.
"""

_LEGEND = """Below, `✓` is right, `·` right because there is nothing of the kind and nothing was found, a letter refused
for the reason given at the end, `✗` wrong. An empty cell is a file that does not exist.
"""

_RAW = """The tables above are of the models' normal form, in which `inspect --blocks` reads them. As the exporters
wrote them, views refuse more:"""

_VALUES = """What ONNX Runtime computes at the places that the views name, against what hooks see in the torch module
on the same inputs: the hidden state that each attention reads, the result of its output layer, and the stream behind
each residual block, relative to the largest value there; and the matrices of each attention, read head by head, against
the module's parameters. In the flavours `ts`, `dynp`, `op23`, `ts-ort` and `dynp-fuse`."""

_FAILS = "## Exports that do not work"


def _counts(normal: Mapping[str, Cells], raw: Mapping[str, Cells]) -> str:
    lines = [
        "| view | right | refused | wrong | raw: right | refused | wrong |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for view in CHECKS:
        counts = [
            Counter(found[view].verdict for found in results.values())[verdict]
            for results in (normal, raw)
            for verdict in (RIGHT, REFUSED, WRONG)
        ]
        lines.append(f"| {view} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def _reasons(results: Mapping[str, Cells]) -> dict[tuple[str, str], str]:
    """A letter for each view and reason, in the order of the tables."""
    found: dict[tuple[str, str], str] = {}
    for view in CHECKS:
        for one in results.values():
            if one[view].verdict == REFUSED:
                found.setdefault((view, one[view].reason), _letter(len(found)))
    return found


def _letter(number: int) -> str:
    return (chr(ord("a") + number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def _mark(view: str, cell: Cell, letters: Mapping[tuple[str, str], str]) -> str:
    if cell.verdict == REFUSED:
        return letters[view, cell.reason]
    return "✗" if cell.verdict == WRONG else "·" if cell.empty else "✓"


def _table(view: str, results: Mapping[str, Cells]) -> str:
    letters = _reasons(results)
    columns = sorted({flavour for _, flavour in zoo_families.FILES.values()}, key=_order)
    rows: dict[str, dict[str, str]] = {}
    for name, (family, flavour) in zoo_families.FILES.items():
        if name in results:
            rows.setdefault(family, {})[flavour] = _mark(view, results[name][view], letters)
    lines = [f"| family | {' | '.join(column.strip('-') or 'as written' for column in columns)} |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for family, marks in rows.items():
        lines.append(f"| {family} | {' | '.join(marks.get(column, '') for column in columns)} |")
    return "\n".join(lines)


def _order(flavour: str) -> tuple[int, int]:
    exporter, _, tool = flavour.partition("-")
    exporters, tools = ("eager", "ts", "dyn", "dynp", "op23", ""), ("", "slim", "sim", "ort", "fuse", "int4")
    return tools.index(tool), exporters.index(exporter)


def _real(results: Mapping[str, Cells]) -> str:
    letters = _reasons(results)
    lines = [f"| model | {' | '.join(CHECKS)} |", "| --- |" + " --- |" * len(CHECKS)]
    for name in zoo.REAL:
        if name in results:
            lines.append(f"| {name} | {' | '.join(_mark(view, results[name][view], letters) for view in CHECKS)} |")
    return "\n".join(lines)


def _refusals(results: Mapping[str, Cells]) -> Iterator[str]:
    for (view, reason), letter in _reasons(results).items():
        files = [name for name, found in results.items() if found[view] == Cell(REFUSED, reason)]
        yield f"- {letter}: {view}: {reason} ({', '.join(files)})"
    for name, found in results.items():
        for view, cell in found.items():
            if cell.verdict == WRONG:
                yield f"- **wrong**: {view}: {cell.reason} ({name})"
    yield ""


def main(arguments: Iterable[str]) -> int:
    """Print the cells of the files asked for, or write the page; 1 when anything is wrong."""
    wanted = [argument for argument in arguments if argument != "--raw"]
    results: dict[bool, dict[str, Cells]] = {False: {}, True: {}}
    for name in structures.names():
        if wanted and not any(part in name for part in wanted):
            continue
        for raw in ["--raw" in arguments] if wanted else [False, True]:
            results[raw][name] = found = cells(name, raw)
            for view, cell in found.items():
                if cell.verdict != RIGHT:
                    print(f"{name}{' (raw)' if raw else ''}: {view} {cell.verdict}: {cell.reason}", flush=True)
    if not wanted:
        PAGE.write_text(page(results[False], results[True], views_values.table()))
    return int(
        any(cell.verdict == WRONG for one in results.values() for found in one.values() for cell in found.values())
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
