"""Parts of a model in float16: which nodes may compute in it, what it saves, and the casts where such a part ends.

Layers are chosen; nodes between them that only move or combine numbers follow where all floating point that they read
is in halves already, so that a cast is only made where a part begins or ends, and once for each value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.parameter import fits
from burnish.ir.walk import is_op
from burnish.passes.lossy import Savings

FOLLOWERS = (
    "Identity Reshape Flatten Transpose Squeeze Unsqueeze Expand Tile Slice Split Concat Gather Pad Where"
    " Add Sub Mul Div Neg Abs Min Max Clip Relu LeakyRelu PRelu Sigmoid Tanh Gelu Erf HardSigmoid HardSwish Softplus"
    " MaxPool AveragePool GlobalAveragePool GlobalMaxPool"
).split()
"""Operators that compute in halves beside a layer that does.

Sums over many numbers (norms, means) and exponentials (Softmax) are not among them: they lose digits, or overflow.
"""

_ONE_DTYPE = "MatMul Gemm Conv ConvTranspose Add Sub Mul Div Min Max Concat PRelu".split()
"""Operators all of whose inputs have one dtype."""

LIMITS = {oir.DataType.FLOAT16: (65504.0, 2.0**-14), oir.DataType.BFLOAT16: (3.39e38, 2.0**-126)}
"""The largest number, and the smallest that has all its digits."""

SMALL = 256
"""Elements below which a constant is not worth a Cast of its own."""


def floats(node: oir.Node) -> list[int]:
    """Which inputs of a node are float32.

    What operators of `com.microsoft` compute has no known dtype; where all inputs have one, it is that of the others.
    """
    kinds = [value.dtype if value is not None else oir.DataType.UNDEFINED for value in node.inputs]
    known = oir.DataType.FLOAT in kinds and is_op(node, *_ONE_DTYPE)
    return [index for index, kind in enumerate(kinds) if kind == oir.DataType.FLOAT or (kind is None and known)]


def unfit(node: oir.Node, dtype: oir.DataType) -> str | None:
    """Why the constants of a node cannot be stored in a dtype, in plain words; None when they can."""
    for index in floats(node):
        array = weights.exact(value) if (value := node.inputs[index]) is not None else None
        if array is None or fits(array, dtype):
            continue
        most, least = LIMITS[dtype]
        beyond = int((np.abs(array) > most).sum())
        small = int(((np.abs(array) < least) & (array != 0)).sum())
        name = dtype.name.lower()
        if beyond:
            return f"{beyond} of {array.size} numbers of its weight are beyond the range of {name}"
        return f"{small} of {array.size} numbers of its weight are too small for {name}, which drops their last digits"
    return None


def reach(model: oir.Model, chosen: Collection[oir.Node], safe: Collection[str]) -> set[oir.Node]:
    """Chosen nodes of the main graph, and those that follow them into halves.

    Args:
        model: the model.
        chosen: nodes of layers.
        safe: names of nodes whose outputs are known to stay in range; no other node follows.
    """
    allowed = [
        node
        for node in model.graph
        if node not in chosen and node.name in safe and is_op(node, *FOLLOWERS) and floats(node) and _typed(node)
    ]
    found = {*chosen, *allowed}
    while True:
        left = [node for node in allowed if node in found and not _follows(node, found)]
        if not left:
            return found
        found.difference_update(left)


def _typed(node: oir.Node) -> bool:
    """Whether all that a node computes is float32, and its constants fit into halves; tables are layers."""
    if is_op(node, "Gather") and weights.is_constant(node.inputs[0]):
        return False
    return all(value.dtype == oir.DataType.FLOAT for value in node.outputs if value.name != "") and not unfit(
        node, oir.DataType.FLOAT16
    )


def _follows(node: oir.Node, found: Collection[oir.Node]) -> bool:
    computed = False
    for index in floats(node):
        value = node.inputs[index]
        assert value is not None
        if weights.is_constant(value):
            if value.is_graph_output() or any(reader not in found for reader in match.consumers(value)):
                return False
        elif value.producer() not in found:
            return False
        else:
            computed = True
    return computed or any(reader in found for value in node.outputs for reader in match.consumers(value))


def savings(nodes: Collection[oir.Node], least: int = 0) -> Savings:
    """What constants of at least so many elements take less when these nodes read them in 16 bits.

    Those that others read as well are held twice.
    """
    read = {value for node in nodes for index in floats(node) if (value := node.inputs[index]) is not None}
    parameters = saved = 0
    for value in read:
        tensor = weights.tensor_of(value)
        if tensor is None or tensor.size < least:
            continue
        twice = value.is_graph_output() or any(reader not in nodes for reader in match.consumers(value))
        parameters -= tensor.size if twice else 0
        saved += (0 if twice else tensor.nbytes) - 2 * tensor.size
    return Savings(parameters, saved, 0)


def held_beside(group: Collection[oir.Node], nodes: Collection[oir.Node]) -> oir.Node | None:
    """A reader of a large constant of `group` that is none of `nodes`, so that halves would be held beside it."""
    read = {value for node in group for index in floats(node) if (value := node.inputs[index]) is not None}
    large = [value for value in read if (tensor := weights.tensor_of(value)) is not None and tensor.size >= SMALL]
    return next((reader for value in large for reader in match.consumers(value) if reader not in nodes), None)


def error(nodes: Collection[oir.Node], dtype: oir.DataType, least: int = 0) -> float:
    """The relative error of the constants of at least so many elements that nodes read, once they are in a dtype."""
    read = dict.fromkeys(value for node in nodes for index in floats(node) if (value := node.inputs[index]) is not None)
    held = [one for value in read if (one := weights.exact(value)) is not None and one.size >= least]
    apart = sum(float(((one.astype(dtype.numpy()) - one) ** 2).sum()) for one in held)
    whole = sum(float((one**2).sum()) for one in held)
    return (apart / whole) ** 0.5 if whole else 0.0


def write(model: oir.Model, nodes: Collection[oir.Node]) -> None:
    """Let nodes of the main graph compute in float16; whoever else reads their outputs gets them in float32.

    Args:
        model: the model.
        nodes: what `reach` gives.
    """
    half = oir.DataType.FLOAT16
    narrow: dict[oir.Value, oir.Value] = {}
    wanted = [(node, floats(node)) for node in model.graph if node in nodes]
    for node, indices in wanted:
        for index in indices:
            value = node.inputs[index]
            assert value is not None
            if value not in narrow:
                narrow[value] = _constant(model, value, half) or _cast(value, half, node)
            edit.set_input(node, index, narrow[value])
        for out in node.outputs:
            if out.dtype == oir.DataType.FLOAT and out.name != "":
                _widen(model, out, nodes)
                out.type = oir.TensorType(half)
                narrow[out] = out


def store(model: oir.Model, nodes: Iterable[oir.Node], dtype: oir.DataType) -> None:
    """Store constants of `SMALL` elements or more in 16 bits, each behind a Cast, which is computed in loading."""
    wide: dict[oir.Value, oir.Value] = {}
    for node in nodes:
        for index in floats(node):
            value = node.inputs[index]
            tensor = weights.tensor_of(value)
            if value is None or tensor is None or tensor.size < SMALL:
                continue
            if value not in wide:
                constant = _constant(model, value, dtype)
                assert constant is not None
                wide[value] = _cast(constant, oir.DataType.FLOAT, node)
            edit.set_input(node, index, wide[value])


def _constant(model: oir.Model, value: oir.Value, dtype: oir.DataType) -> oir.Value | None:
    tensor = weights.tensor_of(value)
    if tensor is None:
        return None
    return edit.add_constant(model, f"{value.name}_{dtype.name.lower()}", tensor.numpy().astype(dtype.numpy()))


def _cast(value: oir.Value, dtype: oir.DataType, reader: oir.Node) -> oir.Value:
    """A Cast of a value, behind what computes it or first in the graph of a reader."""
    node = edit.make("Cast", [value], {"to": dtype.value}, like=reader)
    node.outputs[0].type, node.outputs[0].shape = oir.TensorType(dtype), value.shape
    edit.insert_behind(value, [node], reader.graph)
    return node.outputs[0]


def _widen(model: oir.Model, out: oir.Value, nodes: Collection[oir.Node]) -> None:
    """Let all who read a value, but for some nodes, read it through a Cast to float32."""
    own = [(use.node, use.idx) for use in out.uses() if use.node in nodes]
    if len(own) == len(out.uses()) and not out.is_graph_output():
        return
    node = out.producer()
    assert node is not None
    name = out.name
    wide = _cast(out, oir.DataType.FLOAT, node)
    edit.replace_value(out, wide)
    if out.name is None:
        out.name = edit.unique_name(model, f"{name}_half")
    cast = wide.producer()
    assert cast is not None
    for reader, index in [(cast, 0), *own]:
        reader.replace_input_with(index, out)
