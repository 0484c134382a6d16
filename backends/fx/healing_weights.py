"""Which weights healing trains, found by the structure of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

import onnx_ir as oir
from torch import fx

from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.write_back import values_of
from burnish.ir import match, weights
from burnish.ir.errors import InputError
from burnish.ir.views.block import Block
from burnish.ir.views.embedding import Head, heads
from burnish.ir.views.linear import linears
from burnish.ir.views.parameter import find_parameter, write_input
from burnish.ir.walk import is_op

_MOVES = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Expand")

LAST = 3
"""Blocks at the end that `last` trains (Reassessing Layer Pruning in LLMs, arXiv:2411.15558)."""


def trainable(model: oir.Model, module: fx.GraphModule) -> dict[str, oir.Value]:
    """The weights that training may change, by their names in the module: what only makes angles is none."""
    values = values_of(model, bridge_of(module).weights)
    return {path: values[path] for path, _ in module.named_parameters() if not _turns_positions(values[path])}


def _turns_positions(value: oir.Value) -> bool:
    """Whether a weight is multiplied with whole numbers alone and ends in sines and cosines: a rotary frequency."""
    users = list(_users(value))
    return bool(users) and all(
        any(_counted(one) for one in user.inputs if one is not None) and _ends_in_angles(user.outputs[0], 12)
        for user in users
    )


def _counted(value: oir.Value) -> bool:
    """Whether a value is one of integers but for its dtype and shape."""
    while (node := match.producer(value, *_MOVES)) is not None and node.inputs[0] is not None:
        value = node.inputs[0]
        if value.dtype is not None and value.dtype.is_integer():
            return not weights.is_constant(value)
    return False


def _ends_in_angles(value: oir.Value, depth: int) -> bool:
    users = match.readers(value)
    return bool(users and depth) and all(
        is_op(user, "Sin", "Cos") or _ends_in_angles(user.outputs[0], depth - 1) for user in users
    )


def read_only_by(values: dict[str, oir.Value], nodes: Set[oir.Node]) -> set[str]:
    """The weights that no other nodes read, those left out that only rearrange them."""
    return {path for path, value in values.items() if (users := set(_users(value))) and users <= nodes}


def _users(value: oir.Value) -> Iterable[oir.Node]:
    for node in match.consumers(value):
        if find_parameter(node.outputs[0]) is not None:
            yield from _users(node.outputs[0])
        else:
            yield node


def tail(model: oir.Model, blocks: Sequence[Block]) -> set[oir.Node]:
    """The nodes of the last blocks and what is computed from them, such as the final norm and the head.

    Raises:
        InputError: the model has no blocks.
    """
    if not blocks:
        raise InputError("the model has no residual blocks, so there are no last ones to train", hint="use `train=all`")
    last = list(blocks)[-LAST:]
    found = {node for block in last for node in block.nodes}
    left = [last[-1].exit]
    while left:
        for node in match.consumers(left.pop()):
            if node not in found:
                found.add(node)
                left += list(node.outputs)
    return found


def untied(model: oir.Model) -> oir.Model:
    """A copy of the model in which every head that reads the table of an embedding has a table of its own.

    Raises:
        InputError: there is no such head.
    """
    copy = model.clone()
    tied = [head for head in heads(copy) if isinstance(head, Head) and head.tie == "tied"]
    if not tied:
        raise InputError("no head of the model is tied to an embedding", hint="leave out `untie`")
    for head in tied:
        layer = head.linear
        assert layer.parameter is not None and layer.dtype is not None
        name = f"{layer.parameter.source.name}_head"
        write_input(copy, layer.node, 1, layer.parameter.read(), layer.dtype, name)
    return copy


def matrices(
    model: oir.Model, module: fx.GraphModule, values: dict[str, oir.Value], blocks: Sequence[Block]
) -> list[str]:
    """The matrices of the linear layers of all blocks, or of the whole model where it has none."""
    inside = {node for block in blocks for node in block.nodes}
    sources = {
        layer.node.inputs[1] if layer.parameter is None else layer.parameter.source
        for layer in linears(model)
        if not blocks or layer.node in inside
    }
    return [path for path, value in values.items() if value in sources and module.get_parameter(path).dim() == 2]
