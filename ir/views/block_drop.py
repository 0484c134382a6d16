"""Taking blocks out of a model: behind each the stream goes on as it was before it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.inference import reshape_target
from burnish.ir.views.block import Block, Structure
from burnish.ir.views.flow import SKIP_NORMS
from burnish.ir.views.norm import find_norm
from burnish.ir.views.parameter import same_shape
from burnish.ir.walk import is_op

_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")


def drop(model: oir.Model, structure: Structure, chosen: Iterable[Block]) -> None:
    """Take blocks out of the model, with the inputs and outputs of the graph that only they had.

    Where the size of a dropped cache is read elsewhere, it is read from the same cache of a kept block that is alike.
    The names of all other inputs and outputs stay; blocks are numbered anew by whoever wants that.

    Args:
        model: the model that `structure` was read from, unchanged since.
        structure: its blocks; out of date afterwards.
        chosen: blocks of it, in any order.

    Raises:
        ValueError: `obstacle` has a reason.
    """
    blocks = sorted(chosen, key=lambda block: block.index)
    reason = obstacle(structure, blocks)
    if reason is not None:
        raise ValueError(reason)
    kept = _kept(structure, blocks)
    for block in blocks:
        _release_cache(block, kept)
    for first, last in reversed(_ranges(blocks)):
        _bridge(model, first, last)
    for block in blocks:
        edit.remove_unused(block.nodes)
        for value in block.inputs:
            value.graph.inputs.remove(value)  # type: ignore[union-attr]


def obstacle(structure: Structure, chosen: Iterable[Block]) -> str | None:
    """Why these blocks cannot be dropped together, in plain words; None when they can.

    Args:
        structure: all blocks.
        chosen: blocks of it.
    """
    blocks = list(chosen)
    kept = _kept(structure, blocks)
    for block in blocks:
        if block.refusal is not None:
            return f"block {block.index} stays: {block.refusal}"
        for value in (*block.inputs, *block.outputs):
            if _measured(value, block) and twin(value, block, kept) is None:
                cause = f"the size of its cache `{value.name}` is read outside, and no kept block has one of that size"
                return f"block {block.index} stays: {cause}"
    blocks.sort(key=lambda block: block.index)
    for before, behind in zip(blocks, blocks[1:], strict=False):
        if before.exit is behind.entry and before.adders[1] is not None and _read_between(before, behind):
            return f"block {behind.index} stays: the sum before it, which a skip-normalization makes, is read elsewhere"
    return None


def _kept(structure: Structure, chosen: list[Block]) -> list[Block]:
    """The blocks that are not chosen."""
    indices = {block.index for block in chosen}
    return [block for block in structure.blocks if block.index not in indices]


def _ranges(blocks: list[Block]) -> list[tuple[Block, Block]]:
    """Blocks that follow each other, as (first, last), cut where the stream between two of them is read elsewhere."""
    found: list[tuple[Block, Block]] = []
    for block in blocks:
        if found and found[-1][1].exit is block.entry and not _read_between(found[-1][1], block):
            found[-1] = found[-1][0], block
        else:
            found.append((block, block))
    return found


def _read_between(before: Block, behind: Block) -> bool:
    """Whether something else than the second of two blocks reads the stream between them."""
    value, own = before.exit, {id(node) for node in (*behind.nodes, before.adders[1])}
    return value.is_graph_output() or any(id(node) not in own for node in match.consumers(value))


def _measured(value: oir.Value, block: Block) -> list[oir.Node]:
    """The nodes outside of a block that read the shape of its cache."""
    own = {id(node) for node in block.nodes}
    return [node for node in match.consumers(value) if id(node) not in own]


def twin(value: oir.Value, block: Block, kept: list[Block]) -> oir.Value | None:
    """The same cache of one of the kept blocks that is alike, declared to have the same sizes; None when there is none.

    Args:
        value: an input or output of the graph that `block` has for its state.
        block: the block.
        kept: blocks whose states stay.
    """
    own = block.inputs if value in block.inputs else block.outputs
    at = own.index(value)
    for other in kept:
        theirs = other.inputs if value in block.inputs else other.outputs
        if other.hash == block.hash and len(theirs) > at and _same_sizes(theirs[at], value):
            return theirs[at]
    return None


def _same_sizes(one: oir.Value, other: oir.Value) -> bool:
    return one.shape is not None and one.shape == other.shape and not one.shape.has_unknown_dim()


def _release_cache(block: Block, kept: list[Block]) -> None:
    for value in (*block.inputs, *block.outputs):
        other = twin(value, block, kept)
        for node in _measured(value, block):
            if other is not None:
                node.replace_input_with(node.inputs.index(value), other)
    for value in block.outputs:
        if value.graph is not None:
            value.graph.outputs.remove(value)


def _bridge(model: oir.Model, first: Block, last: Block) -> None:
    """Let what is behind `last` read what is before `first`."""
    before, behind = first.adders[0], last.adders[1]
    if behind is None:
        source = first.entry if before is None else _sum_of(model, before)
        edit.replace_value(last.exit, _in_shape(model, source, first, last))
    elif before is not None:
        old = [match.input_of(behind, index) for index in _terms(behind)]
        behind.resize_inputs(max(len(behind.inputs), _terms(behind)[-1] + 1))
        for to, index in zip(_terms(behind), _terms(before), strict=True):
            behind.replace_input_with(to, match.input_of(before, index))
        for value in old:
            if value is not None:
                edit.drop_if_unused(value)
    else:
        _write_plain_norm(model, first, behind)


def _in_shape(model: oir.Model, source: oir.Value, first: Block, last: Block) -> oir.Value:
    """`source` in the shape that the stream has behind `last`."""
    target, node = reshape_target(first.entry_shape, last.exit_shape), last.exit.producer()
    if first.entry_shape == last.exit_shape or target is None or node is None:
        return source
    sizes = edit.add_constant(model, f"{last.exit.name}_shape", np.array(target, np.int64))
    step = edit.make("Reshape", [source, sizes], like=node)
    edit.insert_before(node, [step])
    return same_shape(step, last.exit)


def _terms(node: oir.Node) -> tuple[int, int, int]:
    """The inputs of a skip-normalization that it adds up."""
    return 0, 1, 4 if node.op_type == SKIP_NORMS[0] else 3


def _sum_of(model: oir.Model, node: oir.Node) -> oir.Value:
    """The fourth output of a skip-normalization, made where it has none."""
    if len(node.outputs) < 4:
        node.resize_outputs(4)
    value = node.outputs[3]
    if not value.name:
        value.name = edit.unique_name(model, f"{node.outputs[0].name}_sum")
    return value


def _write_plain_norm(model: oir.Model, first: Block, behind: oir.Node) -> None:
    """The skip-normalization `behind` the dropped blocks without its sum, as the model spells such a norm."""
    rms = behind.op_type == SKIP_NORMS[1]
    reader = next((node for node in match.consumers(first.entry) if is_op(node, *_NORMS)), None)
    norm = find_norm(reader)
    if reader is not None and norm is not None and (norm.kind == "rms") == rms:
        op, axis = reader.op_type, match.attribute(reader, "axis")
    else:
        op, axis = "LayerNormalization" if not rms else "SimplifiedLayerNormalization", None
    inputs = [first.entry, behind.inputs[2], None if rms else match.input_of(behind, 3)]
    attributes = {"epsilon": match.attribute(behind, "epsilon", 1e-12), "axis": axis}
    new = edit.make(op, inputs, attributes, like=behind)
    if len(behind.outputs) > 3:
        edit.replace_value(behind.outputs[3], first.entry)
    edit.replace_node(behind, new)
