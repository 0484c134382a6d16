"""Types, symbolic shapes and the contents of small integer tensors, from what a model computes.

Nothing here believes a declared shape other than those of the graph's inputs, which are the contract with the caller:
what is inferred holds even where an exporter wrote a wrong shape. Weights are never read.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, match, weights
from burnish.ir.dims import Dim
from burnish.ir.walk import STANDARD_DOMAINS, bodies

Shape = tuple[Dim, ...]

LARGEST = 64
"""Elements of the largest tensor whose content is followed."""

_INTEGERS = (oir.DataType.INT64, oir.DataType.INT32, oir.DataType.BOOL)


class Inference:
    """What is proven of the values of a model.

    Attributes:
        opset: the version of the standard operators.
    """

    def __init__(self, model: oir.Model) -> None:
        self.model = model
        self.opset = model.opset_imports.get("", 1)
        self._shapes: dict[oir.Value, Shape | None] = {}
        self._dtypes: dict[oir.Value, oir.DataType | None] = {}
        self._contents: dict[oir.Value, np.ndarray | None] = {}
        for value in model.graph.inputs:
            self._declare(value)
        self._graph(model.graph)

    def shape(self, value: oir.Value | None) -> Shape | None:
        """The proven shape; None when even the rank is unknown."""
        if value is None:
            return None
        if value not in self._shapes:
            tensor = weights.tensor_of(value)
            found = tensor.shape if tensor is not None else value.shape if value.is_initializer() else None
            self._shapes[value] = tuple(d for d in found if isinstance(d, int)) if found is not None else None
        return self._shapes[value]

    def dtype(self, value: oir.Value | None) -> oir.DataType | None:
        """The element type."""
        if value is None:
            return None
        found = self._dtypes.get(value)
        if found is None:
            tensor = value.const_value
            found = tensor.dtype if tensor is not None else match.tensor_dtype(value)
        return found

    def content(self, value: oir.Value | None) -> np.ndarray | None:
        """The elements of a small integer or boolean tensor: an object array of sizes and bools, None where unknown."""
        if value is None:
            return None
        if value not in self._contents:
            found = None
            tensor = weights.tensor_of(value)
            if tensor is not None and tensor.dtype in _INTEGERS and tensor.size <= LARGEST:
                array = tensor.numpy()
                found = array.astype(object)
            self._contents[value] = found
        return self._contents[value]

    def integers(self, value: oir.Value | None) -> list[Dim] | None:
        """The content of a vector or scalar as a list; None when any element is unknown."""
        found = self.content(value)
        if found is None or found.ndim > 1:
            return None
        elements = found.reshape(-1).tolist()
        return None if any(element is None for element in elements) else elements

    def numbers(self, value: oir.Value | None) -> list[int] | None:
        """`integers` when all of them are plain numbers."""
        found = self.integers(value)
        return found if found is not None and all(isinstance(x, int) for x in found) else None  # type: ignore[return-value]

    def unknown(self, value: oir.Value, axis: int) -> Dim:
        """A fresh symbol for the size of an axis that depends on data."""
        return dims.symbol(f"{dims.UNKNOWN}{value.name}.{axis}")

    def _declare(self, value: oir.Value) -> None:
        self._dtypes[value] = match.tensor_dtype(value)
        if value.shape is None:
            self._shapes[value] = None
            return
        sizes: list[Dim] = []
        for axis, size in enumerate(value.shape):
            sizes.append(size if isinstance(size, int) and is_told(size) else self.unknown(value, axis))
            if isinstance(size, oir.SymbolicDim) and is_told(size):
                sizes[-1] = dims.symbol(str(size.value))
        self._shapes[value] = tuple(sizes)

    def _graph(self, graph: oir.Graph) -> None:
        for node in graph:
            self._node(node)

    def _node(self, node: oir.Node) -> None:
        from burnish.ir import content_rules, contrib_shape_rules, shape_rules

        if node.domain not in STANDARD_DOMAINS:
            contrib_shape_rules.infer(self, node)
            return
        if node.op_type in ("If", "Loop", "Scan"):
            self._nested(node)
            return
        shape_rules.infer(self, node)
        out = node.outputs[0]
        if node.op_type == "Split" and self.content(node.inputs[0]) is not None:
            for part, content in zip(node.outputs, content_rules.split(self, node), strict=False):
                self._contents[part] = content
            return
        rule = content_rules.RULES.get(node.op_type)
        if rule is None or self._dtypes.get(out) not in _INTEGERS:
            return
        size = dims.product(self._shapes.get(out) or ())
        if self._shapes.get(out) is not None and isinstance(size, int) and size <= LARGEST:
            self._contents[out] = content_rules.checked(rule(self, node), self._dtypes[out])

    def follow(self, node: oir.Node) -> None:
        """Infer a node that was added to the graph since, and declare on its outputs what is found."""
        self._node(node)
        for out in node.outputs:
            dtype, shape = self.dtype(out), self.shape(out)
            if dtype is not None:
                out.type = oir.TensorType(dtype)
            if shape is not None:
                sizes = [
                    size if isinstance(size, int) else str(size) if dims.is_named(size) else None for size in shape
                ]
                out.shape = oir.Shape(sizes)

    def set(self, value: oir.Value, dtype: oir.DataType | None, shape: Iterable[Dim] | None) -> None:
        """Record what was found of one value."""
        self._dtypes[value] = dtype
        self._shapes[value] = tuple(shape) if shape is not None else None

    def learn(self, value: oir.Value, elements: list[Dim]) -> None:
        """Record the elements of a new vector or scalar of integers."""
        content = np.empty(len(elements), object)
        content[:] = elements
        shape = self._shapes.get(value)
        self._contents[value] = content.reshape(()) if shape == () else content

    def _nested(self, node: oir.Node) -> None:
        nested = bodies(node)
        for body in nested:
            for value in body.inputs:
                self._dtypes[value] = match.tensor_dtype(value)
                self._shapes[value] = None
            if node.op_type == "Loop":
                for value in body.inputs[:2]:
                    self._shapes[value] = ()
            self._graph(body)
        for index, out in enumerate(node.outputs):
            if node.op_type != "If":
                self.set(out, match.tensor_dtype(out), None)
                continue
            ends = [body.outputs[index] for body in nested]
            shapes = [self.shape(end) for end in ends]
            self.set(out, self.dtype(ends[0]) or match.tensor_dtype(out), self._merged(out, shapes))

    def _merged(self, out: oir.Value, shapes: list[Shape | None]) -> Shape | None:
        first, second = shapes
        if first is None or second is None or len(first) != len(second):
            return None
        return tuple(a if a == b else self.unknown(out, i) for i, (a, b) in enumerate(zip(first, second, strict=True)))


def is_told(size: int | oir.SymbolicDim) -> bool:
    """Whether a declared size says something: Paddle writes -1 and `?`, of which two are not the same size."""
    if isinstance(size, int):
        return size >= 0
    return size.value is not None and not size.value.startswith(dims.UNKNOWN)


def reshape_target(source: Shape | None, result: Shape | None) -> list[int] | None:
    """The target of a Reshape from `source` to `result`: numbers, `0` for kept sizes, one `-1`; None if impossible.

    `-1` cannot be worked out where another size is zero, as that of an empty cache is, so kept sizes other than the
    first, which is the batch by all exporters' convention, exclude it.
    """
    if source is None or result is None or 0 in result:
        return None
    kept = [i < len(source) and source[i] == size for i, size in enumerate(result)]
    target = [size if isinstance(size, int) else 0 if kept[i] else -1 for i, size in enumerate(result)]
    return None if target.count(-1) > 1 or (-1 in target and 0 in target[1:]) else target
