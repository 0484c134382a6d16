"""An ONNX graph as a Relax function: weights as parameters behind the inputs, dynamic dimensions symbolic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir
from tvm import relax, tirx

from burnish.backends.tvm import operators, packing, registry
from burnish.backends.tvm.maker import Maker, dtype_name, type_of
from burnish.backends.tvm.reasons import last_line
from burnish.backends.tvm.registry import Entry, Unsupported
from burnish.backends.tvm.sizes import Sizes
from burnish.ir import dims, match, weights
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.walk import bodies, is_op

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

    def arrays(self) -> Iterator[np.ndarray]:
        """What to give for each weight: its elements, packed two to a byte where they have 4 bits."""
        for value in self.weights:
            tensor = _tensor(value)
            assert tensor is not None
            yield packing.array(tensor)


def lower(model: oir.Model, name: str = MAIN) -> Lowered:
    """The main graph of a model in Relax.

    Args:
        model: in the normal form, sorted, functions inlined.
        name: of the function.

    Raises:
        InputError: a node that TVM is not given, with the reason. `refusal` knows most of them before.
    """
    return _Lowering(model, name).run()


def refusal(node: oir.Node, facts: Inference, opsets: dict[str, int]) -> str | None:
    """Why a node is not given to TVM, as far as the table, its attributes and its sizes say; None when it may be."""
    try:
        if _is_if(node):
            _check_branches(node, facts, opsets)
        else:
            _entry(node, facts, opsets)
    except Unsupported as reason:
        return str(reason)
    return None


def _is_if(node: oir.Node) -> bool:
    return is_op(node, "If")


def _check_branches(node: oir.Node, facts: Inference, opsets: dict[str, int]) -> None:
    for body in bodies(node):
        for inner in body:
            reason = None if _written(inner, facts) else refusal(inner, facts, opsets)
            if reason is not None:
                raise Unsupported(f"in a branch, {match.describe(inner)}: {reason}")


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
    if entry.most is not None and any(one is not None for one in node.inputs[entry.most :]):
        raise Unsupported(f"its input {entry.most} is not understood")
    for value in (*node.inputs, *node.outputs):
        dtype = facts.dtype(value) if value is not None and value.name else None
        if dtype is not None:
            dtype_name(dtype)
    for index in entry.sizes:
        value = match.input_of(node, index)
        if value is not None and facts.integers(value) is None:
            raise Unsupported(f"its input {index} depends on data")
    return entry


def _written(node: oir.Node, facts: Inference) -> bool:
    """Whether all results are absent, or made of proven sizes of the inputs; these are written where they are read."""
    return all(not out.name or _is_proven(out, facts) for out in node.outputs)


def _is_proven(value: oir.Value, facts: Inference) -> bool:
    sizes = facts.integers(value)
    return sizes is not None and all(map(dims.is_named, sizes))


class _Lowering:
    """A model on its way into one module: the main graph, and a function for each branch of an If in it."""

    def __init__(self, model: oir.Model, name: str) -> None:
        self.name, self.graph, self.facts = name, model.graph, Inference(model)
        self.opsets = dict(model.opset_imports)
        self.builder = relax.BlockBuilder()
        self.inputs = [value for value in self.graph.inputs if value.const_value is None]
        self.weights = list(dict.fromkeys(self._large(self.graph)))
        self.branches: dict[oir.Graph, tuple[Any, list[oir.Value]]] = {}

    def run(self) -> Lowered:
        for value in (*self.inputs, *self.graph.outputs):
            dtype = self.facts.dtype(value)
            if dtype is not None and packing.is_narrow(dtype):
                raise InputError(f"TVM is not given values of dtype {dtype.name.lower()}", place=f"`{value.name}`")
        self._function(self.name, self.graph, [*self.inputs, *self.weights], {"num_input": len(self.inputs)})
        module = relax.transform.DeadCodeElimination()(self.builder.get())
        names = tuple(str(value.name) for value in self.inputs), tuple(str(v.name) for v in self.graph.outputs)
        return Lowered(module, *names, tuple(self.weights))

    def _function(self, name: str, graph: oir.Graph, given: list[oir.Value], attributes: dict[str, int]) -> Any:
        """Enter a graph as a function of values from around it."""
        for node in graph:
            for body in bodies(node) if _is_if(node) else ():
                taken = list(dict.fromkeys([*self.inputs, *_captured(body)]))
                kept = [value for value in taken if value in self.weights or not self._is_embedded(value)]
                self.branches[body] = self._function(f"{self.name}_branch{len(self.branches)}", body, kept, {}), kept
        scope = _Scope(self)
        parameters = [scope.parameter(value, index) for index, value in enumerate(given)]
        with self.builder.function(name, parameters, attrs=attributes, private=name != self.name):
            if any(map(_is_if, graph)):
                self.builder.emit_func_output(scope.results(graph))
            else:
                with self.builder.dataflow():
                    found = self.builder.emit_output(scope.results(graph))
                self.builder.emit_func_output(found)
        return self.builder.get().get_global_var(name)

    def _is_embedded(self, value: oir.Value) -> bool:
        return _tensor(value) is not None or _is_proven(value, self.facts)

    def _large(self, graph: oir.Graph) -> Iterable[oir.Value]:
        """The constants that are read as values and are too large to be written into a function."""
        for node in graph:
            if _written(node, self.facts):
                continue
            for value in node.inputs:
                tensor = _tensor(value)
                if value is not None and tensor is not None and tensor.size > EMBEDDED:
                    yield value
            for body in bodies(node) if _is_if(node) else ():
                yield from self._large(body)


def _captured(graph: oir.Graph) -> list[oir.Value]:
    """The values that a branch reads and does not compute."""
    own = {out for node in graph for out in node.outputs}
    read = [value for node in graph for value in node.inputs if value is not None] + list(graph.outputs)
    for node in graph:
        for body in bodies(node):
            read += _captured(body)
    return [value for value in dict.fromkeys(read) if value not in own]


class _Scope:
    """One function on its way: what its values are in Relax, and its symbols."""

    def __init__(self, whole: _Lowering) -> None:
        self.whole, self.facts, self.builder = whole, whole.facts, whole.builder
        self.sizes = Sizes()
        self.values: dict[oir.Value, Any] = {}

    def results(self, graph: oir.Graph) -> Any:
        """The outputs of a graph as a tuple, behind all of its nodes."""
        for node in graph:
            self._node(node)
        return relax.Tuple([self.value(value) for value in graph.outputs])

    def parameter(self, value: oir.Value, index: int) -> Any:
        """A parameter of the function for an input, a weight, or a value from around a branch."""
        tensor, shape, dtype = _tensor(value), self.facts.shape(value), self.facts.dtype(value)
        if tensor is not None:
            found = relax.Var(f"w{index}", relax.TensorType(*packing.kind(tensor)))
        elif shape is None or dtype is None:
            raise InputError("a value without dtype or rank cannot be compiled", place=f"`{value.name}`")
        else:
            try:
                declared = relax.TensorType([self.sizes.declare(size) for size in shape], dtype_name(dtype))
            except Unsupported as reason:
                raise InputError(f"TVM is not given {reason}", place=f"`{value.name}`") from None
            found = relax.Var(_identifier(str(value.name)), declared)
        self.values[value] = found
        return found

    def value(self, value: oir.Value | None) -> Any:
        """The expression of a value: computed, a parameter, a constant, or sizes made into a tensor."""
        if value is None:
            return None
        tensor = _tensor(value)
        if value not in self.values:
            self.values[value] = self._constant(value)
        elif tensor is not None and packing.is_packed(tensor) and value in self.whole.weights:
            return packing.unpacked(self.builder, self.values[value], tensor)
        return self.values[value]

    def _constant(self, value: oir.Value) -> Any:
        array = _array(value)
        if array is not None:
            return packing.constant(array)
        sizes = self.facts.integers(value)
        shape = self.facts.shape(value)
        if sizes is None or shape is None:
            raise Unsupported(f"`{value.name}` is not computed")
        dtype = self.facts.dtype(value)
        assert dtype is not None
        if all(isinstance(size, int) for size in sizes):
            return packing.constant(np.asarray(sizes, dtype.numpy()).reshape([int(str(d)) for d in shape]))
        node = value.producer()
        assert node is not None
        maker = Maker(self.builder, self.facts, self.sizes, node, self._stored, self.value)
        vector = maker.sizes_as_tensor([self.sizes.of(size) for size in sizes], dtype.name.lower())
        return vector if len(shape) == 1 else self.builder.emit(relax.op.reshape(vector, []))

    def _node(self, node: oir.Node) -> None:
        if _written(node, self.facts):
            return
        try:
            found = self._branched(node) if _is_if(node) else self._lowered(node)
            for out, one in zip(node.outputs, found, strict=False):
                if one is not None and out.name:
                    self._keep(out, one)
        except Unsupported as reason:
            raise InputError(f"TVM is not given this node: {reason}", place=match.describe(node)) from None
        except (InputError, MemoryError):
            raise
        except Exception as error:
            raise InputError(f"TVM does not take this node: {last_line(error)}", place=match.describe(node)) from error

    def _lowered(self, node: oir.Node) -> tuple[Any, ...]:
        entry = _entry(node, self.facts, self.whole.opsets)
        given = [self._given(node, index, entry) for index in range(len(node.inputs))]
        attributes = {name: match.attribute(node, name) for name in node.attributes}
        maker = Maker(self.builder, self.facts, self.sizes, node, self._stored, self.value)
        found = entry.function(maker, *given, **attributes)
        return found if entry.several else (found,)

    def _stored(self, value: oir.Value) -> Any:
        tensor = _tensor(value)
        assert tensor is not None
        return self.values[value] if value in self.whole.weights else packing.constant(packing.array(tensor))

    def _branched(self, node: oir.Node) -> tuple[Any, ...]:
        """Both branches as calls of their functions, of which one is made."""
        condition = self.builder.emit(relax.op.reshape(self.value(node.inputs[0]), []))
        first, second = (self._call(match.attribute(node, name)) for name in ("then_branch", "else_branch"))
        found = self.builder.emit(relax.If(condition, first, second))
        return tuple(self.builder.emit(relax.TupleGetItem(found, index)) for index in range(len(node.outputs)))

    def _call(self, body: oir.Graph) -> Any:
        function, taken = self.whole.branches[body]
        return function(*[self.values[one] if one in self.values else self.value(one) for one in taken])

    def _keep(self, value: oir.Value, expression: Any) -> None:
        """Bind a result; where TVM does not know its shape, what is proven of it is checked when the function runs."""
        bound = self.builder.emit(expression)
        proven, found = self.facts.shape(value), type_of(bound)
        if not isinstance(found.shape, relax.ShapeExpr) and proven is not None:
            shape = [self.sizes.fresh(size) for size in proven]
            bound = self.builder.match_cast(bound, relax.TensorType(shape, str(found.dtype)))
        elif proven is not None:
            if len(proven) != len(found.shape.values):
                raise Unsupported(f"TVM gives it {len(found.shape.values)} axes, not {len(proven)}")
            for size, one in zip(proven, found.shape.values, strict=True):
                if isinstance(size, int) and isinstance(one, tirx.IntImm) and int(one) != size:
                    raise Unsupported(f"TVM gives it a size of {int(one)} where it is {size}")
                self.sizes.learn(size, one)
        self.values[value] = bound

    def _given(self, node: oir.Node, index: int, entry: Entry) -> Any:
        value = node.inputs[index]
        if value is None:
            return None
        if index not in entry.sizes:
            return self.value(value)
        return [self.sizes.of(size) for size in self.facts.integers(value) or ()]


def _tensor(value: oir.Value | None) -> oir.TensorProtocol | None:
    """The constant of a value; an input with a default, as old files have all weights, is its default."""
    found = weights.tensor_of(value)
    if found is None and value is not None and value.is_graph_input():
        return value.const_value
    return found


def _array(value: oir.Value) -> np.ndarray | None:
    tensor = _tensor(value)
    return weights.constant(value) if tensor is None else tensor.numpy()


def _identifier(name: str) -> str:
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
    return kept if kept[:1].isalpha() else f"v{kept}"
