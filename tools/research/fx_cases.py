"""The onnx package's own backend tests in torch: running one, and judging what comes out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.tools.research import node_tests
from burnish.tools.research.node_tests import Case

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
FINE = 1e-6
"""Nearly all cases are this near, relative to the largest number of an output."""
RIGHT, OTHER, WRONG, FAILS, REFUSED, MISSING = "right", "as ONNX Runtime", "wrong", "fails", "refused", "not mapped"


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        word: one of the words above.
        reason: why it is not right.
        error: of a right case, the largest error of its float32 and float64 outputs relative to the largest number of
            each, against what is expected or ONNX Runtime, whichever is nearer.
        apart: whether what is expected and what ONNX Runtime computes differ.
    """

    word: str
    reason: str = ""
    error: float = 0.0
    apart: bool = False


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


def distance(found: Any, expected: Any) -> float:
    """The largest error of float32 and float64 tensors relative to the largest number of each."""
    if isinstance(expected, list):
        return max((distance(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    if not isinstance(found, np.ndarray) or found.dtype not in (np.float32, np.float64):
        return 0.0
    left, right = found.astype(np.float64), _plain(expected).astype(np.float64)
    finite = np.isfinite(left) & np.isfinite(right)
    largest = float(np.abs(right[finite]).max(initial=0.0))
    return float(np.abs(left - right)[finite].max(initial=0.0)) / largest if largest else 0.0


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
    if not text and random:
        return Verdict(RIGHT)
    if not text:
        apart = other is not None and any(differs(a, b, wide=True) for a, b in zip(other, expected, strict=True))
        against = (expected, other if other is not None and not apart else expected)
        return Verdict(RIGHT, error=min(distance(found, one) for one in against), apart=apart)
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


def excuse(name: str, verdict: Verdict) -> tuple[str, str | None]:
    """The operator because of which a case of operator `name` is not right, and why; None when nothing excuses it."""
    if verdict.word not in (REFUSED, MISSING):
        return name, None
    named = re.findall(r"[:;] ([\w.:]+) at ", verdict.reason)
    culprit = named[0].replace("::::", "::") if named else name
    return culprit, "an attribute of opsets before 7" if OLD in verdict.reason else REASONS.get(culprit)
