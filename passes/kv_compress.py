"""The graph that lets go of what the budget of a decoder has no room for: caches in, smaller caches out.

It is run once behind a prompt. The last queries of the prompt say which keys matter: their attention is summed over
queries and over all heads that read a head of keys, averaged over neighbours, and the keys with most of it stay,
besides the window of the last tokens (SnapKV, arXiv:2404.14469). Keys keep the positions that they were turned by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.passes.kv_budget import MILLION, Budget, BudgetedCache

_OPSET, _IR = 20, 10
_LOWEST = float(np.finfo(np.float32).min)


def compressor(model: oir.Model, budget: Budget) -> oir.Model:
    """The graph for a decoder.

    Its inputs are the outputs of the decoder with the last queries and with the caches, of the last call of a prompt;
    its outputs have the names of the decoder's inputs for the caches. Rows are of one length and have no padding. As
    many of the last tokens are kept as there are queries.

    Args:
        model: the decoder; not changed.
        budget: its budget.

    Raises:
        InputError: a cache is not of floating-point numbers.
    """
    return _Writer(model, budget).write()


class _Writer:
    def __init__(self, model: oir.Model, budget: Budget) -> None:
        self._ports = {str(one.name): one for one in (*model.graph.inputs, *model.graph.outputs)}
        self._budget = budget
        self.inputs: list[oir.Value] = []
        self.outputs: list[oir.Value] = []
        self.nodes: list[oir.Node] = []
        self.constants: dict[tuple[bytes, str, tuple[int, ...]], oir.Value] = {}

    def write(self) -> oir.Model:
        queries = {
            query.name: self._input(query.name, "window") for one in self._budget.caches for query in one.queries
        }
        caches = [[self._input(name, "total") for name in one.present] for one in self._budget.caches]
        first = self._budget.caches[0]
        self.total = self._size(caches[0][0], 2)
        self.window = self._size(queries[first.queries[0].name], 2)
        self.prefix = self.add("Sub", self.total, self.window)
        columns = self.add("Range", self.number(0), self.total, self.number(1))
        rows = self.add("Add", self.add("Range", self.number(0), self.window, self.number(1)), self.prefix)
        later = self.add("Greater", columns, self.add("Unsqueeze", rows, self.number([1])))
        self.causal = self.add("Where", later, self.real(_LOWEST), self.real(0.0))
        self.inside = self.add("GreaterOrEqual", columns, self.prefix)
        edges = np.cumsum([one.keep for one in self._budget.caches])
        for cache, end, pair in zip(self._budget.caches, edges, caches, strict=True):
            places = self._places(cache, int(end), pair[0], queries)
            for name, kept in zip(cache.past, pair, strict=True):
                self._output(name, kept, places)
        graph = oir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.constants.values()),
            opset_imports={"": _OPSET},
            name="compress",
        )
        return oir.Model(graph, ir_version=_IR, producer_name="burnish")

    def _places(self, cache: BudgetedCache, end: int, keys: oir.Value, queries: dict[str, oir.Value]) -> oir.Value:
        """Which tokens stay, in the order of the text, int64 [batch, heads, kept]."""
        heads = match.dim(keys, 1)
        assert heads is not None
        flipped = self.add("Transpose", self._wide(keys), perm=[0, 1, 3, 2])
        weights: oir.Value | None = None
        for seen in cache.queries:
            query = queries[seen.name]
            count, size = match.dim(query, 1), match.dim(query, 3)
            assert count is not None and size is not None
            together = self.add("Reshape", self._wide(query), self.number([0, heads, -1, size]))
            scores = self.add("Mul", self.add("MatMul", together, flipped), self.real(seen.scale))
            if seen.softcap:
                cap = self.real(seen.softcap)
                scores = self.add("Mul", self.add("Tanh", self.add("Div", scores, cap)), cap)
            one = self.number([1])
            sizes = [self.number([0, heads, count // heads]), self.add("Reshape", self.window, one)]
            shape = self.add("Concat", *sizes, self.add("Reshape", self.total, one), axis=0)
            odds = self.add("Softmax", self.add("Add", self.add("Reshape", scores, shape), self.causal), axis=-1)
            sums = self.add("ReduceSum", odds, self.number([2, 3]), keepdims=0)
            weights = sums if weights is None else self.add("Add", weights, sums)
        assert weights is not None
        weights = self.add("Where", self.inside, self.real(0.0), weights)
        half = self._budget.pool // 2
        weights = self.add(
            "AveragePool", weights, kernel_shape=[self._budget.pool], pads=[half, half], count_include_pad=1
        )
        weights = self.add("Where", self.inside, self.real(-_LOWEST), weights)
        kept = self.add("Min", self.add("Max", self._count(cache, end), self.window), self.total)
        kept = self.add("Reshape", kept, self.number([1]))
        _, best = self.several("TopK", weights, kept, axis=-1)
        places, _ = self.several("TopK", best, kept, axis=-1, largest=0)
        return places

    def _count(self, cache: BudgetedCache, end: int) -> oir.Value:
        if not self._budget.relative:
            return self.number(cache.keep)
        ends = [
            self.add("Div", self.add("Mul", self.total, self.number(edge)), self.number(MILLION))
            for edge in (end, end - cache.keep)
        ]
        return self.add("Sub", *ends)

    def _output(self, name: str, kept: oir.Value, places: oir.Value) -> None:
        size = match.dim(kept, 3)
        assert size is not None
        wanted = self.add("Concat", self.add("Shape", places), self.number([size]), axis=0)
        spread = self.add("Expand", self.add("Unsqueeze", places, self.number([3])), wanted)
        out = self.add("GatherElements", kept, spread, axis=2)
        out.name, out.type = name, kept.type
        out.shape = oir.Shape(["batch", match.dim(kept, 1), f"kept_{len(self.outputs) // 2}", size])
        self.outputs.append(out)

    def _input(self, name: str, time: str) -> oir.Value:
        port = self._ports[name]
        if port.dtype is None or not port.dtype.is_floating_point():
            kind = "unknown" if port.dtype is None else port.dtype.name
            raise InputError(f"`{name}` is of the dtype {kind}, and weights of keys are computed of numbers")
        shape = oir.Shape(["batch", match.dim(port, 1), time, match.dim(port, 3)])
        value = oir.Value(name=name, type=port.type, shape=shape)
        self.inputs.append(value)
        return value

    def _wide(self, value: oir.Value) -> oir.Value:
        if value.dtype == oir.DataType.FLOAT:
            return value
        return self.add("Cast", value, to=oir.DataType.FLOAT.value)

    def _size(self, value: oir.Value, axis: int) -> oir.Value:
        return self.add("Squeeze", self.add("Shape", value, start=axis, end=axis + 1))

    def number(self, value: int | list[int]) -> oir.Value:
        """A constant of int64."""
        return self._constant(np.array(value, np.int64))

    def real(self, value: float) -> oir.Value:
        """A constant of float32."""
        return self._constant(np.array(value, np.float32))

    def _constant(self, array: np.ndarray) -> oir.Value:
        key = (array.tobytes(), array.dtype.str, array.shape)
        if key not in self.constants:
            name = f"constant_{len(self.constants)}"
            tensor = oir.tensor(array, name=name)
            kind, shape = oir.TensorType(tensor.dtype), oir.Shape(array.shape)
            self.constants[key] = oir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        return self.constants[key]

    def add(self, op: str, *inputs: oir.Value, **attributes: Any) -> oir.Value:
        """The output of a new node."""
        return self.several(op, *inputs, outputs=1, **attributes)[0]

    def several(self, op: str, *inputs: oir.Value, outputs: int = 2, **attributes: Any) -> list[oir.Value]:
        """All outputs of a new node."""
        node = oir.node(op, inputs, attributes, num_outputs=outputs, name=f"{op}_{len(self.nodes)}")
        for index, out in enumerate(node.outputs):
            out.name = f"value_{len(self.nodes)}_{index}"
        self.nodes.append(node)
        return list(node.outputs)
