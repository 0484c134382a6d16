"""Taking one branch out of blocks: the attention or the mlp adds nothing to the stream any more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.block import Block, Structure
from burnish.ir.views.block_drop import twin
from burnish.ir.views.flow import SKIP_NORMS
from burnish.ir.walk import is_op
from burnish.passes.skip_norms import not_splittable, split


@dataclass(frozen=True)
class Branch:
    """A branch of a block that can go.

    Attributes:
        block: the block.
        result: what it adds to the stream.
        join: the node that adds it: an Add, or a skip-normalization.
        nodes: what goes with it, in order: all that nothing else needs.
        inputs, outputs: the graph's inputs and outputs that go with it: the old and new state of its cache.
    """

    block: Block
    result: oir.Value
    join: oir.Node
    nodes: tuple[oir.Node, ...]
    inputs: tuple[oir.Value, ...] = ()
    outputs: tuple[oir.Value, ...] = ()


def attention_of(block: Block) -> Branch | str | None:
    """The self-attention of a block with its cache, or why it has to stay; None when there is none."""
    part = block.part("attention")
    if part is None:
        return None
    result = part.result(first=True)
    if result is None:
        return "its attention is added together with something else"
    above = _above(block, result, part.entry)
    layers = [layer for layer in block.attention if layer.anchor in above]
    past = tuple(dict.fromkeys(value for layer in layers for value in layer.cache.past))
    present = tuple(dict.fromkeys(value for layer in layers for value in layer.cache.present))
    if set(past) != set(block.inputs) or set(present) != set(block.outputs):
        return "its block has states or outputs that are not the cache of its attention alone"
    return _branch(block, result, above, block.inputs, block.outputs)


def mlp_of(block: Block) -> Branch | str | None:
    """The mlp of a block, or its mixture of experts, or why it has to stay; None when there is none."""
    part = block.part("mlp", "moe")
    if part is None:
        return None
    result = part.result(first=False)
    if result is None:
        return "its mlp is added together with something else"
    return _branch(block, result, _above(block, result, part.entry), (), ())


def obstacle(structure: Structure, branches: Sequence[Branch]) -> str | None:
    """Why these branches cannot go together, in plain words; None when they can."""
    kept = _kept(structure, branches)
    for one in branches:
        for port in (*one.inputs, *one.outputs):
            if _measured(port, one) and twin(port, one.block, kept) is None:
                cause = f"the size of its cache `{port.name}` is read outside, and no other has one of that size"
                return f"the attention of block {one.block.index} stays: {cause}"
    return None


def drop_branches(model: oir.Model, structure: Structure, branches: Sequence[Branch]) -> None:
    """Let branches add nothing; what only they needed goes, with the inputs and outputs of the graph that they had.

    The norm behind the sum of a post-norm block stays, and what else is added with the branch.

    Args:
        model: changed in place.
        structure: its blocks; out of date afterwards.
        branches: of these blocks, for which `obstacle` has no reason.
    """
    kept = _kept(structure, branches)
    for one in branches:
        for port in (*one.inputs, *one.outputs):
            other = twin(port, one.block, kept)
            for node in _measured(port, one):
                if other is not None:
                    node.replace_input_with(node.inputs.index(port), other)
        for port in one.outputs:
            model.graph.outputs.remove(port)
    for one in branches:
        join, term = one.join, one.result
        if not is_op(join, "Add"):
            total = split(join).producer()
            assert total is not None
            join = total
            if term not in join.inputs:
                term = next(value for value in join.inputs if value is not None and _reads(value, term))
        others = [value for value in join.inputs if value is not term]
        edit.bypass(join, others[0])
        edit.remove_unused([node for node in one.nodes if node.graph is not None])
        for port in one.inputs:
            model.graph.inputs.remove(port)


def _reads(value: oir.Value, term: oir.Value) -> bool:
    node = value.producer()
    return node is not None and term in node.inputs


def _above(block: Block, result: oir.Value, entry: oir.Value) -> dict[oir.Node, None]:
    """The nodes of the block that the result of a branch is computed with, not looked for before the stream."""
    own, found, pending = set(block.nodes), dict[oir.Node, None](), [result]
    while pending:
        value = pending.pop()
        node = value.producer() if value is not entry else None
        if node is not None and node in own and node not in found:
            found[node] = None
            pending += [one for one in node.inputs if one is not None]
    return {node: None for node in block.nodes if node in found}


def _branch(
    block: Block,
    result: oir.Value,
    above: Iterable[oir.Node],
    inputs: tuple[oir.Value, ...],
    outputs: tuple[oir.Value, ...],
) -> Branch | str:
    readers = match.consumers(result)
    if len(readers) != 1 or result.is_graph_output() or list(readers[0].inputs).count(result) != 1:
        return "what it adds is read elsewhere too"
    join = readers[0]
    if is_op(join, *SKIP_NORMS, domain="com.microsoft"):
        reason = not_splittable(join)
        if reason is not None:
            return f"its stream is summed by a skip-normalization: {reason}"
        if result not in join.inputs[:2]:
            return "it is a bias of the skip-normalization behind it"
    elif not is_op(join, "Add"):
        return f"it is added by {match.describe(join)}"
    else:
        (other,) = (value for value in join.inputs if value is not result)
        if other is None or other.shape is None or other.shape != join.outputs[0].shape:
            return "what it is added to is not known to have the shape of the sum"
    nodes = _only(above, result, outputs)
    gone = set(nodes)
    for port in inputs:
        reader = next((one for one in match.consumers(port) if one not in gone and not is_op(one, "Shape")), None)
        if reader is not None:
            return f"{match.describe(reader)} reads its cache `{port.name}` too"
    return Branch(block, result, join, nodes, inputs, outputs)


def _only(above: Iterable[oir.Node], result: oir.Value, outputs: Sequence[oir.Value]) -> tuple[oir.Node, ...]:
    """Those of the nodes that nothing but the result and the branch's own outputs of the graph needs."""
    gone: set[oir.Node] = set()
    ordered = list(above)
    for node in reversed(ordered):
        used = [
            reader
            for out in node.outputs
            if out is not result
            for reader in match.consumers(out)
            if not (out in outputs and is_op(reader, "Shape"))
        ]
        given = any(out.is_graph_output() and out not in outputs for out in node.outputs)
        if not given and all(reader in gone for reader in used):
            gone.add(node)
    return tuple(node for node in ordered if node in gone)


def _kept(structure: Structure, branches: Sequence[Branch]) -> list[Block]:
    indices = {one.block.index for one in branches}
    return [block for block in structure.blocks if block.index not in indices]


def _measured(port: oir.Value, one: Branch) -> list[oir.Node]:
    """The nodes outside of a branch that read the shape of its cache."""
    return [node for node in match.consumers(port) if node not in set(one.nodes)]
