"""How tensors are handed to TVM: 4-bit integers two to a byte, as ONNX stores them, unpacked where they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as oir
from tvm import relax, te, tirx

from burnish.backends.tvm.maker import dtype_name

_SIGNED = {oir.DataType.INT4: True, oir.DataType.UINT4: False}


def is_narrow(dtype: oir.DataType) -> bool:
    """Whether a dtype is of 4-bit integers, which are 8-bit ones in a compiled function."""
    return dtype in _SIGNED


def is_packed(tensor: oir.TensorProtocol) -> bool:
    """Whether a tensor has two elements to a byte."""
    return tensor.dtype in _SIGNED


def kind(tensor: oir.TensorProtocol) -> tuple[list[int], str]:
    """The shape and TVM's dtype of what `array` gives."""
    if is_packed(tensor):
        return [-(-tensor.size // 2)], "uint8"
    return [int(size) for size in tensor.shape.numpy()], dtype_name(tensor.dtype)


def array(tensor: oir.TensorProtocol) -> np.ndarray:
    """The elements of a tensor as TVM takes them, in C order; of 4-bit integers the bytes, uint8 [elements / 2]."""
    if is_packed(tensor):
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.asarray(tensor.numpy(), order="C")


def constant(elements: np.ndarray) -> Any:
    """Elements as a constant of their dtype; 4-bit integers one to a byte."""
    narrow = {"int4": np.int8, "uint4": np.uint8}.get(elements.dtype.name)
    kept = np.asarray(elements if narrow is None else elements.astype(narrow), order="C")
    return relax.const(kept, kept.dtype.name)  # without a dtype, relax makes 32 bits of a scalar of 64


def element_of(byte: Any, place: Any, *, signed: bool) -> Any:
    """The 4-bit integer at a place, as int32, of the byte that holds it; the first one lies in the lower bits.

    Shifted and not chosen: where one choice is that of several lanes, TVM 0.27 makes CUDA code that nvcc refuses.
    """
    bits_before = tirx.Cast("int32", tirx.floormod(place, 2)) * tirx.const(4, "int32")  # places are 64 bits wide
    bits = tirx.bitwise_and(tirx.shift_right(tirx.Cast("int32", byte), bits_before), tirx.const(15, "int32"))
    # Their sign without a branch: -8 for the highest bit, which is 8 when flipped.
    return tirx.bitwise_xor(bits, tirx.const(8, "int32")) - tirx.const(8, "int32") if signed else bits


def unpacked(builder: Any, packed: Any, tensor: oir.TensorProtocol) -> Any:
    """A packed parameter as a tensor of int8 or uint8 of its own shape."""
    shape = [int(size) for size in tensor.shape.numpy()]
    signed = _SIGNED[tensor.dtype]

    def spread(data: Any) -> Any:
        def element(*at: Any) -> Any:
            place: Any = tirx.const(0, "int64")
            for index, size in zip(at, shape, strict=True):
                place = place * size + index.astype("int64")
            return tirx.Cast("int8" if signed else "uint8", element_of(data(place // 2), place, signed=signed))

        return te.compute(shape, element, name="unpack")

    return builder.emit_te(spread, packed)
