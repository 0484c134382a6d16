"""A model as a list of segments, each a list of lines: what a person compares two graphs by.

A segment is a block (`burnish.ir.views.blocks`) or what stands before, between and behind blocks. A line is a node with
its attributes and what it reads: producers by their operator, inputs of the model by name, those of functions and
nested graphs by number, weights by dtype and shape. Equal blocks have equal lines, whatever their names and wherever
they stand (the number in the name of an input that one block alone reads, as a cache is, becomes `N`), and a node that
comes in between changes the lines of its readers only. Constants are shown where they are read and have no line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import text, weights
from burnish.ir.canonical import (
    Canonical,
    Order,
    attribute_text,
    attributes,
    canonical,
    commutes,
    held,
    operator,
    opsets,
    reads,
    tensor_text,
)
from burnish.ir.views.block import Block
from burnish.ir.views.blocks import stacks

ENTRY = "entry"
"""How the lines of a block call the stream before it."""

_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
_Nodes = tuple[Block | None, list[oir.Node]]
_GRAPHS = (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS)


@dataclass(frozen=True)
class Line:
    """A node as text without names: `Add(MatMul, float[64])`, indented by two blanks for each graph around it."""

    text: str
    node: oir.Node


@dataclass(frozen=True)
class Segment:
    """Part of a model.

    Attributes:
        name: `block 7`, `before block 0`, `after block 7`; `graph` for a model without blocks, `function NAME`.
        block: the block that it is; None for the rest.
        lines: its nodes, operands before their readers.
        structure: a hash of its lines and of how they hang together, 16 hexadecimal digits.
        weights: a hash of the bytes of all constants that it reads, in the order of its lines; 16 hexadecimal digits.
    """

    name: str
    block: Block | None
    lines: tuple[Line, ...]
    structure: str
    weights: str


def segments(
    model: oir.Model, reading: Canonical | None = None, blocks: Iterable[Block] | None = None
) -> list[Segment]:
    """The segments of a model in canonical order, then one for each function.

    Args:
        model: the model; not changed.
        reading: of this model, where it was read already.
        blocks: of this model, where they were found already.
    """
    known = reading if reading is not None else canonical(model, read_weights=False)
    found = [one for one in (stacks(model).blocks if blocks is None else blocks) if _in_main_graph(one, model)]
    owner: dict[oir.Node, Block] = {}
    for block in found:
        for node in block.nodes:
            owner.setdefault(node, block)
    writer = _Writer(model, known, found)
    nodes = list(writer.order.of(model.graph))
    behind = _last_block(nodes, owner)
    parts: dict[str, _Nodes] = {}
    for node in nodes:
        own = owner.get(node)
        name = f"block {own.index}" if own is not None else _between(behind[node], bool(found))
        parts.setdefault(name, (own, []))[1].append(node)
    made = [writer.segment(name, block, nodes) for name, (block, nodes) in _in_order(parts)]
    for function in sorted(model.functions.values(), key=lambda one: one.identifier()):
        made.append(writer.segment(f"function {function.name}", None, list(writer.order.of(function.graph))))
    return [one for one in made if one.lines]


def _in_main_graph(block: Block, model: oir.Model) -> bool:
    return all(node.graph is model.graph for node in block.nodes)


def _last_block(nodes: Iterable[oir.Node], owner: Mapping[oir.Node, Block]) -> dict[oir.Node, int]:
    """The number of the last block that each node hangs on or is part of; -1 for none."""
    found: dict[oir.Node, int] = {}
    for node in nodes:
        producers = [one for value in reads(node) if (one := value.producer()) is not None]
        own = owner[node].index if node in owner else -1
        found[node] = max([own, *(found.get(one, -1) for one in producers)])
    return found


def _between(last: int, any_blocks: bool) -> str:
    return "graph" if not any_blocks else "before block 0" if last < 0 else f"after block {last}"


def _in_order(parts: dict[str, _Nodes]) -> list[tuple[str, _Nodes]]:
    def place(name: str) -> tuple[int, bool]:
        *_, number = name.split()
        return (-1, False) if not number.isdecimal() or name.startswith("before") else (int(number), name[0] == "a")

    return sorted(parts.items(), key=lambda item: place(item[0]))


class _Writer:
    """Writes nodes as lines."""

    def __init__(self, model: oir.Model, reading: Canonical, blocks: list[Block]) -> None:
        self.opset_of, self.inputs = opsets(model), set(model.graph.inputs)
        self.members: dict[int, frozenset[oir.Node]] = {}
        self.order = Order(reading.structure, self.opset_of, {block.entry for block in blocks})

    def segment(self, name: str, block: Block | None, nodes: list[oir.Node]) -> Segment:
        lines: list[Line] = []
        wiring, contents = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        numbers: dict[oir.Value, int] = {}
        graphs: dict[oir.Graph, None] = {}
        for line in (line for node in nodes for line in self._lines(node, block, ())):
            lines.append(line)
            graphs.update(dict.fromkeys(held(line.node)))
            operands = [value for value in self.order.operands(line.node) if value is not None]
            read = [numbers.setdefault(one, len(numbers)) for one in operands if not weights.is_constant(one)]
            made = [numbers.setdefault(out, len(numbers)) for out in line.node.outputs]
            ordered = sorted(read) if commutes(line.node) else read
            wiring.update(f"{line.text} {ordered} {made}\n".encode(errors="surrogatepass"))
            for tensor in filter(None, map(weights.tensor_of, operands)):
                contents.update(text.weight_hash(tensor).encode())
        for graph in graphs:
            wiring.update(f"{[numbers[value] for value in graph.outputs if value in numbers]}".encode())
        return Segment(name, block, tuple(lines), wiring.hexdigest(), contents.hexdigest())

    def _lines(self, node: oir.Node, block: Block | None, around: tuple[oir.Graph, ...]) -> Iterator[Line]:
        """The line of a node, unless it is a constant, and those of its nested graphs; `around`: innermost first."""
        if node.graph is None or (node.outputs and weights.is_constant(node.outputs[0])):
            return
        inside = (node.graph, *around)
        operands = [self._operand(value, block, inside) for value in self.order.operands(node)]
        if commutes(node):
            operands.sort()
        shown = f"{'  ' * len(around)}{operator(node)}({', '.join(operands)})"
        for name, one in attributes(node, self.opset_of(node.graph)):
            if not one.is_ref() and one.type in _GRAPHS:
                inner = [one.as_graph()] if one.type == oir.AttributeType.GRAPH else one.as_graphs()
                results = (self._operand(value, block, (body, *inside)) for body in inner for value in body.outputs)
                shown += f" {name}=({', '.join(results)})"
            else:
                shown += f" {name}={attribute_text(one)}"
        yield Line(shown, node)
        for body in held(node):
            for nested in self.order.of(body):
                yield from self._lines(nested, block, inside)

    def _operand(self, value: oir.Value | None, block: Block | None, inside: tuple[oir.Graph, ...]) -> str:
        if value is None:
            return "_"
        if block is not None and value is block.entry:
            return ENTRY
        tensor = weights.tensor_of(value)
        if tensor is not None:
            return tensor_text(tensor)
        node = value.producer()
        if node is not None:
            return operator(node) if len(node.outputs) == 1 else f"{operator(node)}.{value.index()}"
        if value in self.inputs:
            return self._input(value, block)
        levels = [level for level, graph in enumerate(inside) if value in graph.inputs]
        return f"{'outer ' * levels[0]}argument {inside[levels[0]].inputs.index(value)}" if levels else "outside"

    def _input(self, value: oir.Value, block: Block | None) -> str:
        """The name of an input; without the layer's number where one block alone reads it, such as its cache."""
        name = str(value.name)
        own = block is not None and all(use.node in self._nodes(block) for use in value.uses())
        return _NUMBER.sub("N", name) if own else name

    def _nodes(self, block: Block) -> frozenset[oir.Node]:
        if block.index not in self.members:
            self.members[block.index] = frozenset(block.nodes)
        return self.members[block.index]
