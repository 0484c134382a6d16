"""Which parts of a model are compiled and which stay on ONNX Runtime: convex regions, as few as there can be.

A node that is refused stays on ONNX Runtime, and so do the readers of a value whose dtype or rank nothing proves. Every
other node may go either way. Nodes are put in stages that change sides in turns, each as early as what it reads allows:
there are then no more stages than some path through the model changes sides, all nodes of a stage are one region, and
running the stages in order is always possible. Vectors of proven sizes and constants are copied into every region that
reads them, for sizes have to be known where they are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx_ir as oir

from burnish.ir import dims, match, part, weights
from burnish.ir.dims import Dim
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.multiply_adds import MULTIPLY_ADDS
from burnish.ir.network import reads
from burnish.ir.walk import STANDARD_DOMAINS, is_op

Refuses = Callable[[oir.Node, Inference], "str | None"]
"""Why a node cannot be compiled; None when it can. It is asked with what is proven of the model that it stands in."""

SMALL = "too little to compute to be worth handing over"
LEAST = 6
"""A piece beside ONNX Runtime that multiplies no matrices is compiled if it has so many nodes that compute."""

_MOVES = frozenset(
    "Cast CastLike Concat ConstantOfShape Expand Flatten Gather Identity Range Reshape Shape Size Slice Split Squeeze"
    " Transpose Unsqueeze".split()
)
_HANDED = frozenset(
    (
        *(oir.DataType.FLOAT, oir.DataType.FLOAT16, oir.DataType.DOUBLE, oir.DataType.BOOL),
        *(oir.DataType.INT8, oir.DataType.INT16, oir.DataType.INT32, oir.DataType.INT64),
        *(oir.DataType.UINT8, oir.DataType.UINT16, oir.DataType.UINT32, oir.DataType.UINT64),
    )
)
"""Dtypes that pass between compiled code and ONNX Runtime without a copy."""


@dataclass(frozen=True)
class Region:
    """A part of a model.

    Attributes:
        kind: `tvm` when it may be compiled, `ort` when it stays on ONNX Runtime.
        nodes: its nodes, in the order of the model.
        copies: those of them that stand in other regions too: vectors of sizes and constants.
        inputs: what it reads from outside, weights left out.
        outputs: what it computes for others, copies left out.
        model: the region as a model of its own, whose inputs have the sizes that are proven, unknown ones new names.
        reasons: why nodes of it are not compiled.
    """

    kind: Literal["tvm", "ort"]
    nodes: tuple[oir.Node, ...]
    copies: frozenset[oir.Node]
    inputs: tuple[oir.Value, ...]
    outputs: tuple[oir.Value, ...]
    model: oir.Model
    reasons: Mapping[oir.Node, str] = field(default_factory=dict)


def partition(model: oir.Model, facts: Inference, refuses: Refuses) -> list[Region]:
    """The main graph in regions, in an order in which they can be run.

    Every node is in one region, copies in as many as read them. What no node computes, an input or a weight that is an
    output of the model, is in none.

    Args:
        model: in the normal form, sorted; left untouched.
        facts: what is proven of it.
        refuses: asked of every node in the model, and again in the region that it would be compiled in.

    Raises:
        InputError: an input has a value of its own, which callers may leave out.
    """
    given = next((value for value in model.graph.inputs if value.const_value is not None), None)
    if given is not None:
        raise InputError("an input with a value of its own cannot be compiled", place=f"input `{given.name}`")
    cutter = _Cutter(model, facts, refuses)
    while True:
        found = cutter.regions()
        reasons = cutter.second_thoughts(found)
        if not reasons:
            return found
        cutter.reasons.update(reasons)


class _Cutter:
    def __init__(self, model: oir.Model, facts: Inference, refuses: Refuses) -> None:
        self.model, self.facts, self.refuses = model, facts, refuses
        self.names = _Names(model, facts)
        self.place = {node: index for index, node in enumerate(model.graph)}
        self.copied = {node for node in self.place if self._is_copied(node)}
        self.own = [node for node in self.place if node not in self.copied]
        self.behind: dict[oir.Node, frozenset[oir.Node]] = {}
        for node in self.place:
            self.behind[node] = frozenset(self._copies_behind(node))
        self.reasons: dict[oir.Node, str] = {}
        glued: list[tuple[oir.Node, oir.Node]] = []
        for node in self.own:
            reason = self._refused(node, facts) or self._untyped(node)
            if reason is not None:
                self.reasons[node] = reason
            for value in reads(node):
                source = value.producer()
                if facts.dtype(value) is None and source in self.place:
                    assert source is not None
                    glued.append((source, node))
        self._group(glued)

    def _is_copied(self, node: oir.Node) -> bool:
        """Whether a node computes nothing but a constant or proven sizes, and no output of the model."""
        if any(out.is_graph_output() for out in node.outputs):
            return False
        return _holds(node) or _gives_sizes(node, self.facts)

    def _refused(self, node: oir.Node, facts: Inference) -> str | None:
        return None if _gives_sizes(node, facts) else self.refuses(node, facts)

    def _copies_behind(self, node: oir.Node) -> Iterable[oir.Node]:
        for value in reads(node):
            source = value.producer()
            if source in self.copied and source is not None:
                yield source
                yield from self.behind[source]

    def _untyped(self, node: oir.Node) -> str | None:
        for value in (*reads(node), *node.outputs):
            if not value.name or weights.is_constant(value):
                continue
            if self.facts.dtype(value) is None:
                return f"`{value.name}` is no tensor of a known dtype"
            if self.facts.shape(value) is None:
                return f"the rank of `{value.name}` is not proven"
        return None

    def _group(self, glued: list[tuple[oir.Node, oir.Node]]) -> None:
        """Groups of nodes that must be in one region, as a graph without cycles; mostly each is one node."""
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_nodes_from(self.own)
        for node in self.own:
            for value in self._needs(node):
                source = value.producer()
                if source in self.place:
                    graph.add_edge(source, node)
        graph.add_edges_from((reader, source) for source, reader in glued)
        self.groups: Any = nx.condensation(graph)
        self.order = list(nx.topological_sort(self.groups))
        self.group_of: dict[oir.Node, int] = self.groups.graph["mapping"]

    def _needs(self, node: oir.Node) -> dict[oir.Value, None]:
        """What a node and the copies behind it read that other nodes compute."""
        nodes = (node, *self.behind[node])
        found = {value: None for one in nodes for value in reads(one)}
        return {value: None for value in found if value.producer() not in self.copied}

    def regions(self) -> list[Region]:
        """The regions as the reasons are now."""
        while True:
            stages = self._stages()
            small = self._small(stages)
            if not small:
                break
            self.reasons.update(dict.fromkeys(small, SMALL))
        members: dict[int, list[oir.Node]] = {}
        for node in self.own:
            members.setdefault(stages[self.group_of[node]], []).append(node)
        return [self._region(members[stage]) for stage in sorted(members)]

    def _side(self, group: int) -> int:
        """1 for ONNX Runtime, 0 for what may be compiled."""
        members = self.groups.nodes[group]["members"]
        return int(len(members) > 1 or any(node in self.reasons for node in members))

    def _stages(self) -> dict[int, int]:
        """A stage for every group: even numbers when ONNX Runtime comes second, that of `_side` modulo 2."""
        sides = {group: self._side(group) for group in self.order}
        tried = [self._settled(self._earliest(sides, first), sides) for first in (0, 1)]
        return min(tried, key=lambda stages: (len(set(stages.values())), self._crossings(stages)))

    def _earliest(self, sides: Mapping[int, int], first: int) -> dict[int, int]:
        stages: dict[int, int] = {}
        for group in self.order:
            least = sides[group] ^ first
            for source in self.groups.predecessors(group):
                least = max(least, stages[source] + (sides[source] != sides[group]))
            stages[group] = least
        return stages

    def _settled(self, stages: dict[int, int], sides: Mapping[int, int]) -> dict[int, int]:
        """The same with groups moved to later stages of their side, where fewer values then cross."""
        for group in reversed(self.order):
            after = [stages[one] - (sides[one] != sides[group]) for one in self.groups.successors(group)]
            latest = min(after, default=stages[group])
            if latest <= stages[group]:
                continue
            sources = list(self.groups.predecessors(group))
            now = sum(stages[one] != stages[group] for one in sources) + (min(after) != stages[group])
            then = sum(stages[one] != latest for one in sources) + any(one != latest for one in after)
            if then < now:
                stages[group] = latest
        return stages

    def _crossings(self, stages: Mapping[int, int]) -> int:
        return sum(stages[a] != stages[b] for a, b in self.groups.edges)

    def _small(self, stages: Mapping[int, int]) -> list[oir.Node]:
        """Nodes that could be compiled, in pieces beside ONNX Runtime that are not worth it."""
        import networkx as nx

        small: list[oir.Node] = []
        compiled = [group for group in self.order if not self._side(group)]
        inner = self.groups.subgraph(compiled)
        same = nx.Graph((a, b) for a, b in inner.edges if stages[a] == stages[b])
        same.add_nodes_from(compiled)
        for piece in nx.connected_components(same):
            around = {
                one for group in piece for one in (*self.groups.predecessors(group), *self.groups.successors(group))
            }
            if not any(self._side(one) for one in around - piece):
                continue
            nodes = [node for group in piece for node in self.groups.nodes[group]["members"]]
            if not any(map(multiplies, nodes)) and sum(computes(node, self.facts) for node in nodes) < LEAST:
                small += nodes
        return small

    def _region(self, own: list[oir.Node]) -> Region:
        copies = frozenset(one for node in own for one in self.behind[node])
        nodes = tuple(sorted((*own, *copies), key=self.place.__getitem__))
        inside = set(nodes)
        made = {value for node in nodes for value in node.outputs}
        read = {
            value for node in nodes for value in reads(node) if value not in made and not weights.is_constant(value)
        }
        kept = {value for node in self.own if node not in inside for value in self._needs(node)}
        inputs = [value for value in self.model.graph.inputs if value in read]
        inputs += [value for node in self.place for value in node.outputs if value in read]
        mine = [value for node in own for value in node.outputs]
        outputs = [value for value in mine if value.is_graph_output() or value in kept]
        reasons = {node: self.reasons[node] for node in own if node in self.reasons}
        alone = self.names.declared(part.bounded(self.model, nodes, inputs, outputs), inputs, outputs)
        side = self._side(self.group_of[own[0]])
        return Region("ort" if side else "tvm", nodes, copies, tuple(inputs), tuple(outputs), alone, reasons)

    def second_thoughts(self, found: Iterable[Region]) -> dict[oir.Node, str]:
        """Why nodes of regions to be compiled cannot be, as they stand there."""
        reasons: dict[oir.Node, str] = {}
        for region in found:
            if region.kind != "tvm":
                continue
            reasons.update(self._not_handed(region))
            alone = Inference(region.model)
            kept = [node for node in region.nodes if not _holds(node)]
            lost: dict[oir.Node, str] = {}
            for node, original in zip(region.model.graph, kept, strict=True):
                reason = self._refused(node, alone)
                if reason is not None:
                    lost[original] = reason
            for node in region.nodes:
                behind = (lost[one] for one in self.behind[node] if one in lost)
                reason = lost.get(node) or next(behind, None)
                if reason is not None and node not in region.copies:
                    reasons[node] = reason
        return reasons

    def _not_handed(self, region: Region) -> dict[oir.Node, str]:
        reasons: dict[oir.Node, str] = {}
        for value in (*region.inputs, *region.outputs):
            dtype = self.facts.dtype(value)
            if dtype in _HANDED:
                continue
            named = "?" if dtype is None else dtype.name.lower()
            touched = [node for node in region.nodes if value in reads(node) or value in node.outputs]
            at = {node for node in touched if node not in region.copies}
            at |= {node for node in region.nodes if self.behind[node] & set(touched) and node not in region.copies}
            reasons |= dict.fromkeys(at, f"`{value.name}` of dtype {named} is not handed over")
        return reasons


class _Names:
    """Names of sizes between regions, equal where the sizes are proven equal."""

    def __init__(self, model: oir.Model, facts: Inference) -> None:
        self.facts = facts
        self.taken = {str(d.value) for v in model.graph.inputs for d in v.shape or () if isinstance(d, oir.SymbolicDim)}
        self.names: dict[Dim, str] = {dims.symbol(name): name for name in self.taken}

    def of(self, size: Dim) -> int | str:
        """A number, or a name that stands for this size alone."""
        if isinstance(size, int):
            return size
        if size not in self.names:
            wanted = str(size) if dims.is_named(size) else f"d{len(self.names)}"
            while wanted in self.taken:
                wanted += "_"
            self.taken.add(wanted)
            self.names[size] = wanted
        return self.names[size]

    def declared(self, made: oir.Model, inputs: Iterable[oir.Value], outputs: Iterable[oir.Value]) -> oir.Model:
        """A region's model with types and sizes of its ends, and its Constants as initializers."""
        for there, ends in ((made.graph.inputs, inputs), (made.graph.outputs, outputs)):
            for value, original in zip(there, ends, strict=True):
                dtype, shape = self.facts.dtype(original), self.facts.shape(original)
                if dtype is not None:
                    value.type = oir.TensorType(dtype)
                value.shape = None if shape is None else oir.Shape([self.of(size) for size in shape])
        for node in [node for node in made.graph if _holds(node)]:
            out = node.outputs[0]
            tensor = weights.tensor_of(out)
            assert tensor is not None
            held = oir.Value(
                name=out.name,
                type=oir.TensorType(tensor.dtype),
                shape=oir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
            oir.convenience.replace_all_uses_with(out, held)
            made.graph.remove(node, safe=True)
            made.graph.register_initializer(held)
        return made


def _holds(node: oir.Node) -> bool:
    """Whether a node is a Constant that can be an initializer."""
    return is_op(node, "Constant") and weights.is_constant(node.outputs[0]) and not node.outputs[0].is_graph_output()


def _gives_sizes(node: oir.Node, facts: Inference) -> bool:
    """Whether all that a node computes are proven sizes, which compiled code has without computing them."""
    found = [facts.integers(out) for out in node.outputs if out.name]
    return all(sizes is not None and all(map(dims.is_named, sizes)) for sizes in found)


def multiplies(node: oir.Node) -> bool:
    """Whether a node multiplies matrices or convolves."""
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    return (domain, node.op_type) in MULTIPLY_ADDS


def computes(node: oir.Node, facts: Inference) -> bool:
    """Whether a node does more than move elements, with more than one of them."""
    shape = facts.shape(node.outputs[0])
    return not is_op(node, *_MOVES) and (shape is None or dims.product(shape) != 1)


def summary(region: Region, most: int = 2) -> str:
    """Why a region is not compiled: the commonest reasons, with one node for each."""
    seen: dict[str, list[oir.Node]] = {}
    for node, reason in region.reasons.items():
        seen.setdefault(reason, []).append(node)
    ranked = sorted(seen.items(), key=lambda item: -len(item[1]))
    told = [f"{match.describe(nodes[0])}{_more(len(nodes))}: {reason}" for reason, nodes in ranked[:most]]
    rest = len(ranked) - most
    return "; ".join(told) + (f"; and {rest} more reason{'s' * (rest > 1)}" if rest > 0 else "")


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
