"""Finding the residual stream of a model: its blocks, and stacks of blocks that follow each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as oir

from burnish.ir import dims, match, weights
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference, reshape_target
from burnish.ir.views import grouping, residual
from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.block import Block, Part, Stack, Structure
from burnish.ir.views.block_hash import BlockHash
from burnish.ir.views.experts import Experts, find_experts
from burnish.ir.views.flow import Flow
from burnish.ir.views.kinds import cores, kinds, owned
from burnish.ir.views.norm import norms
from burnish.ir.views.residual import Residual
from burnish.ir.walk import is_op, main_graphs, walk

__all__ = ["Block", "Part", "Stack", "Structure", "stacks"]


_SIZES = (oir.DataType.INT64, oir.DataType.BOOL)
"""What sizes and masks are made of, not weights."""


def stacks(model: oir.Model, facts: Inference | None = None) -> Structure:
    """The blocks and stacks of a model, those in the branches of an If or the body of a loop included.

    Args:
        model: the model; not changed. Structure shows best in the normal form of `burnish.passes.recipes.NORMAL_FORM`.
        facts: what is proven of the model as it is.
    """
    known = facts if facts is not None else Inference(model)
    found: list[list[Block]] = []
    missing: list[str] = []
    layers, mixtures = list(attention_layers(model, known)), list(find_experts(model, known))
    for what, views in (("attention layer", layers), ("mixture of experts", mixtures)):
        misses = (one for one in views if isinstance(one, Miss))
        missing += [f"the {what} at {match.describe(one.anchor)}: {one.reason}" for one in misses]
    for graph in main_graphs(model):
        reader = _Reader(model, graph, known, layers, mixtures, sum(map(len, found)))
        found += reader.runs
        missing += reader.missing
    if not any(found):
        summed = any(node.op_type == "QLinearAdd" for node in walk(model))
        reason = "sums of integers are not read" if summed else "no sum adds to a value what matrices compute from it"
        missing.append(f"no residual stream: {reason}")
    letters: dict[str, str] = {}
    result = []
    for run in _apart(found, missing):
        for blocks in _stacked(run):
            for block in blocks:
                letters.setdefault(block.hash, _letter(len(letters)))
            result.append(Stack(tuple(blocks), "".join(letters[block.hash] for block in blocks)))
    return Structure(tuple(result), tuple(missing))


def _apart(runs: list[list[Block]], missing: list[str]) -> list[list[Block]]:
    """The runs without blocks that share nodes, which are named in `missing`: streams that read each other in turns."""
    owners: dict[oir.Node, int] = {}
    mixed: set[int] = set()
    for block in (block for run in runs for block in run):
        shared = {owners.setdefault(node, block.index) for node in block.nodes} - {block.index}
        mixed |= shared | ({block.index} if shared else set())
    if not mixed:
        return runs
    result: list[list[Block]] = []
    count = 0
    for run in runs:
        result.append([])
        for block in run:
            if block.index in mixed:
                result.append([])
                ends = f"`{block.entry.name}` to `{block.exit.name}`"
                missing.append(f"the sums from {ends}: another stream is computed with the same nodes")
            else:
                result[-1].append(replace(block, index=count))
                count += 1
    return [run for run in result if run]


def _letter(number: int) -> str:
    name = ""
    while number >= 0:
        name, number = chr(ord("A") + number % 26) + name, number // 26 - 1
    return name


def _stacked(run: list[Block]) -> list[list[Block]]:
    """A run of blocks, cut where the width or the kind of block changes."""
    result: list[list[Block]] = []
    previous: Block | None = None
    for block in run:
        same = (
            previous is not None
            and _roles(previous) == _roles(block)
            and (previous.hash == block.hash or len({_size(one) for one in _shapes(previous, block)}) == 1)
        )
        if not same:
            result.append([])
        result[-1].append(block)
        previous = block
    return result


def _shapes(previous: Block, block: Block) -> list[tuple[Dim, ...] | None]:
    return [previous.entry_shape, previous.exit_shape, block.exit_shape]


def _size(shape: tuple[Dim, ...] | None) -> Dim | None:
    return None if shape is None else dims.product(shape)


def _roles(block: Block) -> list[str]:
    return [grouping.role(part.kinds) for part in block.parts]


class _Reader:
    """Reads one graph."""

    def __init__(
        self,
        model: oir.Model,
        graph: oir.Graph,
        facts: Inference,
        layers: list[AttentionLayer | Miss],
        mixtures: list[Experts | Miss],
        first: int,
    ) -> None:
        self.flow, self.facts, self.graph = Flow(graph), facts, graph
        self.layers, self.mixtures = layers, mixtures
        self.routers = {one.anchor for one in mixtures}
        self.selves = {one.anchor for one in layers if isinstance(one, AttentionLayer) and not one.cross}
        self.missing: list[str] = []
        self._shapes: dict[oir.Value, tuple[Dim, ...]] = {}
        self.cores = cores(self.flow)
        found = residual.outermost(self.flow, residual.residuals(self.flow))
        self.taken = 0
        for one in found:
            self.taken |= one.region
        self.hashes = BlockHash(self.flow, facts, sum(1 << self.flow.source[one.join] for one in found))
        own_norms = (one for one in norms(model) if one.nodes[0].graph is graph) if found else ()
        light = residual.lights(self.flow, own_norms)
        self.runs: list[list[Block]] = []
        self._next = first
        for run in residual.runs(self.flow, found, light, facts):
            self.runs.append(self._blocks(run))
        self._say_what_is_missing(found)

    def _blocks(self, run: list[Residual]) -> list[Block]:
        parts = [self._kinds(one) for one in run]
        roles = [grouping.role(one) for one in parts]
        keys = [(one, residual.skeleton(self.flow, sums.region)) for one, sums in zip(parts, run, strict=True)]
        weight = [1 + 10 * (one.region & self.flow.contractions).bit_count() for one in run]
        return [self._block(run[begin:end], parts[begin:end]) for begin, end in grouping.group(keys, roles, weight)]

    def _kinds(self, one: Residual) -> tuple[str, ...]:
        nodes = owned(self.flow, one.region, one.entry, self.taken)
        inputs, outputs = self._ports(nodes, one.entry, one.exit)
        return kinds(self.flow, one, self.cores, self.routers, self.selves, bool(inputs and outputs))

    def _ports(
        self, nodes: dict[oir.Node, None], entry: oir.Value, exit: oir.Value
    ) -> tuple[tuple[oir.Value, ...], tuple[oir.Value, ...]]:
        """The graph's inputs that only these nodes compute with, and its outputs that they compute."""
        outputs = tuple(v for v in self.graph.outputs if v.producer() in nodes and v is not exit)
        types = {(v.dtype, match.rank(v)) for v in outputs}
        inputs = []
        for value in (one for one in self.graph.inputs if one is not entry):
            readers = list(_computing(value))
            if readers and all(one in nodes for one in readers) and (value.dtype, match.rank(value)) in types:
                inputs.append(value)
        return tuple(inputs), outputs

    def _block(self, run: list[Residual], parts: list[tuple[str, ...]]) -> Block:
        flow, entry, exit = self.flow, run[0].entry, run[-1].exit
        region = flow.between(entry, exit)
        nodes = owned(flow, region, entry, self.taken)
        inputs, outputs = self._ports(nodes, entry, exit)
        adders = self._adder(entry), self._adder(exit)
        outside = self._read_outside(nodes, adders[1], exit)
        own = [*flow.members(region), *(step for node in nodes if (step := flow.step(node.outputs[0])) is not None)]
        own = [step for step in own if not step.part or region >> flow.source[step.outputs[0]] & 1]
        read = {id(t): t for step in own for v in step.inputs if (t := weights.tensor_of(v)) is not None}
        form = "plain"
        if any("norm" in op for one in run for op in one.tail):
            form = "post-norm"
        elif any(adders):
            form = "skip-fused"
        elif all(set(one) == {"conv"} for one in parts):
            form = "cnn"
        shapes = self._shape(entry), self._shape_behind(run)
        index, self._next = self._next, self._next + 1
        return Block(
            index,
            tuple(self._part(one, of) for one, of in zip(run, parts, strict=True)),
            form,
            self._hash(entry, exit),
            tuple(sorted(nodes, key=lambda node: flow.source[node.outputs[0]])),
            sum(tensor.size for tensor in read.values() if tensor.size > 1 and tensor.dtype not in _SIZES),
            *shapes,
            inputs,
            outputs,
            outside,
            tuple(one for one in self.layers if isinstance(one, AttentionLayer) and one.anchor in nodes),
            tuple(one for one in self.mixtures if isinstance(one, Experts) and one.anchor in nodes),
            adders,
            self._refusal(run, shapes, inputs, outputs, outside),
        )

    def _adder(self, value: oir.Value) -> oir.Node | None:
        """The skip-normalization that adds up `value`."""
        step = self.flow.step(value)
        return step.node if step is not None and step.part == "sum" else None

    def _part(self, one: Residual, of: tuple[str, ...]) -> Part:
        flow = self.flow
        matrices = one.region & flow.contractions
        sources: dict[oir.Value, None] = {}
        for step in flow.members(matrices):
            index = flow.source[step.outputs[0]]
            if not flow.before[index] & matrices:
                stream = (v for v in step.data if v is one.entry or flow.depends(v, one.entry))
                sources.update(dict.fromkeys(self._before_moves(v, one.entry) for v in stream))
        results = one.terms
        if len(results) == 1 and "attention" in of and len(of) > 1 and not one.inner:
            total = flow.step(results[0])
            if total is not None and total.op == "Add" and len(total.data) == 2:
                results = total.data
        if len(results) > 1:
            ends = [core.end for core in self.cores if one.region >> core.end & 1]
            results = tuple(sorted(results, key=lambda v: not any(flow.before[flow.source[v]] >> e & 1 for e in ends)))
        inner = tuple(self._part(each, self._kinds(each)) for each in one.inner)
        return Part(of, one.entry, next(iter(sources)) if len(sources) == 1 else None, results, one.exit, inner)

    def _before_moves(self, value: oir.Value, entry: oir.Value) -> oir.Value:
        """What `value` is a rearrangement of, not looked for before `entry`."""
        while value is not entry and (step := self.flow.step(value)) is not None and step.op in residual.MOVES:
            value = step.data[0]
        return value

    def _shape_behind(self, run: list[Residual]) -> tuple[Dim, ...] | None:
        """The shape of the stream behind residual sums.

        `x + f(x)` has the shape of x, even where nothing is known of f, save on axes where x has size 1.
        """
        exit = run[-1].exit
        before, after = self._shape(run[0].entry), self._shape(exit)
        moved = any(op in residual.MOVES for one in run for op in one.tail)
        declared = exit.shape if exit.shape is not None else ()
        if after is None and before is not None and len(declared) == len(before):
            after = tuple(d if isinstance(d, int) else old for d, old in zip(declared, before, strict=True))
        if before is None or moved or any(one.projected for one in run) or (1 in before and after != before):
            return after
        if after is not None and len(after) != len(before):
            return after
        for old, new in zip(before, after or before, strict=True):
            if old != new and isinstance(old, int) and isinstance(new, int):
                return after
        self._shapes[exit] = before
        return before

    def _shape(self, value: oir.Value) -> tuple[Dim, ...] | None:
        if value in self._shapes:
            return self._shapes[value]
        return next((shape for one in self._summed(value) if (shape := self.facts.shape(one)) is not None), None)

    def _dtype(self, value: oir.Value) -> oir.DataType | None:
        return next((dtype for one in self._summed(value) if (dtype := self.facts.dtype(one)) is not None), None)

    def _summed(self, value: oir.Value) -> tuple[oir.Value, ...]:
        """`value`, and where a skip-normalization adds it up the terms, which have its shape."""
        step = self.flow.step(value)
        return (value, *step.data) if step is not None and step.part == "sum" else (value,)

    def _hash(self, entry: oir.Value, exit: oir.Value) -> str:
        """The hash of the block without rearrangements at its ends, which may belong to the block before or behind."""
        while (last := self.flow.step(exit)) is not None and last.op in residual.MOVES and last.data:
            exit = last.data[0]
        while True:
            region = self.flow.between(entry, exit)
            readers = [step for step in self.flow.members(region) if entry in step.data]
            if len(readers) != 1 or readers[0].op not in residual.MOVES:
                return self.hashes.of(region, entry, exit)
            entry = readers[0].outputs[0]

    def _read_outside(
        self, nodes: dict[oir.Node, None], adder: oir.Node | None, exit: oir.Value
    ) -> tuple[tuple[oir.Value, oir.Node], ...]:
        """Inner values that nodes of the graph outside read, each with one of these; `adder` adds up the exit."""
        found = []
        for value in (out for node in nodes for out in node.outputs if out is not exit):
            readers = (user for user in match.consumers(value) if user.graph is self.graph)
            reader = next((user for user in readers if user not in nodes and user is not adder), None)
            if reader is not None:
                found.append((value, reader))
        return tuple(found)

    def _refusal(
        self,
        run: list[Residual],
        shapes: tuple[tuple[Dim, ...] | None, tuple[Dim, ...] | None],
        inputs: tuple[oir.Value, ...],
        outputs: tuple[oir.Value, ...],
        outside: tuple[tuple[oir.Value, oir.Node], ...],
    ) -> str | None:
        entry, exit = run[0].entry, run[-1].exit
        before, after = shapes
        if before is None or after is None:
            return "the shape of the stream is not known"
        if before != after and not (_reshaped(run) and reshape_target(before, after) is not None):
            return f"{self._why_shapes_differ(run)}: {_spelled(before)} becomes {_spelled(after)}"
        if any(one.projected for one in run):
            return "its shortcut computes something of its own"
        if len({self._dtype(entry), self._dtype(exit), None}) > 2:
            return "the stream has another dtype behind it"
        if len(outputs) != len(inputs) or not all(any(self.flow.depends(v, i) for i in inputs) for v in outputs):
            names = ", ".join(f"`{value.name}`" for value in outputs)
            return f"it computes outputs of the graph that are no state: {names}"
        for value, reader in outside:
            if not is_op(reader, "Shape", "Size"):
                return f"{match.describe(reader)} outside reads its inner value `{value.name}`"
            if value not in outputs and any(self.flow.depends(value, port) for port in inputs):
                return f"the size of its inner value `{value.name}`, which its cache changes, is read outside"
        return None

    def _why_shapes_differ(self, run: list[Residual]) -> str:
        joined = self.flow.step(run[0].entry)
        if joined is not None and joined.op == "Concat":
            return "a skip connection is concatenated before it, and it narrows the result"
        return "its shortcut changes the shape" if any(one.projected for one in run) else "it changes the shape"

    def _say_what_is_missing(self, found: list[Residual]) -> None:
        inside = 0
        for one in found:
            inside |= one.region
        for core in self.cores:
            if not inside >> core.end & 1:
                node = self.flow.steps[core.end].node
                if node is not None:
                    self.missing.append(f"the attention at {match.describe(node)} adds to no residual stream")


def _reshaped(run: list[Residual]) -> bool:
    """Whether the stream may come out in another shape because it was reshaped, and for no other reason."""
    moves = {op for one in run for op in one.tail if op in residual.MOVES}
    return bool(moves) and moves <= set(residual.RESHAPES) and not any(one.projected for one in run)


def _computing(value: oir.Value) -> Iterator[oir.Node]:
    """The nodes that compute with `value`, those left out that only pass it on or ask for its shape."""
    for node in match.consumers(value):
        if is_op(node, "Identity") or (is_op(node, "Concat") and len(node.inputs) == 1):
            yield from _computing(node.outputs[0])
        elif not is_op(node, "Shape", "Size"):
            yield node


def _spelled(shape: tuple[Dim, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
