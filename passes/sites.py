"""Where a model is observed: values, the rows of them that count, and groups of values that fit in memory together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, match, weights
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference, Shape
from burnish.ir.samples import Sample
from burnish.ir.walk import is_op

LIMIT = 1 << 30
"""Bytes of observed values that are in memory at the same time, unless the caller says otherwise."""

_ROW_BY_ROW = (
    *("Add", "Sub", "Mul", "Div", "Relu", "Gelu", "Erf", "Sigmoid", "Tanh", "Cast", "Identity", "Dropout", "Pow"),
    *(
        "Clip",
        "Gemm",
        "MatMul",
        "Sqrt",
        "LayerNormalization",
        "RMSNormalization",
        "Softmax",
        "HardSigmoid",
        "HardSwish",
    ),
)
"""Operators that leave the rows of a matrix in their order when they leave their number."""


@dataclass(frozen=True)
class Keep:
    """The rows of a value that count: those where a mask among the model's inputs lets a position through.

    Attributes:
        input: the name of the mask.
        axes: the axes of the value that the mask's axes are; one axis for several when the value has them merged.
        used: the axes of the mask that count, all of them when None; the others have size 1.
        kept: the number in the mask that lets a position through.
        additive: the mask is added to scores: 0 lets through, a large negative number does not.
        tail: the mask begins with the positions of a past, and the value has only those after it.
    """

    input: str
    axes: tuple[int, ...]
    used: tuple[int, ...] | None = None
    kept: int = 1
    additive: bool = False
    tail: bool = False

    def of(self, feeds: Mapping[str, np.ndarray], array: np.ndarray) -> np.ndarray:
        """Booleans that broadcast to `array`, True for what counts.

        Raises:
            InputError: there is no such input, or its sizes are not those of the array's axes.
        """
        if self.input not in feeds:
            raise InputError(f"the sample has no mask `{self.input}`")
        mask = feeds[self.input]
        shown, merged = list(mask.shape), len(self.axes) == 1
        used = range(mask.ndim) if self.used is None else self.used
        own = [array.shape[axis] if axis < array.ndim else -1 for axis in self.axes]
        if self.tail and own and mask.ndim:
            length = own[-1] // max(mask.size // max(mask.shape[-1], 1), 1) if merged and len(used) > 1 else own[-1]
            mask = mask[..., max(mask.shape[-1] - length, 0) :]
        sizes = [mask.shape[axis] for axis in used]
        flat = [int(np.prod(sizes))] if merged else sizes
        if int(np.prod(sizes)) != mask.size or own != flat:
            raise InputError(
                f"the mask `{self.input}` has the shape {shown}, which does not fit the axes "
                f"{list(self.axes)} of a value {list(array.shape)}"
            )
        shape = [1] * array.ndim
        for axis, size in zip(self.axes, flat, strict=True):
            shape[axis] = size
        kept = mask > -1 if self.additive else mask == self.kept
        return np.asarray(kept).reshape(shape)


@dataclass(frozen=True)
class Site:
    """A value of the model, and which of its rows count (all of them when `keep` is None)."""

    value: oir.Value
    keep: Keep | None = None


def refusal(model: oir.Model, value: oir.Value) -> str | None:
    """Why a value cannot be observed, in plain words; None when it can."""
    owner = value.graph if value.producer() is None else value.producer().graph  # type: ignore[union-attr]
    if isinstance(owner, oir.Function) or any(owner is function.graph for function in model.functions.values()):
        return "it is inside a function of the model: run the pass `inline-functions` first"
    if owner is not model.graph:
        return "it is inside a sub-graph (a branch of If, a body of Loop or Scan), which may run never or many times"
    if not isinstance(value.type, oir.TensorType | None):
        return "it is no tensor"
    if value.dtype == oir.DataType.STRING:
        return "it holds strings"
    return None if value.name else "it has no name"


def aligned(
    value: oir.Value,
    axis: int | None,
    mask: oir.Value,
    facts: Inference,
    *,
    kept: int = 1,
    additive: bool = False,
    tail: oir.Value | None = None,
) -> Keep | str | None:
    """How the axes of a mask lie in a value, as far as the proven shapes of both tell.

    Args:
        value: the value to observe.
        axis: the axis of its features, which is none of the mask's.
        mask: an input of the model.
        facts: of the model.
        kept: see `Keep`.
        additive: see `Keep`.
        tail: an input whose positions are the last of the mask's, where the mask covers a past before them.

    Returns:
        The rows that count; None when the value has no positions any more, so that all of it counts; else the reason
        why it cannot be told.
    """
    shape, sizes = facts.shape(value), facts.shape(mask)
    if shape is None or sizes is None:
        return f"the rank of `{value.name if shape is None else mask.name}` is not known"
    own = None if axis is None else axis % len(shape) if -len(shape) <= axis < len(shape) else None
    free = [index for index in range(len(shape)) if index != own]
    used = tuple(index for index, size in enumerate(sizes) if size != 1)
    wanted = [sizes[index] for index in used]
    found = _places(value, shape, free, wanted, facts)
    after = False
    after_past = facts.shape(tail)
    if not found and after_past is not None and after_past[:-1] == sizes[:-1] and used and used[-1] == len(sizes) - 1:
        found = _places(value, shape, free, [*wanted[:-1], after_past[-1]], facts)
        after = True
    if len(found) == 1:
        return Keep(str(mask.name), found[0], used, kept, additive, after)
    named = f"`{mask.name}` {_shown(sizes)} and `{value.name}` {_shown(shape)}"
    if found:
        return f"the axes of {named} can be matched in {len(found)} ways"
    positions = _symbols(wanted[-1:])
    if positions and _symbols(shape) <= _symbols(wanted[:-1]) - positions and all(dims.is_named(d) for d in shape):
        return None
    return f"the axes of {named} do not match"


def _places(
    value: oir.Value, shape: Shape, free: list[int], wanted: list[dims.Dim], facts: Inference
) -> list[tuple[int, ...]]:
    """The axes of `value` among `free` that may have the sizes `wanted`, in order, or all of them merged."""
    found = [axes for axes in combinations(free, len(wanted)) if [shape[index] for index in axes] == wanted]
    if found or len(wanted) < 2:
        return found
    merged = [index for index in free if shape[index] == dims.product(wanted)]
    return [(0,)] if merged == [0] and _merged_in_order(value, wanted, facts) else []


def _symbols(sizes: Iterable[dims.Dim]) -> set[str]:
    """The symbols of the inputs that sizes are made of, those inside `floor(...)` and the like included."""
    text = " ".join(atom for size in sizes if isinstance(size, dims.Expr) for atoms, _ in size.terms for atom in atoms)
    return set(re.findall(r"[^\s()*+,/|-]+", text))


def _merged_in_order(value: oir.Value, wanted: list[dims.Dim], facts: Inference) -> bool:
    """Whether the first axis of `value` is known to be the axes `wanted` merged, the last of them running fastest."""
    rows = dims.product(wanted)
    for _ in range(64):
        node = value.producer()
        if node is None:
            return False
        before = facts.shape(node.inputs[0])
        if is_op(node, "Reshape", "Flatten") and before is not None and list(before[: len(wanted)]) == wanted:
            return True
        if not is_op(node, "Reshape", "Flatten", *_ROW_BY_ROW) or match.attribute(node, "transA", 0):
            return False
        sources = [one for one in node.inputs if one is not None and (facts.shape(one) or (None,))[0] == rows]
        if not sources:
            return False
        value = sources[0]
    return False


def _shown(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def groups(
    model: oir.Model, values: Iterable[oir.Value], samples: Iterable[Sample], limit: int = LIMIT
) -> list[list[oir.Value]]:
    """Values in groups, each of which fits into `limit` bytes on every sample, with room for a copy of the largest.

    The values of a group follow each other in the graph. A value whose size cannot be told before it is computed is in
    a group of its own.

    Args:
        model: the model; the declared shapes of its inputs are exchanged meanwhile.
        values: values that nodes compute, each once.
        samples: all samples; only their shapes are read.
        limit: bytes.

    Raises:
        InputError: a value alone is larger.
    """
    order = {out: index for index, node in enumerate(model.graph) for out in node.outputs}
    wanted = sorted(values, key=order.__getitem__)
    sizes = _largest(model, wanted, samples)
    found: list[list[oir.Value]] = []
    held = largest = 0
    alone = True
    for value in wanted:
        size = sizes[value]
        if size is not None and 2 * size > limit:
            raise InputError(
                f"it takes {size:,} bytes on the largest sample, and as many for a copy: more than {limit:,}",
                place=f"value `{value.name}`",
                hint="give smaller samples, or a higher limit",
            )
        if alone or size is None or held + size + max(largest, size) > limit:
            found.append([])
            held = largest = 0
        found[-1].append(value)
        alone = size is None
        held, largest = held + (size or 0), max(largest, size or 0)
    return found


def _largest(model: oir.Model, values: Iterable[oir.Value], samples: Iterable[Sample]) -> dict[oir.Value, int | None]:
    """The bytes of each value on the sample on which it is largest; None where the shapes of the inputs do not tell."""
    sizes: dict[oir.Value, int | None] = dict.fromkeys(values, 0)
    for shapes in _largest_shapes(samples):
        with _shaped(model, shapes):
            facts = Inference(model)
        for value, before in sizes.items():
            size = _bytes(facts, value)
            sizes[value] = None if before is None or size is None else max(before, size)
    return sizes


def _bytes(facts: Inference, value: oir.Value) -> int | None:
    shape, dtype = facts.shape(value), facts.dtype(value)
    if shape is None or dtype is None:
        return None
    count = dims.product(shape)
    return -(-count * dtype.bitwidth // 8) if isinstance(count, int) else None


def _largest_shapes(samples: Iterable[Sample]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the samples that no other sample exceeds in every size."""
    settings = {tuple((name, array.shape) for name, array in sorted(one.feeds.items())) for one in samples}
    kept: list[tuple[tuple[str, tuple[int, ...]], ...]] = []
    for setting in sorted(settings, key=lambda s: -sum(np.prod(shape) for _, shape in s)):
        if not any(_within(setting, other) for other in kept):
            kept.append(setting)
    return [dict(setting) for setting in kept]


def _within(setting: tuple[tuple[str, tuple[int, ...]], ...], other: tuple[tuple[str, tuple[int, ...]], ...]) -> bool:
    flat = [(name, len(shape)) for name, shape in setting] == [(name, len(shape)) for name, shape in other]
    pairs = zip(setting, other, strict=False)
    return flat and all(a <= b for (_, one), (_, two) in pairs for a, b in zip(one, two, strict=True))


@contextmanager
def _shaped(model: oir.Model, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """The model with inputs declared to have `shapes`."""
    declared = [(value, value.shape) for value in model.graph.inputs]
    try:
        for value, _ in declared:
            if value.name in shapes:
                value.shape = oir.Shape(shapes[str(value.name)])
        yield
    finally:
        for value, shape in declared:
            value.shape = shape


def stored(value: oir.Value) -> np.ndarray | None:
    """The array of a value that is the same for every sample; None when it is computed or given."""
    tensor = value.const_value if value.is_initializer() and not value.is_graph_input() else weights.tensor_of(value)
    return None if tensor is None else tensor.numpy()
