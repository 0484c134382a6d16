"""The onnx package's own backend tests in torch: `python -m burnish.tools.research.fx_nodes`.

Writes `docs/results/fx-nodes.md`: what the torch bridge makes of every case, with the inputs fed and with the inputs as
constants of the model. `--only TEXT` takes the cases whose name contains it, prints, and writes nothing.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

from burnish.backends.ort import session
from burnish.ir.errors import InputError
from burnish.tools.research import node_tests
from burnish.tools.research.node_tests import Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "fx-nodes.md"
RTOL = 1e-3
"""What the onnx package itself allows, relative to each number."""
ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""And what is allowed relative to the largest number: a unit in the last place, 1e-6 of all other dtypes."""
RANDOM = frozenset({
    "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
})  # fmt: skip
"""Operators of whose outputs only dtypes and shapes are compared, where they draw numbers."""
REASONS = {
    "ai.onnx.ml::LabelEncoder": "torch has no strings",
    "ai.onnx.ml::TreeEnsemble": "trees are no tensor arithmetic",
    "ai.onnx.preview.training::Adagrad": "an optimizer's step; torch trains with its own",
    "ai.onnx.preview.training::Adam": "an optimizer's step; torch trains with its own",
    "ai.onnx.preview.training::Gradient": "torch computes gradients itself",
    "ai.onnx.preview.training::Momentum": "an optimizer's step; torch trains with its own",
    "ai.onnx.preview::FlexAttention": "a preview with nested graphs, which ONNX Runtime does not run either",
    "Equal": "torch has no strings; numbers are compared",
    "ImageDecoder": "torch decodes no files",
    "RegexFullMatch": "torch has no strings",
    "Scan": "Scan of opset 8, which had another form; it is known from opset 9 on",
    "StringConcat": "torch has no strings",
    "StringNormalizer": "torch has no strings",
    "StringSplit": "torch has no strings",
    "TfIdfVectorizer": "a search for n-grams, mostly of strings",
}
"""Why some cases of an operator are not computed."""
OLD = "'broadcast'"
"""What the reason names when a case is of an opset before 7, where Add, Mul, Gemm and others had this attribute."""
RIGHT, OTHER, WRONG, FAILS, REFUSED, MISSING = "right", "as ONNX Runtime", "wrong", "fails", "refused", "not mapped"


@dataclass(frozen=True)
class Verdict:
    """What became of a case: one of the words above, and why."""

    word: str
    reason: str = ""


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
    """

    group: str = "node"
    cases: int = 0
    run: int = 0
    run_right: int = 0
    fed: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    others: list[tuple[str, str, Verdict]] = field(default_factory=list)


def operator_of(case: Case) -> str:
    """The operator a case is about, with its domain where that is not the standard one."""
    node = case.model.graph.node[0]
    return f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)


def grouped(cases: Iterable[Case]) -> Iterator[tuple[str, Case]]:
    """Cases with their operators; what a case is expanded from decides for its expansions."""
    known: dict[str, str] = {}
    for case in cases:
        name = re.sub(r"_expanded.*", "", case.name)
        yield known.setdefault(name, operator_of(case)), case


def compute(case: Case) -> list[Any]:
    """The outputs in torch, as arrays, lists of arrays, or None.

    Raises:
        InputError: the bridge refuses the model.
    """
    import torch

    from burnish.backends.fx.builder import to_graph_module

    module = to_graph_module(oir.from_proto(case.model), fallback=False)
    held = {tensor.name for tensor in case.model.graph.initializer}
    fed = [value for value in case.model.graph.input if value.name not in held]
    arguments = [given(array) for array, _ in zip(case.inputs, fed, strict=False)]
    with torch.no_grad():
        return [_array(value) for value in module(*arguments)]


def given(array: Any) -> Any:
    """An input as the bridge takes it."""
    from burnish.backends.fx.bridge import to_torch

    if array is None:
        return None
    if isinstance(array, list):
        return tuple(given(one) for one in array)
    array = _plain(array)
    if array.dtype.kind in "OSU":
        return array
    made = to_torch(array, oir.DataType.from_numpy(array.dtype))
    if made is None:
        raise InputError(f"torch has no tensors of {array.dtype}")
    return made


def _plain(array: Any) -> np.ndarray:
    if isinstance(array, onnx.TensorProto):
        return np.asarray(onnx.numpy_helper.to_array(array))
    return np.asarray(array)


def _array(value: Any) -> Any:
    import torch

    from burnish.backends.fx.bridge import to_numpy

    if isinstance(value, tuple):
        return [_array(one) for one in value]
    return to_numpy(value) if isinstance(value, torch.Tensor) else value


def differs(found: Any, expected: Any, *, values: bool = True, wide: bool = False) -> str:
    """How an output differs from what is expected; nothing when it does not.

    Args:
        found: an array, a list of arrays, or None.
        expected: likewise.
        values: compare more than dtypes and shapes.
        wide: ignore the dtype, as `expected` comes in a wider one.
    """
    if expected is None or found is None:
        return "" if found is expected else "one is absent"
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return "other kinds or lengths"
        each = (differs(a, b, values=values, wide=wide) for a, b in zip(found, expected, strict=True))
        return next((text for text in each if text), "")
    left, right = _plain(found), _plain(expected)
    if left.shape != right.shape:
        return f"shape {list(left.shape)} instead of {list(right.shape)}"
    if right.dtype.kind in "OSU" or left.dtype.kind in "OSU":
        return "" if not values or [str(x) for x in left.flat] == [str(x) for x in right.flat] else "other strings"
    if not wide and left.dtype != _held(right.dtype):
        return f"dtype {left.dtype} instead of {right.dtype}"
    if not values:
        return ""
    dtype = left.dtype.name
    if right.dtype.kind == "c":
        left, right = (x.astype(np.complex128) for x in (left, right))
    elif right.dtype.kind in "iub" and right.dtype.itemsize <= 8 and left.dtype.kind in "iub":
        wrong = left.astype(object) != right.astype(object)
        return f"{int(wrong.sum())} of {wrong.size} integers" if wrong.any() else ""
    else:
        left, right = (x.astype(np.float64) for x in (left, right))
    with np.errstate(all="ignore"):
        largest = float(np.max(np.abs(right), initial=0.0, where=np.isfinite(right)))
        room = ROUNDING.get(dtype, 1e-6) * largest
        close = np.isclose(left, right, rtol=RTOL, atol=max(room, 1e-7), equal_nan=True)
    if close.all():
        return ""
    error = float(np.abs(left - right)[~close].max())
    return f"{int((~close).sum())} of {close.size} numbers, by up to {error:.3g}"


def _held(dtype: np.dtype) -> np.dtype:
    """The dtype in which the bridge holds arrays of `dtype`: numbers of fewer bits take eight."""
    from burnish.backends.fx.values import DTYPES, HELD

    code = oir.DataType.from_numpy(dtype)
    return next(oir.DataType(c) for c, kind in DTYPES.items() if kind == HELD[code]).numpy() if code in HELD else dtype


def judge(case: Case, other: Sequence[Any] | None) -> Verdict:
    """The verdict on one case, given what ONNX Runtime computes, None when it does not run the case."""
    random = any(node.op_type in RANDOM and _draws(node) for node in _nodes(case.model.graph))
    try:
        found = compute(case)
    except InputError as error:
        reasons = set(re.findall(r"\((.*?)\)(?:;|$)", error.cause)) or {error.cause}
        return Verdict(MISSING if reasons == {"it is not in the table"} else REFUSED, error.cause)
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        return Verdict(FAILS, f"{type(error).__name__}: {text}")
    expected = list(case.expected) or list(other or ())
    if len(found) != len(expected):
        return Verdict(WRONG, f"{len(found)} outputs instead of {len(expected)}")
    each = [differs(a, b, values=not random) for a, b in zip(found, expected, strict=True)]
    text = next((text for text in each if text), "")
    if not text:
        return Verdict(RIGHT)
    if other is not None and not any(differs(a, b, wide=True) for a, b in zip(found, other, strict=True)):
        return Verdict(OTHER, text)
    return Verdict(WRONG, text)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _draws(node: onnx.NodeProto) -> bool:
    return node.op_type != "Dropout" or len(node.input) > 2


def reference(case: Case) -> list[Any] | None:
    """What ONNX Runtime computes, None when it does not run the case."""
    try:
        return node_tests.run(case.model, case.inputs)
    except Exception:
        return None


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


def excuse(name: str, verdict: Verdict) -> tuple[str, str | None]:
    """The operator because of which a case of operator `name` is not right, and why; None when nothing excuses it."""
    if verdict.word not in (REFUSED, MISSING):
        return name, None
    named = re.findall(r"[:;] ([\w.:]+) at ", verdict.reason)
    culprit = named[0].replace("::::", "::") if named else name
    return culprit, "an attribute of opsets before 7" if OLD in verdict.reason else REASONS.get(culprit)


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
        preface, *_groups(rows), "", "## Not computed", "", "| operator | cases | why |", "| --- | --- | --- |",
        *(f"| {name} | {count} | {why} |" for (name, why), count in sorted(left.items())), "",
        "## By operator", "", _OPERATORS.format(agree=agree, differ=differ),
        "| operator | cases | ONNX Runtime runs | right | right as constants | gradients |", "| --- " * 6 + "|",
        *each, "",
    ])  # fmt: skip


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
