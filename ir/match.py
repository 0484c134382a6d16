"""The words in which a rewrite describes what it looks for. They read the graph and never change it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.walk import is_op


def producer(value: oir.Value | None, *op_types: str, domain: str = "") -> oir.Node | None:
    """The node that computes `value` when it is one of `op_types` (any operator when none is named)."""
    node = value.producer() if value is not None else None
    if node is None or not op_types:
        return node
    return node if is_op(node, *op_types, domain=domain) else None


def consumers(value: oir.Value) -> list[oir.Node]:
    """The nodes that read `value`, each once, in a stable order; nested graphs' readers included."""
    seen: dict[int, oir.Node] = {id(use.node): use.node for use in value.uses()}
    return list(seen.values())


def sole_consumer(value: oir.Value, *op_types: str, domain: str = "") -> oir.Node | None:
    """The only reader of `value` when there is just one, it is one of `op_types`, and `value` is no graph output."""
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    (use,) = value.uses()
    return use.node if not op_types or is_op(use.node, *op_types, domain=domain) else None


def readers(value: oir.Value) -> list[oir.Node]:
    """`consumers` without those that only ask for its size."""
    return [node for node in consumers(value) if not is_op(node, "Shape", "Size")]


def sole_reader(value: oir.Value, *op_types: str) -> oir.Node | None:
    """`sole_consumer`, where nodes that only ask for the size of `value` do not count."""
    found = readers(value)
    if value.is_graph_output() or len(found) != 1 or sum(one is value for one in found[0].inputs) != 1:
        return None
    return found[0] if not op_types or is_op(found[0], *op_types) else None


def used_once(value: oir.Value) -> bool:
    """Whether exactly one input of one node reads `value` and it is no graph output."""
    return not value.is_graph_output() and len(value.uses()) == 1


def operand(node: oir.Node, *op_types: str) -> tuple[oir.Node, oir.Value] | None:
    """For a node of two inputs, the producer of one of them that is of `op_types`, and the other input."""
    if len(node.inputs) != 2:
        return None
    left, right = node.inputs
    for one, other in ((left, right), (right, left)):
        found = producer(one, *op_types)
        if found is not None and other is not None:
            return found, other
    return None


def with_constant(node: oir.Node) -> tuple[oir.Value, oir.Value] | None:
    """For a node of two inputs, (the computed input, the constant input), whichever side each is on; else None."""
    if len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if left is None or right is None or weights.is_constant(left) == weights.is_constant(right):
        return None
    return (right, left) if weights.is_constant(left) else (left, right)


def with_scalar(
    node: oir.Node, number: float | None = None, *, tolerance: float = 1e-6
) -> tuple[oir.Value, float] | None:
    """For a node of two inputs, (the computed input, the constant's number) when the constant has one element.

    Args:
        node: a node of two inputs, in either order.
        number: accept only this number.
        tolerance: relative, for `number`.
    """
    pair = with_constant(node)
    found = weights.scalar(pair[1]) if pair is not None else None
    if pair is None or found is None:
        return None
    if number is not None and abs(found - number) > tolerance * max(abs(number), 1e-30):
        return None
    return pair[0], found


def attribute(node: oir.Node, name: str, default: Any = None) -> Any:
    """The Python value of an attribute (float, int, str, tuples of them, Graph, tensor), or `default`."""
    found = node.attributes.get(name)
    if found is None or found.is_ref():
        return default
    return found.as_string() if found.type == oir.AttributeType.STRING else found.value


def input_of(node: oir.Node, index: int) -> oir.Value | None:
    """Input `index` of `node`, None when it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def axes_of(node: oir.Node) -> list[int] | None:
    """The axes of a Reduce*, Squeeze or Unsqueeze node, from its attribute or its constant input.

    Returns:
        The axes; `[]` when none are given; None when they are computed at run time.
    """
    found = attribute(node, "axes")
    if found is not None:
        return list(found)
    value = input_of(node, 1)
    return [] if value is None else weights.integers(value)


def tensor_dtype(value: oir.Value) -> oir.DataType | None:
    """The element type that a tensor is declared to have; None for sequences, optional values and undeclared ones."""
    return value.dtype if isinstance(value.type, oir.TensorType) else None


def rank(value: oir.Value | None) -> int | None:
    """The number of dimensions, None when unknown."""
    return None if value is None or value.shape is None else len(value.shape)


def dim(value: oir.Value | None, axis: int) -> int | None:
    """The size of one axis when it is a known number; `axis` may be negative."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def static_shape(value: oir.Value | None) -> tuple[int, ...] | None:
    """The shape when every dimension is a known number."""
    if value is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def is_zeros(value: oir.Value | None, *, largest: int = 1 << 22) -> bool:
    """Whether all elements are known to be 0, and not -0: a constant of up to `largest` elements, or one made so."""
    node = producer(value, "ConstantOfShape", "Expand")
    if node is not None and node.op_type == "ConstantOfShape":
        fill = attribute(node, "value")
        return fill is None or not fill.numpy().view(np.uint8).any()
    array = weights.constant(value if node is None else node.inputs[0], largest=largest)
    return array is not None and not np.ascontiguousarray(array).view(np.uint8).any()


def describe(node: oir.Node) -> str:
    """How messages and reports name a node."""
    return f"{node.op_type} `{node.name or (node.outputs[0].name if node.outputs else '?')}`"
