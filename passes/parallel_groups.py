"""Groups of blocks whose attentions read the state before the first of them (EasySpec's fuzzy groups)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.block import Block, Structure
from burnish.ir.views.flow import Flows
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.norm import Norm, find_norm, norms
from burnish.passes.depth_blocks import block_with, branch
from burnish.passes.projections import merge, mergeable
from burnish.passes.skip_norms import not_splittable, split


class Unsuited(Exception):
    """Blocks cannot run as a group, or their projections not as one, with the reason."""


@dataclass(frozen=True)
class Member:
    """A block of a group.

    Attributes:
        block: the block.
        norm: the norm of the stream that its attention reads; a skip-normalization where that adds up the stream.
        inside: the nodes of its attention, from the norm to the sum.
    """

    block: Block
    norm: Norm
    inside: tuple[oir.Node, ...]


class Groups:
    """Reads groups of blocks of one model, which must not be changed meanwhile."""

    def __init__(self, model: oir.Model) -> None:
        self.model = model
        self._norms: Mapping[oir.Value, Norm] = {norm.output: norm for norm in norms(model)}
        self._flows = Flows()

    def members(self, blocks: Sequence[Block]) -> list[Member]:
        """The blocks of a group, first to last.

        Raises:
            Unsuited: they do not follow each other on one stream, or one of them is no attention behind a norm and
                then an mlp.
        """
        for before, behind in zip(blocks, blocks[1:], strict=False):
            if before.exit is not behind.entry:
                raise Unsuited(f"blocks {before.index} and {behind.index} do not follow each other on one stream")
            if before.exit_shape is None or before.exit_shape != behind.exit_shape:
                raise Unsuited(f"block {behind.index} changes the shape of the stream")
        return [self._member(block) for block in blocks]

    def around(self, structure: Structure, name: str, site: str) -> Block:
        """An attention and the mlp that has the node of this name, as a block.

        Where branches near them are gone, the model may be read as blocks that begin and end elsewhere.

        Raises:
            InputError: there is no such node any more.
        """
        block = block_with(structure, name, site)
        parts = [part for one in structure.blocks for part in one.parts]
        own = [part for part in block.parts if any(node.name == name for node in branch(block, part))]
        pair = tuple(parts[max(parts.index(own[0]) - 1, 0) :][:2]) if own else block.parts
        if pair == block.parts or len(pair) < 2 or pair[0].exit is not pair[1].entry:
            return block
        ends = (self._flows.around(block.nodes[0]).step(value) for value in (pair[0].entry, pair[1].exit))
        first, last = (step.node if step is not None and step.part == "sum" else None for step in ends)
        return replace(block, parts=pair, adders=(first, last))

    def _member(self, block: Block) -> Member:
        if block.form == "post-norm":
            raise Unsuited(f"norms stand behind the sums of block {block.index}, not before its attention")
        if block.parallel or [part.kinds for part in block.parts] not in ([("attention",), ("mlp",)], _MIXTURE):
            raise Unsuited(f"block {block.index} is not an attention and then an mlp")
        source, adder = block.parts[0].source, block.adders[0]
        norm = self._norms.get(source) if source is not None else None
        reads = None if norm is None else norm.nodes[0] is adder or norm.input is block.entry
        if norm is None or not reads or norm.outside_reader is not None and norm.nodes[0] is not adder:
            raise Unsuited(f"the attention of block {block.index} reads no norm of the stream")
        if adder is not None and (reason := not_splittable(adder)):
            raise Unsuited(f"the state before block {block.index} is inside {match.describe(adder)}: {reason}")
        flow = self._flows.around(block.nodes[0])
        steps = flow.members(flow.between(norm.output, block.parts[0].exit))
        inside = tuple(step.node for step in steps if step.node is not None)
        outer = next((node for node in match.readers(norm.output) if node not in inside), None)
        if outer is not None or norm.output.is_graph_output():
            what = "an output of the model" if outer is None else match.describe(outer)
            raise Unsuited(f"{what} reads the norm before the attention of block {block.index}")
        return Member(block, norm, inside)


_MIXTURE = [("attention",), ("moe",)]


def joined(members: Sequence[Member]) -> list[list[Linear]]:
    """The layers that read the norm of each member, if all of them can be written as one.

    Raises:
        Unsuited: they cannot.
    """
    found: list[list[Linear]] = []
    kinds = set()
    for member in members:
        norm, place = member.norm, f"block {member.block.index}"
        if norm.kind not in ("rms", "layer") or norm.axes != (-1,):
            raise Unsuited(f"the norm before the attention of {place} is not one of the last axis")
        layers = []
        for node in match.consumers(norm.output):
            layer = find_linear(node)
            if layer is None or layer.input is not norm.output:
                raise Unsuited(f"{match.describe(node)} of {place} reads the norm and is no linear layer")
            reason = mergeable(layer)
            if reason is not None:
                raise Unsuited(f"{match.describe(node)} of {place} stays as it is: {reason}")
            kinds.add((norm.kind, norm.epsilon, norm.compute_dtype, node.op_type, layer.input_axis, layer.dtype))
            layers.append(layer)
        found.append(layers)
    if len(kinds) != 1:
        raise Unsuited("their norms or projections are not of one kind")
    return found


def rewire(model: oir.Model, members: Sequence[Member], layers: Sequence[Sequence[Linear]] | None) -> None:
    """Let the attentions of a group read the state before its first block.

    With the same input the norms share their statistics. So, on request, the gain and bias of each go into the
    projections behind it, and these, which read the same value then, become one product.

    Args:
        model: the model they were read from; views of these blocks are out of date afterwards.
        members: first to last.
        layers: what `joined` gives, to write it as one; None to leave it.
    """
    states, found = [], []
    for member in members:
        state, norm = member.block.entry, member.norm
        if member.block.adders[0] is not None:
            state = split(member.block.adders[0])
            norm = next(one for one in map(find_norm, match.consumers(state)) if one and _feeds(one, member))
        states.append(state)
        found.append(norm)
    for state, norm in zip(states[1:], found[1:], strict=True):
        for node in norm.nodes:
            for index, value in enumerate(node.inputs):
                if value is state:
                    node.replace_input_with(index, states[0])
    if layers is not None:
        _write_as_one(model, found, layers)


def _feeds(norm: Norm, member: Member) -> bool:
    return any(node in member.inside for node in match.readers(norm.output))


def _write_as_one(model: oir.Model, found: Sequence[Norm], layers: Sequence[Sequence[Linear]]) -> None:
    folded = []
    for norm, own in zip(found, layers, strict=True):
        size = own[0].in_features
        gain, offset = norm.gain(size), norm.offset(size)
        for layer in own:
            weight, bias = layer.weight(), layer.bias()
            if offset.any():
                bias = weight @ offset + (0.0 if bias is None else bias)
            new = layer.write(model, weight * gain, bias)
            new.node.replace_input_with(0, found[0].output)
            folded.append(new)
    _neutralize(model, found[0])
    edit.remove_unused([norm.nodes[-1] for norm in found[1:]])
    merge(model, folded)


def _neutralize(model: oir.Model, norm: Norm) -> None:
    """Let a norm have a gain of ones and a bias of zeros, in its own spelling."""
    for parameter, number in ((norm.scale, 1.0), (norm.bias, 0.0)):
        if parameter is None or parameter.dtype is None:
            continue
        for node in norm.nodes:
            if parameter.value in node.inputs:
                array = np.full(parameter.shape, number)
                new = edit.add_rounded(model, f"{parameter.source.name}_folded", array, parameter.dtype)
                edit.set_input(node, list(node.inputs).index(parameter.value), new)
