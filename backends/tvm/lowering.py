"""An ONNX graph as a Relax function: weights as parameters behind the inputs, dynamic dimensions symbolic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir
from tvm import relax

from burnish.backends.tvm import operators, registry
from burnish.backends.tvm.maker import Maker, dtype_name, type_of
from burnish.backends.tvm.registry import Entry, Unsupported
from burnish.backends.tvm.sizes import Sizes
from burnish.ir import dims, match, weights
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.walk import bodies

MAIN = "main"
EMBEDDED = 64
"""Constants of at most this many elements are written into the function, larger ones are parameters."""


@dataclass(frozen=True)
class Lowered:
    """A graph in Relax.

    Attributes:
        module: with one function to be called: inputs, then weights, to a tuple of outputs.
        inputs, outputs: names in the order of the function's.
        weights: the values that are parameters, in order.
    """

    module: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[oir.Value, ...]


def lower(model: oir.Model, name: str = MAIN) -> Lowered:
    """The main graph of a model in Relax.

    Args:
        model: in the normal form, sorted, functions inlined.
        name: of the function.

    Raises:
        InputError: a node that TVM is not given, with the reason. Use `refusals` to know all of them before.
    """
    return _Lowering(model).run(name)


def refusal(node: oir.Node, facts: Inference, opsets: dict[str, int]) -> str | None:
    """Why a node is not given to TVM, as far as the table, its attributes and its sizes say; None when it may be."""
    try:
        _entry(node, facts, opsets)
    except Unsupported as reason:
        return str(reason)
    return None


def _entry(node: oir.Node, facts: Inference, opsets: dict[str, int]) -> Entry:
    assert operators
    opset = opsets.get(node.domain, opsets.get("" if node.domain == "ai.onnx" else "ai.onnx", 1))
    entry = registry.find(node.domain, node.op_type, opset)
    if entry is None:
        raise Unsupported(f"{match.describe(node).split(' ')[0]} of opset {opset} is not in the table")
    unknown = sorted(set(node.attributes) - entry.attributes)
    if unknown:
        raise Unsupported(f"the attribute `{unknown[0]}` is not understood")
    if any(one.is_ref() for one in node.attributes.values()) or bodies(node):
        raise Unsupported("it holds a graph, or attributes of a function around it")
    for index in entry.sizes:
        value = match.input_of(node, index)
        if value is not None and facts.integers(value) is None:
            raise Unsupported(f"its input {index} depends on data")
    return entry


class _Lowering:
    def __init__(self, model: oir.Model) -> None:
        self.model, self.facts = model, Inference(model)
        self.opsets = dict(model.opset_imports)
        self.builder = relax.BlockBuilder()
        self.sizes = Sizes()
        self.values: dict[oir.Value, Any] = {}

    def run(self, name: str) -> Lowered:
        graph = self.model.graph
        inputs = [value for value in graph.inputs if value.const_value is None]
        for value in inputs:
            self.values[value] = self._parameter(value, self._shape_of_input(value), value.dtype)
        large = list(dict.fromkeys(self._weights(graph)))
        for index, value in enumerate(large):
            tensor = weights.tensor_of(value)
            assert tensor is not None
            self.values[value] = self._parameter(value, list(tensor.shape.numpy()), tensor.dtype, f"w{index}")
        parameters = [self.values[value] for value in (*inputs, *large)]
        with self.builder.function(name, parameters, attrs={"num_input": len(inputs)}):
            with self.builder.dataflow():
                for node in graph:
                    self._node(node)
                results = [self.value(value) for value in graph.outputs]
                found = self.builder.emit_output(relax.Tuple(results))
            self.builder.emit_func_output(found)
        module = relax.transform.DeadCodeElimination()(self.builder.get())
        names = tuple(str(value.name) for value in inputs), tuple(str(value.name) for value in graph.outputs)
        return Lowered(module, *names, tuple(large))

    def value(self, value: oir.Value | None) -> Any:
        """The expression of a value: computed, a parameter, a constant, or sizes made into a tensor."""
        if value is None:
            return None
        if value not in self.values:
            self.values[value] = self._constant(value)
        return self.values[value]

    def _constant(self, value: oir.Value) -> Any:
        array = weights.constant(value)
        if array is not None:
            return relax.const(np.asarray(array, order="C"))
        sizes = self.facts.integers(value)
        shape = self.facts.shape(value)
        if sizes is None or shape is None:
            raise Unsupported(f"`{value.name}` is not computed")
        dtype = self.facts.dtype(value)
        assert dtype is not None
        if all(isinstance(size, int) for size in sizes):
            return relax.const(np.asarray(sizes, dtype.numpy()).reshape([int(str(d)) for d in shape]))
        node = value.producer()
        assert node is not None
        maker = Maker(self.builder, self.facts, self.sizes, node)
        vector = maker.sizes_as_tensor([self.sizes.of(size) for size in sizes], dtype.name.lower())
        return vector if len(shape) == 1 else self.builder.emit(relax.op.reshape(vector, []))

    def _node(self, node: oir.Node) -> None:
        if all(self._known(out) for out in node.outputs):
            return
        try:
            entry = _entry(node, self.facts, self.opsets)
            given = [self._given(node, index, entry) for index in range(len(node.inputs))]
            attributes = {name: match.attribute(node, name) for name in node.attributes}
            found = entry.function(Maker(self.builder, self.facts, self.sizes, node), *given, **attributes)
        except Unsupported as reason:
            raise InputError(f"TVM is not given this node: {reason}", place=match.describe(node)) from None
        for out, one in zip(node.outputs, found if entry.several else (found,), strict=False):
            if one is not None:
                self._keep(out, one)

    def _known(self, value: oir.Value) -> bool:
        """Whether a value is absent, or made of proven sizes of the inputs; these are written where they are read."""
        sizes = self.facts.integers(value)
        return not value.name or (sizes is not None and all(map(dims.is_named, sizes)))

    def _keep(self, value: oir.Value, expression: Any) -> None:
        """Bind a result; where TVM does not know its shape, what is proven of it is checked when the function runs."""
        bound = self.builder.emit(expression)
        proven, found = self.facts.shape(value), type_of(bound)
        if not isinstance(found.shape, relax.ShapeExpr) and proven is not None:
            shape = [self.sizes.fresh(size) for size in proven]
            bound = self.builder.match_cast(bound, relax.TensorType(shape, str(found.dtype)))
        elif proven is not None:
            for size, one in zip(proven, found.shape.values, strict=True):
                self.sizes.learn(size, one)
        self.values[value] = bound

    def _given(self, node: oir.Node, index: int, entry: Entry) -> Any:
        value = node.inputs[index]
        if value is None:
            return None
        if index not in entry.sizes:
            return self.value(value)
        return [self.sizes.of(size) for size in self.facts.integers(value) or ()]

    def _shape_of_input(self, value: oir.Value) -> list[Any]:
        shape = self.facts.shape(value)
        if shape is None or value.dtype is None:
            raise InputError("an input without dtype or rank cannot be compiled", place=f"input `{value.name}`")
        return [self.sizes.declare(size) for size in shape]

    def _parameter(self, value: oir.Value, shape: list[Any], dtype: oir.DataType | None, name: str = "") -> Any:
        assert dtype is not None
        return relax.Var(name or _identifier(str(value.name)), relax.TensorType(shape, dtype_name(dtype)))

    def _weights(self, graph: oir.Graph) -> Iterable[oir.Value]:
        for node in graph:
            if all(self._known(out) for out in node.outputs):
                continue
            for value in node.inputs:
                tensor = weights.tensor_of(value)
                if value is not None and tensor is not None and tensor.size > EMBEDDED:
                    yield value


def _identifier(name: str) -> str:
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
    return kept if kept[:1].isalpha() else f"v{kept}"

