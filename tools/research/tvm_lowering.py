"""The page on lowering to TVM: `python -m burnish.tools.research.tvm_lowering NODES... --models MODELS...`.

Writes `docs/results/tvm-lowering.md` from the lines of `tvm_nodes` and `tvm_models`; of several lines about one case or
model the last one counts. Without lines of `tvm_nodes` the cases stay as the page has them, and so do models that no
line is about.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "tvm-lowering.md"
Lines = dict[tuple[str, str], dict[str, Any]]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("nodes", type=Path, nargs="*")
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    given = parser.parse_args()
    models = _read(given.models, "model")
    PAGE.write_text(page(_read(given.nodes, "case"), models) if given.nodes else _with_models(PAGE.read_text(), models))


def _read(files: Iterable[Path], key: str) -> Lines:
    found: Lines = {}
    for file in files:
        for line in file.read_text().splitlines():
            one = json.loads(line)
            found[one[key], one["way"]] = one
    return found


def page(nodes: Lines, models: Lines) -> str:
    """The page, from lines by (case or model, way)."""
    versions = {name: metadata.version(name) for name in ("apache-tvm", "onnx", "onnxruntime")}
    return "\n".join([_PREFACE.format(**{k.replace("-", "_"): v for k, v in versions.items()}), *_cases(nodes),
                      "", *_models(models), ""])  # fmt: skip


def _cases(nodes: Lines) -> list[str]:
    both = {case for case, way in nodes if way == "lowering"} & {case for case, way in nodes if way == "importer"}
    rows = ["## Cases of the onnx package", "", "| way | cases | right | refused | wrong |", "| --- " * 5 + "|"]
    for way, name in (("lowering", "this lowering"), ("importer", "TVM's importer")):
        found = Counter(nodes[case, way]["result"] for case in both)
        rows.append(f"| {name} | {len(both)} | {found['right']} | {found['refused']} | {found['wrong']} |")
    mapped = [case for case in both if "not in the table" not in nodes[case, "lowering"]["why"]]
    right = sum(nodes[case, "lowering"]["result"] == "right" for case in mapped)
    rows += ["", f"Of the {len(mapped)} cases whose operators are all in the table, {right} are right; the others are"]
    rows += ["refused for what they ask of an operator, or wrong as listed."]
    for way, name in (("lowering", "This lowering"), ("importer", "TVM's importer")):
        wrong = sorted(case for case in both if nodes[case, way]["result"] == "wrong")
        listed = [f"- `{case}`: {nodes[case, way]['why']}" for case in wrong] or ["- none"]
        rows += ["", f"### {name}: wrong, without a word", "", *listed]
    why = Counter(_short(nodes[case, "lowering"]["why"]) for case in both if nodes[case, "lowering"]["why"])
    rows += ["", "### Why this lowering refuses", "", "| reason | cases |", "| --- | --- |"]
    return rows + [f"| {reason} | {count} |" for reason, count in why.most_common(40)]


def _short(why: str) -> str:
    words = why.split("TVM is not given this node: ")[-1].split("TVM does not take this node: ")[-1]
    return " ".join(words.replace("|", "/").split())[:90]


def _models(models: Lines) -> list[str]:
    rows = ["## Whole models", "", "| model | this lowering | error | allowed | compiled in | TVM's importer |"]
    return [*rows, "| --- " * 6 + "|", *_rows(models, {}).values(), "", _NOTES]


def _rows(models: Lines, known: dict[str, list[str]]) -> dict[str, str]:
    """A row for each model, by its name; what was not measured is as in the cells that are known."""
    rows = {}
    for name in dict.fromkeys([*known, *(model for model, _ in models)]):
        ours, theirs = models.get((name, "lowering")), models.get((name, "importer"))
        cells = known.get(name, ["not run", "", "", "", "not run"])
        first = [_told(ours), *_numbers(ours)] if ours is not None else cells[:4]
        rows[name] = f"| {name} | {' | '.join([*first, _told(theirs) if theirs is not None else cells[4]])} |"
    return rows


def _with_models(text: str, models: Lines) -> str:
    """The page with new rows for some models."""
    above, _, below = text.partition("## Whole models\n\n")
    lines = below.splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]
    rows = _rows(models, {name: rest for name, *rest in cells})
    return "\n".join([f"{above}## Whole models\n", *lines[:2], *rows.values(), "", _NOTES, ""])


_NOTES = """a4-silero-op18-ifless gives a probability near 1e-4. There ONNX Runtime's result is 1.7e-8 from that of the
onnx package's own evaluator and the compiled one 9e-11: the difference is ONNX Runtime's, and small.

a6-ppocr-det differs on an input of large random values that amplifies rounding: from the model in float64, ONNX Runtime
is 1.0e-3 away without its optimizations and 5.5e-4 with them, torch in float32 1.2e-3. Plain loops add up one after the
other, which rounds more; that this is all of it was not shown."""


def _told(line: dict[str, Any] | None) -> str:
    if line is None:
        return "not run"
    why = _short(line["why"])
    return f"{line['result']}: {why}" if why else str(line["result"])


def _numbers(line: dict[str, Any] | None) -> list[str]:
    if line is None or "error" not in line:
        return ["", "", ""]
    return [f"{line['error']:.1e}", f"{line['allowed']:.1e}", f"{line['seconds']:.0f} s"]


_PREFACE = """# What compiles for TVM, and is right

Made by `python -m burnish.tools.research.tvm_lowering` from what `tvm_nodes` and `tvm_models` measured, with
apache-tvm {apache_tvm}, onnx {onnx} and ONNX Runtime {onnxruntime}, on `llvm`, one thread, kernels not tuned. Right
means: the dtypes and shapes of ONNX Runtime, and its values within 1e-4 of the largest magnitude (float64 1e-7,
float16 8e-3, bfloat16 6e-2, all else equal; whole models in halves 3e-2), or within four times what ONNX Runtime's
own optimizations change. Cases that ONNX Runtime does not run, or not as the onnx package expects, are left out.
Sizes and axes are made constants where a way needs them so; whole models keep their dynamic sizes under this
lowering, and the importer is given fixed sizes where it fails without. [How it works](../ideas/lowering-to-tvm.md).
"""


if __name__ == "__main__":
    main()
