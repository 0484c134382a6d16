"""Blocks in another order, and again: each goes on from the one before it, wherever it stood."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.block import Block, Structure
from burnish.ir.views.cache import rename_ports
from burnish.ir.walk import bodies
from burnish.passes.depth_blocks import States, signature

_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Change:
    """What of a sequence of blocks is not as it was.

    Attributes:
        before: blocks in their old order, up to the first change.
        old: the blocks that stood between `before` and `behind`.
        new: the blocks that shall stand there.
        behind: blocks in their old order, to the end.
    """

    before: tuple[Block, ...]
    old: tuple[Block, ...]
    new: tuple[Block, ...]
    behind: tuple[Block, ...]

    @property
    def start(self) -> oir.Value:
        """The stream before the change."""
        return self.old[0].entry if self.old else self.before[-1].exit if self.before else self.behind[0].entry

    @property
    def end(self) -> oir.Value:
        """The stream behind what stood there."""
        return self.old[-1].exit if self.old else self.start


def change(structure: Structure, sequence: Sequence[Block]) -> Change:
    """The change that makes all blocks of `structure`, each of which is in it, to `sequence`."""
    blocks, wanted = structure.blocks, list(sequence)
    shorter = min(len(blocks), len(wanted))
    first = next((at for at in range(shorter) if blocks[at] is not wanted[at]), shorter)
    rest = shorter - first
    last = next((at for at in range(rest) if blocks[-1 - at] is not wanted[-1 - at]), rest)
    ends = len(blocks) - last, len(wanted) - last
    return Change(tuple(blocks[:first]), tuple(blocks[first : ends[0]]), tuple(wanted[first : ends[1]]),
                  tuple(blocks[ends[0] :]))  # fmt: skip


def why_not(structure: Structure, sequence: Sequence[Block]) -> str | None:
    """Why the blocks cannot follow each other like this, in plain words; None when they can; see `change`."""
    found = change(structure, sequence)
    seen = {*found.before, *found.old}
    for block in dict.fromkeys((*found.old, *found.new)):
        reason = _why_not_moved(block, found) or (_why_not_again(block) if sequence.count(block) > 1 else None)
        if reason is not None:
            return f"block {block.index} cannot come in another place: {reason}"
    streams = [(one.exit, other) for one, other in zip(found.old, found.old[1:], strict=False)]
    if found.behind:
        streams.append((found.end, found.behind[0]))
    for value, reader in streams:
        own = {*reader.nodes}
        if value is not reader.entry or value.is_graph_output():
            return f"block {reader.index} does not go on from the block before it alone"
        if any(node not in own for node in match.consumers(value)):
            return f"the stream before block {reader.index} is read elsewhere"
    if len({signature(block) for block in structure.blocks if block.inputs or block.outputs}) > 1 and seen:
        return "the blocks have states of several kinds, which cannot be named anew"
    return None


def _why_not_moved(block: Block, among: Change) -> str | None:
    if block.refusal is not None:
        return block.refusal
    if block.adders != (None, None):
        return "its stream is summed by a skip-normalization"
    others = [one for one in (*among.before[-1:], *among.old, *among.new, *among.behind[:1])]
    if block.entry_shape is None or any(one.entry_shape != block.entry_shape for one in others[1:] or others):
        return "the stream has another shape there"
    if block.entry_shape != block.exit_shape:
        return "it changes the shape of the stream"
    return None


def _why_not_again(block: Block) -> str | None:
    if any(True for node in block.nodes for _ in bodies(node)):
        return "it holds a branch or a loop"
    if block.read_outside:
        value, reader = block.read_outside[0]
        return f"{match.describe(reader)} outside reads its inner value `{value.name}`"
    return None


def arrange(model: oir.Model, structure: Structure, sequence: Sequence[Block]) -> None:
    """Let blocks follow each other; those that come again share their weights and get states of their own.

    Args:
        model: changed in place.
        structure: its blocks, all of them in the main graph and in `sequence`, for which `why_not` has no reason.
        sequence: the blocks in their new order.
    """
    states, found = States(model, structure), change(structure, sequence)
    names = _Names(states)
    outside = list(found.end.uses())
    last = structure.blocks[-1].nodes[-1]
    source, done = found.start, set(found.before)
    ports = [(block.inputs, block.outputs) for block in found.before]
    for block in found.new:
        before = source
        if block in done:
            nodes, inputs, outputs, source = _copied(model, block, before)
            last.graph.insert_after(last, nodes)  # type: ignore[union-attr]
            last = nodes[-1]
        else:
            own = set(block.nodes)
            for use in [use for use in block.entry.uses() if use.node in own]:
                use.node.replace_input_with(use.idx, before)
            inputs, outputs, source = block.inputs, block.outputs, block.exit
        done.add(block)
        ports.append((inputs, outputs))
    for use in outside:
        use.node.replace_input_with(use.idx, source)
    _return(model, found.end, source)
    ports += [(block.inputs, block.outputs) for block in found.behind]
    ports = [(inputs, outputs) for inputs, outputs in ports if inputs or outputs]
    wanted: dict[oir.Value, str] = {}
    for place, (inputs, outputs) in enumerate(ports):
        wanted.update(zip((*inputs, *outputs), names.at(model, place), strict=True))
    _reorder(model, ports, [(block.inputs, block.outputs) for block in states.stateful])
    rename_ports(model, {port: name for port, name in wanted.items() if port.name != name})
    model.graph.sort()
    states.note(sequence)


def _copied(
    model: oir.Model, block: Block, source: oir.Value
) -> tuple[list[oir.Node], tuple[oir.Value, ...], tuple[oir.Value, ...], oir.Value]:
    """Nodes like those of a block that read `source`, their own inputs and outputs of the graph, and their stream."""
    values: dict[oir.Value, oir.Value] = {block.entry: source}
    for port in block.inputs:
        name = edit.unique_name(model, str(port.name))
        values[port] = oir.Value(name=name, type=port.type, shape=port.shape)
        model.graph.inputs.append(values[port])
    nodes = []
    for node in block.nodes:
        nodes.append(edit.copied(node, values))
        values |= dict(zip(node.outputs, nodes[-1].outputs, strict=True))
    for port in block.outputs:
        values[port].name = edit.unique_name(model, str(port.name))
        model.graph.outputs.append(values[port])
    inputs, outputs = (tuple(values[port] for port in ports) for ports in (block.inputs, block.outputs))
    return nodes, inputs, outputs, values[block.exit]


def _return(model: oir.Model, old: oir.Value, new: oir.Value) -> None:
    """Let `new` be the output of the model that `old` was."""
    if old is new or not old.is_graph_output():
        return
    outputs = model.graph.outputs
    name = old.name
    outputs[list(outputs).index(old)] = new
    old.name = edit.unique_name(model, f"{name}_before")
    new.name, new.type, new.shape = name, old.type, old.shape


Ports = Sequence[tuple[tuple[oir.Value, ...], tuple[oir.Value, ...]]]


def _reorder(model: oir.Model, after: Ports, before: Ports) -> None:
    """Put the states of the blocks into the order of the blocks, as they were: block by block, or kind by kind."""
    for side, listed in ((0, model.graph.inputs), (1, model.graph.outputs)):
        own = {port for one in after for port in one[side]}
        if not own:
            continue
        old = [port for port in listed if any(port in one[side] for one in before)]
        by_block = old == [port for one in before for port in one[side]]
        if by_block:
            wanted = [port for one in after for port in one[side]]
        else:
            wanted = [one[side][at] for at in range(len(after[0][side])) for one in after if at < len(one[side])]
        first = min(index for index, port in enumerate(listed) if port in own)
        others = [port for port in listed if port not in own]
        listed[:] = [*others[:first], *wanted, *others[first:]]


class _Names:
    """The names of the states of blocks, continued where there are more blocks than names."""

    def __init__(self, states: States) -> None:
        self._known = [[str(port.name) for port in (*one.inputs, *one.outputs)] for one in states.stateful]

    def at(self, model: oir.Model, place: int) -> list[str]:
        """The names of the states at a place: as they are, or with the next number where the names count."""
        if place < len(self._known):
            return self._known[place]
        found = []
        for at, name in enumerate(self._known[-1]):
            first = self._known[0][at] if at < len(self._known[0]) else name
            found.append(_counted(first, name, len(self._known) - 1, place) or edit.unique_name(model, name))
        return found


def _counted(first: str, last: str, steps: int, place: int) -> str | None:
    """The name at `place` where `first` is the one at 0, `last` that at `steps`, and one number in them counts."""
    one, other = _NUMBER.split(first), _NUMBER.split(last)
    changed = [index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    if len(one) != len(other) or len(changed) != 1 or not one[changed[0]].isdigit():
        return None
    index = changed[0]
    if int(other[index]) - int(one[index]) != steps:
        return None
    return "".join([*one[:index], str(int(one[index]) + place).zfill(len(one[index])), *one[index + 1 :]])


def numbers(structure: Structure, wanted: str) -> list[int] | None:
    """The blocks of half-open ranges with + between them, as in `0:12+19:30`; None when that is no such list.

    An end that is left out is the first or the last block.
    """
    found: list[int] = []
    for one in wanted.split("+"):
        match_ = re.fullmatch(r"\s*(\d*):(\d*)\s*", one)
        if match_ is None:
            return None
        start, end = int(match_[1] or 0), int(match_[2] or len(structure.blocks))
        if not start < end <= len(structure.blocks):
            return None
        found += range(start, end)
    return found
