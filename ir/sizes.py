"""How large values are, with the symbolic dimensions of a model filled in."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import onnx_ir as oir

from burnish.ir import match, weights

Dims = Mapping[str, int]
"""A number for each named dimension; dimensions that are expressions of those names follow."""


class UnknownSizeError(ValueError):
    """A size that a formula needs is not known; the text says which."""


def shape_of(value: oir.Value, dims: Dims) -> tuple[int, ...]:
    """The shape of `value`.

    Args:
        value: a tensor value of the graph.
        dims: numbers for the symbolic dimensions.

    Raises:
        UnknownSizeError: the rank or a dimension is not known.
    """
    shape = value.shape
    if shape is None and (tensor := stored(value)) is not None:
        return tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type]
    if shape is None:
        raise UnknownSizeError(f"the shape of `{value.name}` is not known")
    return tuple(_size(value, size, dims) for size in shape)


def _size(value: oir.Value, size: int | oir.SymbolicDim, dims: Dims) -> int:
    if isinstance(size, int) and size >= 0:
        return size
    if isinstance(size, int) or size.value is None:
        raise UnknownSizeError(f"a dimension of `{value.name}` is not known")
    if size.value in dims:
        return dims[size.value]
    if not size.value.isidentifier() and dims:
        found = _evaluated(size, dims)
        if found is not None:
            return found
    raise UnknownSizeError(f"dimension `{size.value}` of `{value.name}` has no number")


def _evaluated(size: oir.SymbolicDim, dims: Dims) -> int | None:
    try:
        found = size.evaluate(dict(dims))
    except (ValueError, TypeError, SyntaxError):
        return None
    return found if isinstance(found, int) else None


def elements(value: oir.Value, dims: Dims) -> int:
    """The number of elements of `value`; raises UnknownSizeError like `shape_of`."""
    return prod(shape_of(value, dims))


def value_bytes(value: oir.Value, dims: Dims) -> int:
    """The bytes of `value`, packed dtypes rounded up to whole bytes.

    Raises:
        UnknownSizeError: shape or dtype is not known, or the value is a sequence or holds strings.
    """
    tensor = stored(value)
    dtype = value.dtype if value.dtype is not None else tensor.dtype if tensor is not None else None
    if dtype is None or not isinstance(value.type, oir.TensorType | None):
        raise UnknownSizeError(f"`{value.name}` has no known element type")
    if dtype == oir.DataType.STRING:
        raise UnknownSizeError(f"`{value.name}` holds strings")
    return -(-elements(value, dims) * dtype.bitwidth // 8)


def stored(value: oir.Value) -> oir.TensorProtocol | None:
    """The tensor that the model stores for `value`: an initializer (one that is also an input too) or a Constant."""
    return value.const_value if value.is_initializer() else weights.tensor_of(value)


class Sizes:
    """What a formula asks about one node: the shapes of its inputs and outputs, and its attributes.

    Every question raises UnknownSizeError when there is no answer, so that a formula never computes with a guess.
    """

    def __init__(self, node: oir.Node, dims: Dims) -> None:
        self.node = node
        self.dims = dims

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return match.input_of(self.node, index) is not None

    def read(self, index: int) -> tuple[int, ...]:
        """The shape of input `index`."""
        value = match.input_of(self.node, index)
        if value is None:
            raise UnknownSizeError(f"{match.describe(self.node)} has no input {index}")
        return shape_of(value, self.dims)

    def written(self, index: int = 0) -> tuple[int, ...]:
        """The shape of output `index`."""
        if index >= len(self.node.outputs):
            raise UnknownSizeError(f"{match.describe(self.node)} has no output {index}")
        return shape_of(self.node.outputs[index], self.dims)

    def attribute(self, name: str, default: Any = None) -> Any:
        """The Python value of an attribute, or `default`."""
        found = self.node.attributes.get(name)
        if found is not None and found.is_ref():
            raise UnknownSizeError(f"attribute `{name}` is an argument of the function")
        return match.attribute(self.node, name, default)

    def number(self, index: int, default: int) -> int:
        """The one integer in constant input `index`, or `default` when the input is absent."""
        if not self.has(index):
            return default
        found = weights.integers(self.node.inputs[index])
        if found is None or len(found) != 1:
            raise UnknownSizeError(f"input {index} of {match.describe(self.node)} is computed")
        return found[0]
