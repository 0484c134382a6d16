"""Which nodes of a model the kernels of ONNX Runtime do the work of.

ONNX Runtime rewrites a graph before it runs it, and its profile speaks of the nodes that came of that. What a rewrite
keeps is the names of values: the output of a fused node is named as that of the last node in it. So the two graphs are
laid side by side at the values they share, and a kernel has done the work of the nodes between its outputs and the
nearest shared values behind them. Where ONNX Runtime made up a value (in the blocked layout of its convolutions, for
one), the value is followed through nodes that only change layouts; where that leads nowhere, the kernels on both sides
of it share one row, since what each has done cannot be told apart.

For that every value needs a name of its own, which `labelled` gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as oir

from burnish.backends.ort.profiling import Kernel
from burnish.ir import match
from burnish.ir.functions import inline
from burnish.ir.network import reads
from burnish.ir.walk import graphs, is_op

_BLOCKED = "com.microsoft.nchwc"
_BLOCKED_SUFFIX = "_nchwc"
_ADDITIONS = ("Add", "Sum")


@dataclass(frozen=True)
class Share:
    """Kernels, and the nodes whose work they do together.

    Attributes:
        kernels: in the order in which they run; more than one where what each does cannot be told apart.
        nodes: nodes of the labelled model's main graph, in order; none for a kernel that ONNX Runtime put in between
            (to change a layout or an element type).
    """

    kernels: tuple[Kernel, ...]
    nodes: tuple[oir.Node, ...]

    @property
    def seconds(self) -> float:
        """Seconds of all its kernels, as the profile has them."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def events(self) -> float:
        """How often the profiler looked at a clock meanwhile."""
        return sum(kernel.events for kernel in self.kernels)

    @property
    def dtype(self) -> str:
        """NumPy's name of what its longest kernel multiplies."""
        longest = max(self.kernels, key=lambda kernel: kernel.seconds)
        eight_bit = longest.node.op_type == "DynamicQuantizeMatMul" or (
            longest.node.op_type == "MatMulNBits" and match.attribute(longest.node, "accuracy_level", 0) == 4
        )
        return "uint8" if eight_bit else longest.dtype


def labelled(model: oir.Model) -> tuple[oir.Model, dict[str, str]]:
    """A copy with a name of its own for every node and every computed value, and the old names by the new.

    Functions are inlined. Names of inputs, outputs and weights stay. A node that had no name goes by its first output.
    """
    copy = model.clone()
    inline(copy)
    names: dict[str, str] = {}
    kept = {id(value) for value in (*copy.graph.inputs, *copy.graph.outputs)}
    for graph in graphs(copy):
        for node in graph:
            label = f"burnish.node.{len(names)}"
            names[label] = node.name or next((str(value.name) for value in node.outputs if value.name), node.op_type)
            node.name = label
            for value in node.outputs:
                if value.name and id(value) not in kept:
                    label = f"burnish.value.{len(names)}"
                    names[label], value.name = value.name, label
    return copy, names


def restored(text: str, names: Mapping[str, str]) -> str:
    """A message about a labelled model, with the old names in it."""
    return re.sub(r"burnish\.(?:node|value)\.\d+", lambda label: names.get(label[0], label[0]), text)


def add_shapes(graph: oir.Graph, kernels: Sequence[Kernel]) -> bool:
    """Give values of a labelled graph the shapes that the kernels wrote, where it has none; says whether any did."""
    own = {value.name: value for node in graph for value in node.outputs if value.name}
    changed = False
    for kernel in kernels:
        outputs = [value for value in kernel.node.outputs if value.name]
        if len(outputs) != len(kernel.written):
            continue
        for value, (dtype, shape) in zip(outputs, kernel.written, strict=True):
            known = own.get(str(value.name))
            if known is not None and (known.shape is None or not known.shape.is_static()):
                known.type, known.shape = oir.TensorType(dtype), oir.Shape(shape)
                changed = True
    return changed


def shares(graph: oir.Graph, optimized: oir.Graph, kernels: Sequence[Kernel]) -> tuple[list[Share], list[oir.Node]]:
    """Every kernel with the nodes whose work it does, and the nodes that no kernel does the work of.

    The latter were computed before the run, or found not to be needed.

    Args:
        graph: the main graph of the labelled model that was run.
        optimized: the main graph that ONNX Runtime made of it.
        kernels: what ran.
    """
    same = _Same(graph, optimized)
    shared = {id(value) for value in same.values.values()}
    claimed: set[oir.Node] = set()
    position = {node: index for index, node in enumerate(graph)}
    found = []
    for group in _groups(optimized, kernels, same):
        given = {id(same.of(value)) for kernel in group for value in kernel.node.inputs if value is not None}
        made = [same.of(value) for kernel in group for value in kernel.node.outputs]
        nodes = _between([value for value in made if value is not None and id(value) not in given], shared, claimed)
        found.append(Share(tuple(group), tuple(sorted(nodes, key=position.__getitem__))))
    return found, [node for node in graph if node not in claimed and not is_op(node, "Constant")]


def _between(outputs: Iterable[oir.Value], shared: set[int], claimed: set[oir.Node]) -> list[oir.Node]:
    """The nodes behind `outputs` up to the next shared values, less those that others have claimed."""
    found = []
    pending = list(outputs)
    while pending:
        node = pending.pop().producer()
        if node is None or node in claimed:
            continue
        claimed.add(node)
        if not is_op(node, "Constant"):
            found.append(node)
        pending += [value for value in reads(node) if id(value) not in shared]
    return found


class _Same:
    """What values of the optimized graph are in the model, up to layout and element type."""

    def __init__(self, graph: oir.Graph, optimized: oir.Graph) -> None:
        own = [*graph.inputs, *(value for node in graph for value in node.outputs)]
        self.own = {value.name: value for value in own if value.name}
        self.nodes = {node.name: node for node in graph}
        self.values: dict[int, oir.Value] = {}
        nodes = list(optimized)
        for value in (*optimized.inputs, *(value for node in nodes for value in node.outputs)):
            if value.name in self.own:
                self.values[id(value)] = self.own[value.name]
        certain = set(self.values)
        for node in nodes:
            self._forward(node)
        for node in reversed(nodes):
            source = node.inputs[0] if node.inputs else None
            made = self.of(node.outputs[0])
            if self._moves(node) and source is not None and id(source) not in certain and made is not None:
                self.values[id(source)] = made

    def of(self, value: oir.Value | None) -> oir.Value | None:
        return self.values.get(id(value))

    def _moves(self, node: oir.Node) -> bool:
        """Whether ONNX Runtime put the node in to change a layout or an element type."""
        moves = node.op_type in ("ReorderInput", "ReorderOutput", "Transpose", "Cast")
        return moves and node.name not in self.nodes

    def _forward(self, node: oir.Node) -> None:
        """Say what the outputs of `node` are where their names do not."""
        twin = self.nodes.get(node.name)
        if twin is not None and twin.op_type == node.op_type:
            for value, own in zip(node.outputs, twin.outputs, strict=False):
                if value.name and own.name:
                    self.values.setdefault(id(value), own)
        if id(node.outputs[0]) in self.values:
            return
        found = self.of(node.inputs[0]) if self._moves(node) else self._blocked(node)
        if found is not None:
            self.values[id(node.outputs[0])] = found

    def _blocked(self, node: oir.Node) -> oir.Value | None:
        """The output of a node in the blocked layout, which is named after the output it had at first.

        After that it may have taken in an addition and an activation.
        """
        if node.domain != _BLOCKED or not (node.name or "").endswith(_BLOCKED_SUFFIX):
            return None
        value = self.own.get((node.name or "").removesuffix(_BLOCKED_SUFFIX))
        addend = match.input_of(node, 3)
        if value is not None and addend is not None:
            value = _added(value, self.of(addend))
        activation = match.attribute(node, "activation")
        if value is None or not activation or is_op(value.producer(), activation):
            return value
        users = [use.node for use in value.uses()]
        return users[0].outputs[0] if len(users) == 1 and is_op(users[0], activation) else None


def _added(value: oir.Value, addend: oir.Value | None) -> oir.Value | None:
    """The sum of two values, where the model has a node for it."""
    for use in value.uses():
        if is_op(use.node, *_ADDITIONS) and any(other is addend for other in use.node.inputs):
            return use.node.outputs[0]
    return None


def _groups(optimized: oir.Graph, kernels: Sequence[Kernel], same: _Same) -> list[list[Kernel]]:
    """The kernels, those together that are joined by a value of which it is not known what it is in the model."""
    by_node = {kernel.node: kernel for kernel in kernels}
    leader = {node: node for node in by_node}

    def find(node: oir.Node) -> oir.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in by_node:
        for value in node.outputs:
            if value.name and same.of(value) is None:
                for use in value.uses():
                    if use.node in leader:
                        leader[find(use.node)] = find(node)
    groups: dict[oir.Node, list[Kernel]] = {}
    for node in optimized:
        if node in by_node:
            groups.setdefault(find(node), []).append(by_node[node])
    return list(groups.values())
