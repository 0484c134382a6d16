"""Products with two factors, x A B, as one kernel whose middle, x A, is never written to memory.

Low-rank passes leave such pairs. A schedule (`processor_schedules`) computes the middle for a few rows at a time, in a
buffer that stays in the nearest caches, where the second product reads it. Only for processors: what this is worth on a
GPU was not measured.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as oir
from tvm import relax, te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from burnish.backends.tvm.operators.movement import times
from burnish.ir import match, weights
from burnish.ir.walk import is_op

LANES = 16
"""The rank and the width are multiples of it; the numbers of float32 that are multiplied at a time."""


def joined(module: Any) -> Any:
    """The module with each pair of products as one kernel, with the bias behind it where there is one."""
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            made = _Joined(module, function)
            body = made.visit_expr(function)
            if made.found:
                made.builder_.update_func(variable, body)
                module = made.builder_.get()
    return relax.transform.DeadCodeElimination()(module)


def alone(node: oir.Node) -> list[oir.Node]:
    """The two nodes of a pair of products of which this is the second; none where it is not."""
    first = match.producer(node.inputs[0], "MatMul", "Gemm") if is_op(node, "MatMul", "Gemm") else None
    if first is None or not match.used_once(first.outputs[0]) or match.input_of(first, 2) is not None:
        return []
    sizes = [_factor(one) for one in (first, node)]
    if None in sizes or not _fits(sizes[0][0], *sizes[1]):  # type: ignore[index, misc]
        return []
    return [first, node]


def _factor(node: oir.Node) -> tuple[int, int] | None:
    """Depth and width of the second factor of a product, where it is a constant of float32."""
    tensor = weights.tensor_of(node.inputs[1])
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype is not oir.DataType.FLOAT:
        return None
    if match.attribute(node, "transA", 0) or match.attribute(node, "alpha", 1.0) != 1.0:
        return None
    rows, columns = (int(size) for size in tensor.shape.numpy())
    return (columns, rows) if match.attribute(node, "transB", 0) else (rows, columns)


def _fits(depth: int, rank: int, width: int) -> bool:
    return rank < min(depth, width) and not rank % LANES and not width % LANES


@mutator
class _Joined(PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: Any, function: Any) -> None:
        super().__init__(module)
        self.bound = relax.analysis.get_var2val(function)
        self.readers: dict[Any, int] = {}
        for block in function.body.blocks if isinstance(function.body, relax.SeqExpr) else ():
            if isinstance(block, relax.DataflowBlock):
                for variable, users in relax.analysis.udchain(block).items():
                    self.readers[variable] = len(users)
        self.found = 0

    def visit_call_(self, call: Any) -> Any:
        """A pair, a pair and its bias, or what the call was."""
        pair, bias = self._pair(call), None
        if pair is None and _is(call, "relax.add"):
            pair = next((one for one in map(self._alone, call.args) if one is not None), None)
            other = next((one for one in call.args if self._alone(one) is None), None)
            sizes = None if other is None else _sizes(other)
            if pair is None or sizes is None or sizes != [_sizes(pair[2])[-1]]:
                return super().visit_call_(call)
            bias = other
        if pair is None:
            return super().visit_call_(call)
        self.found += 1
        x, *factors = (self.visit_expr(one) for one in (*pair, *([] if bias is None else [bias])))
        shape = list(x.ty.shape.values)
        flat = x if len(shape) == 2 else self.builder_.emit(relax.op.reshape(x, [times(shape[:-1]), shape[-1]]))
        found = self.builder_.call_te(_products, flat, *factors, primfunc_name_hint="pair")
        if len(shape) == 2:
            return found
        return relax.op.reshape(self.builder_.emit(found), [*shape[:-1], _sizes(pair[2])[-1]])

    def _alone(self, variable: Any) -> tuple[Any, Any, Any] | None:
        """The factors of the pair that a variable is bound to, where one thing reads it."""
        return self._pair(self._made(variable))

    def _made(self, variable: Any) -> Any:
        """What a variable is bound to, under another name or not; None where something else reads it too."""
        while isinstance(variable, relax.DataflowVar):
            variable = self.bound.get(variable) if self.readers.get(variable) == 1 else None
        return variable

    def _pair(self, call: Any) -> tuple[Any, Any, Any] | None:
        if not _is(call, "relax.matmul"):
            return None
        middle, second = call.args
        inner = self._made(middle)
        if not _is(inner, "relax.matmul"):
            return None
        x, first = inner.args
        a, b, given = _sizes(first), _sizes(second), _sizes(x)
        if a is None or b is None or given is None or len(a) != 2 or len(b) != 2 or len(given) < 2:
            return None
        known = all(isinstance(size, int) for size in (*a, *b))
        return (x, first, second) if known and given[-1] == a[0] and _fits(a[0], *b) else None


def _is(expression: Any, name: str) -> bool:
    return isinstance(expression, relax.Call) and getattr(expression.op, "name", "") == name


def _sizes(expression: Any) -> Any:
    """The sizes of an expression of float32; None for another dtype, or where the shape is not known."""
    found = expression.ty
    if not isinstance(found, relax.TensorType) or str(found.dtype) != "float32":
        return None
    if not isinstance(found.shape, relax.ShapeExpr):
        return None
    return [int(size) if isinstance(size, tirx.IntImm) else size for size in found.shape.values]


def _products(x: Any, a: Any, b: Any, *bias: Any) -> Any:
    k, r = te.reduce_axis((0, a.shape[0]), name="k"), te.reduce_axis((0, a.shape[1]), name="r")
    middle = te.compute((x.shape[0], a.shape[1]), lambda m, n: te.sum(x(m, k) * a(k, n), axis=k), name="middle")
    found = te.compute((x.shape[0], b.shape[1]), lambda m, n: te.sum(middle(m, r) * b(r, n), axis=r), name="matmul")
    if not bias:
        return found
    return te.compute(found.shape, lambda m, n: found(m, n) + bias[0](n), name="bias")
