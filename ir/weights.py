"""Constant tensors of a model: reading them through exporters' spellings, and rounding new ones once.

A rewrite computes new weights in float64. `rounded` stores them in the model's dtype and keeps the float64 values
beside them, so that a later rewrite continues from the unrounded values (one rounding, however many rewrites touch a
weight), and so that a rewrite can be judged in float64, where it must agree to 1e-9.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import numpy as np
import onnx_ir as oir

from burnish.ir.walk import graphs

_EXACT = "burnish.exact"


def tensor_of(value: oir.Value | None) -> oir.TensorProtocol | None:
    """The tensor of a value that no caller can change: an initializer that is not also a graph input, or a Constant.

    Returns:
        The tensor, not yet read from disk; None when the value is absent or computed.
    """
    if value is None:
        return None
    if value.const_value is not None:
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        if name == "value":
            tensor: oir.TensorProtocol = attribute.value
            return tensor
        if name in ("value_float", "value_floats"):
            return oir.tensor(np.asarray(attribute.value, np.float32))
        if name in ("value_int", "value_ints"):
            return oir.tensor(np.asarray(attribute.value, np.int64))
    return None


def is_constant(value: oir.Value | None) -> bool:
    """Whether `tensor_of` would give a tensor; reads nothing."""
    return tensor_of(value) is not None


def constant(value: oir.Value | None, *, largest: int | None = None) -> np.ndarray | None:
    """The array of a constant value in its own dtype (do not write into it), or None when it is computed.

    Args:
        value: the value to read.
        largest: give None instead of reading a tensor of more elements than this.
    """
    tensor = tensor_of(value)
    if tensor is None or (largest is not None and tensor.size > largest):
        return None
    return tensor.numpy()


def scalar(value: oir.Value | None) -> float | None:
    """The number in a constant of one element, whatever its rank; None for anything else."""
    array = constant(value, largest=1)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype.kind in "fiub" else None


def integers(value: oir.Value | None, *, largest: int = 1024) -> list[int] | None:
    """The elements of an integer constant of rank 0 or 1; None for anything else."""
    array = constant(value, largest=largest)
    if array is None or array.ndim > 1 or array.dtype.kind not in "iu":
        return None
    return [int(x) for x in array.reshape(-1)]


def exact(value: oir.Value) -> np.ndarray | None:
    """A floating-point constant in float64: the unrounded values where a rewrite made it, else its own values.

    A constant of one element that is a rounded root (`meant`) is that root.

    Returns:
        float64 array, or None when the value is computed or not floating point.
    """
    tensor = tensor_of(value)
    if tensor is None or not tensor.dtype.is_floating_point():
        return None
    kept: np.ndarray | None = getattr(tensor, "meta", {}).get(_EXACT)
    if kept is not None:
        return kept
    array = tensor.numpy()
    if array.size == 1:
        return np.full(array.shape, meant(array.reshape(())))
    return array.astype(np.float64)


def meant(number: np.generic | np.ndarray) -> float:
    """The number that a rounded constant of one element stands for, in float64.

    Exporters round `sqrt(1/2)` or the scale of attention to the model's dtype, and every operator that is written in
    place of the spelled-out form uses the number itself. So a constant that equals the rounding of a square or fourth
    root of a whole number up to 1024, of its reciprocal, or of a constant of Gelu, is that number.

    Args:
        number: one floating-point number in its own dtype.
    """
    value = float(number)
    table = _roots(number.dtype.name) if number.dtype.name in ("float32", "float16") else {}
    return table.get(abs(value), abs(value)) * (-1.0 if value < 0 else 1.0)


@cache
def _roots(dtype: str) -> dict[float, float]:
    whole = np.arange(2, 1025, dtype=np.float64)
    named = np.array([np.sqrt(2 / np.pi), 0.044715, 1.702, 1 / 3, 1 / 6])
    numbers = np.concatenate([whole**power for power in (-0.25, 0.25, -0.5, 0.5)] + [named])
    return dict(zip(numbers.astype(dtype).astype(np.float64).tolist(), numbers.tolist(), strict=True))


def unrounded(value: oir.Value) -> np.ndarray | None:
    """The float64 values that `rounded` keeps beside a constant; None where the stored values are all there is."""
    return unrounded_values(tensor_of(value))


def unrounded_values(tensor: oir.TensorProtocol | None) -> np.ndarray | None:
    """`unrounded` of a tensor."""
    return getattr(tensor, "meta", {}).get(_EXACT)


def rounded(array: np.ndarray, dtype: oir.DataType, name: str | None = None) -> oir.Tensor[np.ndarray]:
    """A tensor of `dtype` that rounds the float64 `array` once and remembers the float64 values for `exact`.

    Args:
        array: float64, any shape.
        dtype: a floating-point dtype of the model.
        name: the tensor's name.
    """
    values = np.asarray(array, np.float64, order="C")
    stored = values.astype(dtype.numpy())
    tensor = oir.Tensor(stored, dtype=dtype, name=name)
    if dtype != oir.DataType.DOUBLE:
        tensor.meta[_EXACT] = values
    return tensor


def release(model: oir.Model) -> None:
    """Close the memory maps of weights in external files; a weight that is read again is mapped again."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, oir.ExternalTensor):
                with suppress(BufferError):
                    value.const_value.release()


def forget_unrounded(model: oir.Model) -> None:
    """Let constants be what is stored: the float64 values that `rounded` keeps beside them, twice as large, go.

    Models that share tensors with this one keep them.
    """
    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and unrounded_values(tensor) is not None:
                value.const_value = oir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def parameter_bytes(node: oir.Node) -> int:
    """Bytes of the constants that `node` reads, each counted once."""
    tensors = {id(t): t for t in (tensor_of(v) for v in node.inputs) if t is not None}
    return sum(t.nbytes for t in tensors.values())
