"""Changes of dtype. What C++ leaves undefined (a float far outside of an integer's range) depends on the target."""

from __future__ import annotations

from typing import Any

import onnx_ir as oir
from tvm import relax

from burnish.backends.tvm.maker import Maker, dtype_name
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


@lowers("Cast", since=6)
def cast(make: Maker, x: Any, *, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    return converted(make, x, target_dtype(to))


@lowers("CastLike", since=15)
def cast_like(make: Maker, x: Any, other: Any, *, saturate: int = 1, round_mode: str = "up") -> Any:
    dtype = make.node.outputs[0].dtype or make.node.inputs[1].dtype  # type: ignore[union-attr]
    if dtype is None:
        raise Unsupported("the dtype of the other input is not known")
    return converted(make, x, target_dtype(dtype))


def target_dtype(to: int) -> str:
    """TVM's name of a dtype to convert to."""
    dtype = oir.DataType(to)
    if dtype in (oir.DataType.INT4, oir.DataType.UINT4):
        raise Unsupported(f"a conversion to {dtype.name.lower()}")
    return dtype_name(dtype)


def converted(make: Maker, x: Any, wanted: str) -> Any:
    """`x` in another dtype: towards zero from floating point to integers, true for all but zero (NaN is true)."""
    found = make.dtype(x)
    if found == wanted:
        return x
    if wanted == "bool":
        return op.logical_not(make.emit(op.equal(x, relax.const(0, found))))
    return op.astype(x, wanted)
