"""Models that are nearly the ones given: valid, seeded changes of the graph that a view must notice or read rightly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

Arrays = dict[str, np.ndarray]

_SWAPS = {
    "Add": ("Sub", "Mul", "Max"), "Sub": ("Add",), "Mul": ("Div", "Add", "Sub"), "Div": ("Mul",),
    "Less": ("Greater", "LessOrEqual"), "LessOrEqual": ("Less", "GreaterOrEqual"), "Equal": ("LessOrEqual",),
    "Greater": ("Less", "GreaterOrEqual"), "GreaterOrEqual": ("Greater", "LessOrEqual"), "And": ("Or",), "Or": ("And",),
    "Cos": ("Sin",), "Sin": ("Cos",), "Neg": ("Identity", "Abs"), "Identity": ("Neg",), "Not": ("Identity",),
    "Softmax": ("LogSoftmax", "Hardmax", "Sigmoid"), "Tanh": ("Sigmoid",), "Relu": ("Neg", "Tanh"), "Min": ("Max",),
    "ReduceMean": ("ReduceMax", "ReduceSum"), "Max": ("Min",), "Sqrt": ("Abs",),
}  # fmt: skip
_ONE_TO_ONE = ("Neg", "Relu", "Tanh", "Abs", "Sigmoid", "Exp", "Identity")


class Mutator:
    """Changes of one model, whose inner values are known for one set of feeds.

    Args:
        proto: the model; not changed.
        values: its inner values by name, for the shapes and dtypes of what is rewired.
        seed: of all choices.
    """

    def __init__(self, proto: onnx.ModelProto, values: Arrays, seed: int) -> None:
        self.proto, self.values = onnx.ModelProto(), values
        self.proto.CopyFrom(proto)
        del self.proto.graph.value_info[:]
        self.random = np.random.default_rng(seed)
        self.nodes = self.proto.graph.node
        self.weights = {one.name: one for one in self.proto.graph.initializer}

    def mutate(self, changes: int) -> tuple[onnx.ModelProto, list[str]]:
        """The model after some changes, and what they are; fewer where a change found no place."""
        kinds: list[Callable[[], str | None]] = [
            self._operator, self._operator, self._insert, self._insert, self._rewire, self._rewire, self._order,
            self._attribute, self._constant, self._constant, self._reader, self._move, self._share,
        ]  # fmt: skip
        said: list[str] = []
        for _ in range(20 * changes):
            if len(said) == changes:
                break
            found = kinds[self.random.integers(len(kinds))]()
            if found is not None:
                said.append(found)
        return self.proto, said

    def _pick(self) -> onnx.NodeProto:
        return self.nodes[int(self.random.integers(len(self.nodes)))]

    def _float(self, name: str) -> np.ndarray | None:
        array = self.values.get(name)
        return array if array is not None and array.dtype == np.float32 and array.ndim else None

    def _operator(self) -> str | None:
        node = self._pick()
        others = _SWAPS.get(node.op_type, ())
        if not others or node.domain:
            return None
        old, node.op_type = node.op_type, str(self.random.choice(others))
        if node.op_type in _ONE_TO_ONE:
            del node.attribute[:]
        return f"{old} -> {node.op_type} at {node.output[0]}"

    def _edge(self) -> tuple[int, onnx.NodeProto, int] | None:
        at = int(self.random.integers(len(self.nodes)))
        node = self.nodes[at]
        if not node.input:
            return None
        return at, node, int(self.random.integers(len(node.input)))

    def _constant_of(self, array: np.ndarray) -> str:
        name = f"mutant_c{len(self.proto.graph.initializer)}"
        self.proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _put(self, at: int, node: onnx.NodeProto, index: int, made: onnx.NodeProto) -> None:
        node.input[index] = made.output[0]
        self.nodes.insert(at, made)

    def _insert(self) -> str | None:
        edge = self._edge()
        array = self._float(edge[1].input[edge[2]]) if edge is not None else None
        if edge is None or array is None:
            return None
        at, node, index = edge
        source, out = node.input[index], f"mutant_v{len(self.nodes)}"
        kind = self.random.choice(["unary", "scale", "shift", "wide scale", "flip", "roll"])
        if kind == "unary":
            op = str(self.random.choice(_ONE_TO_ONE))
            made = helper.make_node(op, [source], [out])
        elif kind in ("scale", "shift"):
            number = np.float32(self.random.choice([0.5, 2.0, -1.0, 1e-3, -1e4, 0.125]))
            op = "Mul" if kind == "scale" else "Add"
            made = helper.make_node(op, [source, self._constant_of(number)], [out])
        elif kind == "wide scale":
            axis = int(self.random.integers(array.ndim))
            shape = [1] * array.ndim
            shape[axis] = array.shape[axis]
            factor = self.random.uniform(0.5, 1.5, shape).astype(np.float32)
            op = f"Mul along {axis}"
            made = helper.make_node(str(self.random.choice(["Mul", "Add"])), [source, self._constant_of(factor)], [out])
        else:
            axis = int(self.random.integers(array.ndim))
            order = np.arange(array.shape[axis])
            order = order[::-1] if kind == "flip" else np.roll(order, 1)
            op = f"{kind} of axis {axis}"
            made = helper.make_node("Gather", [source, self._constant_of(order.copy())], [out], axis=axis)
        self._put(at, node, index, made)
        return f"{op} on {source} before {node.op_type} {node.output[0]}"

    def _rewire(self) -> str | None:
        edge = self._edge()
        if edge is None:
            return None
        at, node, index = edge
        old = node.input[index]
        array = self.values.get(old)
        if array is None:
            return None
        before = {name for one in self.nodes[:at] for name in one.output} | {one.name for one in self.proto.graph.input}
        before |= set(self.weights)
        others = [
            name
            for name, other in self.values.items()
            if name != old and name in before and other.shape == array.shape and other.dtype == array.dtype
        ]
        if not others:
            return None
        node.input[index] = str(self.random.choice(others))
        return f"{node.op_type} {node.output[0]} reads {node.input[index]}, not {old}"

    def _order(self) -> str | None:
        node = self._pick()
        if node.op_type in ("Concat", "Sub", "Div", "MatMul", "Where") and len(node.input) > 1:
            first = len(node.input) - 2
            node.input[first], node.input[first + 1] = node.input[first + 1], node.input[first]
        elif node.op_type == "Split" and len(node.output) > 1:
            node.output[0], node.output[1] = node.output[1], node.output[0]
        else:
            return None
        return f"the order of {node.op_type} {node.output[0]}"

    def _attribute(self) -> str | None:
        node = self._pick()
        numbers = [one for one in node.attribute if one.type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS, 1)]
        if not numbers:
            return None
        one = numbers[int(self.random.integers(len(numbers)))]
        if one.type == onnx.AttributeProto.INTS and len(one.ints) > 1:
            i, j = self.random.choice(len(one.ints), 2, replace=False)
            one.ints[i], one.ints[j] = one.ints[j], one.ints[i]
        elif one.type == onnx.AttributeProto.INT and one.name != "to":
            one.i = int(one.i + self.random.choice([-1, 1])) if one.name == "axis" else 1 - int(one.i)
        else:
            one.f = one.f * 2 + 0.1
        return f"{one.name} of {node.op_type} {node.output[0]}"

    def _constant(self) -> str | None:
        tensors = [one for one in self.weights.values() if int(np.prod(one.dims)) <= 64]
        tensors += [a.t for node in self.nodes if node.op_type == "Constant" for a in node.attribute if a.HasField("t")]
        if not tensors:
            return None
        tensor = tensors[int(self.random.integers(len(tensors)))]
        array = numpy_helper.to_array(tensor).copy()
        if not array.size or array.dtype == np.bool_:
            return None
        flat = array.reshape(-1)
        at = int(self.random.integers(flat.size))
        with np.errstate(over="ignore"):
            if array.dtype.kind == "f":
                flat[at] = flat[at] * float(self.random.choice([2.0, -1.0, 1e-4])) if np.isfinite(flat[at]) else -2.0
            else:
                flat[at] = flat[at] + int(self.random.choice([-1, 1]))
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        return f"a number of the constant {name}"

    def _reader(self) -> str | None:
        """Two values of one shape meet: a second reader of both."""
        edge = self._edge()
        array = self._float(edge[1].input[edge[2]]) if edge is not None else None
        if edge is None or array is None:
            return None
        at, node, index = edge
        before = {name for one in self.nodes[:at] for name in one.output}
        others = [
            name
            for name, other in self.values.items()
            if name in before and other.dtype == np.float32 and other.shape == array.shape
        ]
        if not others:
            return None
        other, source, out = str(self.random.choice(others)), node.input[index], f"mutant_v{len(self.nodes)}"
        op = str(self.random.choice(["Add", "Sub", "Mul", "Max"]))
        self._put(at, node, index, helper.make_node(op, [source, other], [out]))
        return f"{op} of {other} on {source} before {node.op_type} {node.output[0]}"

    def _move(self) -> str | None:
        """Two axes of one size change places."""
        edge = self._edge()
        array = self._float(edge[1].input[edge[2]]) if edge is not None else None
        if edge is None or array is None or array.ndim < 2:
            return None
        at, node, index = edge
        pairs = [(i, j) for i in range(array.ndim) for j in range(i) if array.shape[i] == array.shape[j] > 1]
        if not pairs:
            return None
        i, j = pairs[int(self.random.integers(len(pairs)))]
        order = list(range(array.ndim))
        order[i], order[j] = j, i
        source, out = node.input[index], f"mutant_v{len(self.nodes)}"
        self._put(at, node, index, helper.make_node("Transpose", [source], [out], perm=order))
        return f"axes {i} and {j} of {source} before {node.op_type} {node.output[0]}"

    def _share(self) -> str | None:
        """An inner value becomes an output of the model, or a weight is that of another layer."""
        if self.random.random() < 0.5:
            node = self._pick()
            name = node.output[0]
            array = self._float(name)
            if array is None or name in {one.name for one in self.proto.graph.output}:
                return None
            shape = [None] * array.ndim
            self.proto.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
            return f"{name} is an output"
        groups: dict[tuple[int, ...], list[str]] = {}
        for one in self.weights.values():
            if one.data_type == onnx.TensorProto.FLOAT and len(one.dims):
                groups.setdefault(tuple(one.dims), []).append(one.name)
        many = [names for names in groups.values() if len(names) > 1]
        if not many:
            return None
        names = many[int(self.random.integers(len(many)))]
        one_name, other = self.random.choice(names, 2, replace=False)
        for node in self.nodes:
            for index, name in enumerate(node.input):
                if name == other:
                    node.input[index] = str(one_name)
        return f"{one_name} instead of {other}"
