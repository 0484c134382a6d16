"""What the functions of the table of operators make Relax expressions with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as oir
from tvm import relax, te, tirx
from tvm.sym.analyzer import Analyzer

from burnish.backends.tvm.registry import Unsupported
from burnish.backends.tvm.sizes import Sizes
from burnish.ir.inference import Inference


class Maker:
    """What the functions of the table make expressions with, for one node."""

    def __init__(
        self,
        builder: Any,
        facts: Inference,
        sizes: Sizes,
        node: oir.Node,
        stored: Callable[[oir.Value], Any],
        value: Callable[[oir.Value | None], Any],
    ) -> None:
        self._stored, self._value = stored, value
        self._builder, self._facts, self._sizes, self.node = builder, facts, sizes, node
        self.opset = facts.opset

    def emit(self, expression: Any) -> Any:
        """Bind an expression to a variable, whose type is then known."""
        return self._builder.emit(expression)

    def te(self, function: Any, *given: Any, **options: Any) -> Any:
        """Bind what a tensor-expression function computes of expressions."""
        return self._builder.emit_te(function, *given, **options)

    def shape(self, expression: Any) -> list[Any]:
        """The sizes of an expression that was emitted or is an input."""
        found = type_of(expression).shape
        if found is None or not isinstance(found, relax.ShapeExpr):
            raise Unsupported("the shape of a value is not known to TVM")
        return [int(one) if isinstance(one, tirx.IntImm) else one for one in found.values]

    def alike(self, *given: Any, apart: int | None = None) -> list[Any]:
        """The same expressions with axes that broadcast together of one size.

        Where TVM cannot prove two dynamic sizes equal, the second expression is held to the size of the first when the
        function runs, and refused when it has another one, a 1 included: nothing is broadcast that was not seen to be.

        Args:
            given: expressions, aligned at their last axes.
            apart: an axis, counted from the end, that need not agree.
        """
        single = () if apart is not None else (1,)
        sizes: dict[int, Any] = {}
        for one in given:
            for place, size in enumerate(reversed(self.shape(one)), 1):
                if place != apart and size not in single and (place not in sizes or isinstance(size, int)):
                    sizes[place] = size
        return [self._held(one, sizes, single) for one in given]

    def alike_batches(self, a: Any, b: Any) -> list[Any]:
        """Two stacks of matrices with axes before the last two of one size; see `alike`."""
        sizes: dict[int, Any] = {}
        for one in (a, b):
            for place, size in enumerate(reversed(self.shape(one)), 1):
                if place > 2 and size != 1 and (place not in sizes or isinstance(size, int)):
                    sizes[place] = size
        return [self._held(one, sizes, (1,)) for one in (a, b)]

    def _held(self, one: Any, sizes: dict[int, Any], single: tuple[int, ...]) -> Any:
        """`one`, held to the sizes by their place from the end, where TVM cannot prove that it has them."""
        shape = self.shape(one)
        held = list(shape)
        for place, size in enumerate(reversed(shape), 1):
            if place in sizes and size not in single and not _equal(size, sizes[place]):
                held[-place] = sizes[place]
        if all(a is b for a, b in zip(held, shape, strict=True)):
            return one
        return self._builder.match_cast(one, relax.TensorType(held, self.dtype(one)))

    def filled(self, one: Any, axes: Sequence[int], kept: Sequence[Any]) -> Any:
        """`one`, refused when the function runs where one of the axes is empty and the result is not.

        TVM's kernels do not write a sum over nothing. Only inputs are held to that: FuseOps loses values that are cast
        between the operators that it joins ("Var lv74 is not defined").

        Args:
            one: an expression.
            axes: what is summed over.
            kept: the sizes of the result: where one of them is nothing whenever the axis is, there is nothing to write.
        """
        shape = self.shape(one)
        held = list(shape)
        for axis in axes if not isinstance(one, relax.DataflowVar) else ():
            size = shape[axis]
            if not isinstance(size, int) and not any(_empties(size, other) for other in kept):
                held[axis] = tirx.max(size, tirx.const(1, "int64"))
        if all(a is b for a, b in zip(held, shape, strict=True)):
            return one
        return self._builder.match_cast(one, relax.TensorType(held, self.dtype(one)))

    def summed(self, a: Any, b: Any) -> tuple[Any, Any]:
        """The factors of a product of matrices, `filled` along the axes that it sums over."""
        between = max(self.rank(b) - 2, 0)
        kept = [*self.shape(a)[:-1], *(size for axis, size in enumerate(self.shape(b)) if axis != between)]
        return self.filled(a, [self.rank(a) - 1], kept), self.filled(b, [between], kept)

    def held(self, one: Any, sizes: list[Any]) -> Any:
        """An expression, held to have the sizes when the function runs, where TVM cannot prove that it has them."""
        found = self.shape(one)
        if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(found, sizes, strict=True)):
            raise Unsupported(f"sizes {found} where {sizes} are needed")
        if all(_equal(size, wanted) for size, wanted in zip(found, sizes, strict=True)):
            return one
        return self._builder.match_cast(one, relax.TensorType(sizes, self.dtype(one)))

    def sizes_as_tensor(self, sizes: list[Any], dtype: str = "int64") -> Any:
        """Sizes as a vector that the compiled function computes from its arguments."""

        def vector(*found: Any) -> Any:
            def element(index: Any) -> Any:
                chosen: Any = tirx.const(0, dtype)
                for place, size in enumerate(found):
                    chosen = tirx.Select(index == place, tirx.Cast(dtype, size), chosen)
                return chosen

            return te.compute((len(found),), element, name="sizes")

        given = [tirx.const(one, "int64") if isinstance(one, int) else one for one in sizes]
        # Opaque (8): FuseTIR fails on a symbol that is an argument and a size of the same fused function.
        return self._builder.emit_te(vector, *given, primfunc_attrs={"op_pattern": 8})

    def rank(self, expression: Any) -> int:
        """The number of axes of an expression."""
        return len(self.shape(expression))

    def dtype(self, expression: Any) -> str:
        """The dtype of an expression."""
        return str(type_of(expression).dtype)

    def result(self, index: int = 0) -> list[Any] | None:
        """The sizes of an output as they are proven; None when they are not, or hang on data."""
        shape = self._facts.shape(self.node.outputs[index])
        try:
            return None if shape is None else [self._sizes.of(size) for size in shape]
        except Unsupported:
            return None

    def output_dtype(self, index: int = 0) -> oir.DataType:
        """The ONNX dtype of an output; raises `Unsupported` where it is not known."""
        return self.value_dtype(self.node.outputs[index])

    def output_dtype_name(self, index: int = 0) -> str:
        """TVM's name of the dtype of an output."""
        return dtype_name(self.output_dtype(index))

    def input_dtype(self, index: int) -> oir.DataType:
        """The ONNX dtype of an input: 4-bit integers are 8-bit ones in TVM."""
        return self.value_dtype(self.node.inputs[index])

    def stored(self, value: oir.Value) -> Any:
        """The parameter of a constant as it lies in memory: 4-bit integers two to a byte, flat."""
        return self._stored(value)

    def value(self, value: oir.Value | None) -> Any:
        """The expression of a value that is computed before the node, an input, or a constant."""
        return self._value(value)

    def same_sizes(self, sizes: list[Any], others: list[Any]) -> bool:
        """Whether sizes are as many and proven equal."""
        if len(sizes) != len(others):
            return False
        pairs = list(zip(sizes, others, strict=True))
        return all(a == b if isinstance(a, int) and isinstance(b, int) else _equal(a, b) for a, b in pairs)

    def value_dtype(self, value: oir.Value | None) -> oir.DataType:
        """The ONNX dtype of a value; raises `Unsupported` where it is not known."""
        dtype = self._facts.dtype(value)
        if dtype is None:
            raise Unsupported("a dtype is not known")
        return dtype

    def array(self, expression: Any) -> np.ndarray | None:
        """The elements of a constant; None for anything else."""
        found = getattr(expression, "value", None)
        return None if found is None or not hasattr(found, "numpy") else np.asarray(found.numpy())


def _equal(one: Any, other: Any) -> bool:
    """Whether two sizes are proven equal; two numbers are left to TVM to judge."""
    if isinstance(one, int) and isinstance(other, int):
        return True
    return bool(Analyzer().can_prove_equal(one, other))


def _empties(size: Any, other: Any) -> bool:
    """Whether a size, sums and products of symbols, is 0 only where another is."""
    return not isinstance(other, int) and _is_natural(Analyzer().simplify(size - other))


def _is_natural(size: Any) -> bool:
    """Whether no symbols make a size negative, as far as its form tells."""
    if isinstance(size, tirx.IntImm):
        return int(size) >= 0
    parts = isinstance(size, tirx.Add | tirx.Mul) and _is_natural(size.a) and _is_natural(size.b)
    return isinstance(size, tirx.Var) or parts


def type_of(expression: Any) -> Any:
    """The type of an expression that was emitted or is a parameter."""
    return expression.ty if hasattr(expression, "ty") else expression.struct_info


def dtype_name(dtype: oir.DataType) -> str:
    """TVM's name of a dtype.

    Raises:
        Unsupported: TVM is not given values of it.
    """
    name = _DTYPES.get(dtype)
    if name is None:
        raise Unsupported(f"values of dtype {dtype.name.lower()}")
    return name


_DTYPES = {
    oir.DataType.FLOAT: "float32",
    oir.DataType.FLOAT16: "float16",
    oir.DataType.BFLOAT16: "bfloat16",
    oir.DataType.DOUBLE: "float64",
    oir.DataType.INT64: "int64",
    oir.DataType.INT32: "int32",
    oir.DataType.INT16: "int16",
    oir.DataType.INT8: "int8",
    oir.DataType.UINT8: "uint8",
    oir.DataType.UINT16: "uint16",
    oir.DataType.UINT32: "uint32",
    oir.DataType.UINT64: "uint64",
    oir.DataType.BOOL: "bool",
    oir.DataType.INT4: "int8",
    oir.DataType.UINT4: "uint8",
}
