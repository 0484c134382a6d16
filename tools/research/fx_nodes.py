"""The onnx package's own backend tests in torch: `python -m burnish.tools.research.fx_nodes`.

Writes `docs/results/fx-nodes.md`: what the torch bridge makes of every case, with the inputs fed and with the inputs as
constants of the model. `--only TEXT` takes the cases whose name contains it, prints, and writes nothing.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from burnish.backends.ort import session
from burnish.tools.research import node_tests
from burnish.tools.research.fx_cases import (
    FAILS,
    FINE,
    MISSING,
    OTHER,
    REFUSED,
    RIGHT,
    WRONG,
    Verdict,
    excuse,
    grouped,
    judge,
    reference,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "fx-nodes.md"


@dataclass
class Row:
    """The verdicts on the cases of one operator.

    Attributes:
        group: which of the onnx package's groups they are in.
        cases: how many there are.
        run: how many of them ONNX Runtime runs.
        fed: verdicts with the inputs fed, counted; `run_right` those that ONNX Runtime runs and that are right.
        held: verdicts with the inputs as constants.
        others: (case, form, verdict) of all that are not right.
        rough: names and errors of right cases whose error is above `FINE`.
        apart: the cases that are right and in which ONNX Runtime is not.
    """

    group: str = "node"
    cases: int = 0
    run: int = 0
    run_right: int = 0
    fed: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    others: list[tuple[str, str, Verdict]] = field(default_factory=list)
    rough: list[tuple[str, float]] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)


def measure(only: str = "") -> dict[tuple[str, str], Row]:
    """The verdicts by group and operator, of the cases whose name contains `only`."""
    rows: dict[tuple[str, str], Row] = defaultdict(Row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, case in grouped(node_tests.cases()):
            if only not in case.name or case.group == "light":
                continue
            row, other = rows[case.group, name], reference(case)
            row.group = case.group
            row.cases += 1
            row.run += other is not None
            for form, count, one in (
                ("fed", row.fed, case), ("constant", row.held, node_tests.with_constants(case)),
            ):  # fmt: skip
                verdict = judge(one, other)
                count[verdict.word] += 1
                row.run_right += form == "fed" and verdict.word == RIGHT and other is not None
                if form == "fed" and verdict.error > FINE:
                    row.rough.append((case.name, verdict.error))
                if form == "fed" and verdict.apart:
                    row.apart.append(case.name)
                if verdict.word != RIGHT:
                    row.others.append((case.name, form + " (ORT)" * (other is not None), verdict))
    return dict(sorted(rows.items()))


def main() -> None:
    """Measure, print what is not right, and write the page when all cases were taken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains it")
    only = parser.parse_args().only
    rows = measure(only)
    for (_, name), row in rows.items():
        for case, form, verdict in row.others:
            print(name, case, form, verdict.word, verdict.reason, sep=" | ")
    print(*_groups(rows), sep="\n")
    if not only:
        PAGE.write_text(page(rows))


def _groups(rows: dict[tuple[str, str], Row]) -> list[str]:
    words = (RIGHT, REFUSED, MISSING, FAILS, OTHER, WRONG)
    lines = [
        f"| group | cases | ONNX Runtime runs | of these right | {' | '.join(words)} | right as constants |",
        "| --- " * (5 + len(words)) + "|",
    ]
    for group in dict.fromkeys(group for group, _ in rows):
        mine = [row for row in rows.values() if row.group == group]
        fed = sum((row.fed for row in mine), Counter())
        run, right = sum(row.run for row in mine), sum(row.run_right for row in mine)
        cells = [group, sum(row.cases for row in mine), run, f"{right} ({right / run:.1%})"]
        cells += [fed[word] for word in words] + [sum(row.held[RIGHT] for row in mine)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def page(rows: dict[tuple[str, str], Row]) -> str:
    """The page of results; the gradients are compared for it."""
    import torch

    from burnish.tools.research import fx_gradients

    slopes: dict[str, Counter[bool]] = defaultdict(Counter)
    for name, _, found in fx_gradients.measure():
        if found.error is not None:
            slopes[name][found.agrees] += 1
    agree, differ = (sum(one[word] for one in slopes.values()) for word in (True, False))
    left: dict[tuple[str, str], int] = Counter()
    for (_, name), row in rows.items():
        for _, form, verdict in row.others:
            if not form.startswith("constant"):
                culprit, why = excuse(name, verdict)
                left[culprit, why or f"**{verdict.word}**"] += 1
    each = [
        f"| {name} | {row.cases} | {row.run} | {row.fed[RIGHT]} | {row.held[RIGHT]} | {_agreeing(slopes[name])} |"
        for (group, name), row in rows.items() if group == "node"
    ]  # fmt: skip
    preface = _PREFACE.format(onnx=onnx.__version__, ort=session.runtime().__version__, torch=torch.__version__)
    return "\n".join([
        preface, *_groups(rows), "", *_notes(rows), "",
        "## Not computed", "", "| operator | cases | why |", "| --- | --- | --- |",
        *(f"| {name} | {count} | {why} |" for (name, why), count in sorted(left.items())), "",
        "## By operator", "", _OPERATORS.format(agree=agree, differ=differ),
        "| operator | cases | ONNX Runtime runs | right | right as constants | gradients |", "| --- " * 6 + "|",
        *each, "",
    ])  # fmt: skip


def _notes(rows: dict[tuple[str, str], Row]) -> list[str]:
    """How near the right cases are, and where ONNX Runtime is not right."""
    right = sum(row.fed[RIGHT] for row in rows.values())
    rough = [f"`{name}` ({error:.1g})" for row in rows.values() for name, error in row.rough]
    apart = [f"`{name}`" for row in rows.values() for name in row.apart]
    return [
        f"{right - len(rough)} of the {right} right cases are within {FINE:g} of the largest number of each float32 or",
        "float64 output, of what is expected or of what ONNX Runtime computes. The others, which ONNX Runtime does not",
        "run, and whose expected numbers have few digits:", "", *(f"- {one}" for one in rough), "",
        "Right are also these, in which ONNX Runtime computes something else than the standard expects:", "",
        *(f"- {one}" for one in apart),
    ]  # fmt: skip


def _agreeing(found: Counter[bool]) -> str:
    return f"{found[True]} of {found.total()}" if found else ""


_OPERATORS = """The cases of the group `node`. The last column says in how many cases of all groups the gradients agree
with finite differences, along a random direction of all float inputs, in float64: {agree} agree, {differ} do not. Where
nothing stands, no float output depends on a float input, the function has a kink there, or the dtype is fixed.
"""
_PREFACE = """# The onnx package's own tests in torch

Made by `python -m burnish.tools.research.fx_nodes`, with onnx {onnx}, ONNX Runtime {ort} and torch {torch} on CPU.
Every case that the onnx package ships with inputs and outputs becomes a torch.fx module (`to_graph_module` with
`fallback=False`: nothing is left to ONNX Runtime) and is run. Right: all outputs have the expected dtypes and shapes;
integers are equal; numbers are within 1e-3 of each number, as the onnx package demands, or within 1e-6 of the largest
(float16 and bfloat16: a unit in the last place of the largest). Of operators that draw random numbers dtypes and shapes
are compared. Integers and floats of two and four bits, which torch lacks, are held in eight. In the last column the
inputs are constants of the model, which the bridge treats otherwise: as parameters, buffers, or Python numbers.
"""


if __name__ == "__main__":
    main()
