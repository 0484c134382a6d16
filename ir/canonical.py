"""A reading of a graph that depends neither on inner names nor on the order of independent nodes.

Nodes are visited from the outputs backwards, operands first and in order. Each value gets two hashes of how it is
computed from the inputs (a Merkle tree): one in which weights count by dtype and shape, and one in which their bytes
count too. The operands of a commutative operator count without their order, attributes with their default value not at
all. Names of inputs, outputs and dimensions, declared types and opsets are no part of either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import match, text
from burnish.ir.views.block_hash import COMMUTATIVE, defaults_of
from burnish.ir.walk import STANDARD_DOMAINS, bodies

_SHOWN = 8
_GRAPHS = (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS)
_TENSORS = (oir.AttributeType.TENSOR, oir.AttributeType.TENSORS)


@dataclass(frozen=True)
class Canonical:
    """The main graph of a model, read canonically.

    Attributes:
        nodes: all nodes, operands before their readers, in an order that names and the file do not influence; those
            that no output hangs on come last.
        structure: a hash of each value of the main graph, 16 hexadecimal digits; weights count by dtype and shape,
            small integers and single numbers by value too.
        full: likewise, with the bytes of all weights; empty when weights were not read.
        structure_fingerprint: of the whole model, 32 hexadecimal digits.
        full_fingerprint: likewise with the weights; empty when weights were not read.
    """

    nodes: tuple[oir.Node, ...]
    structure: dict[oir.Value, str]
    full: dict[oir.Value, str]
    structure_fingerprint: str
    full_fingerprint: str


def canonical(model: oir.Model, *, read_weights: bool = True) -> Canonical:
    """Read a model canonically; it is not changed, except that hashes of weights are kept with their tensors.

    Args:
        model: its graphs must be sorted, as those of a file that was read are.
        read_weights: compute the hashes with weights too.
    """
    structure = _Hashes(model, full=False)
    fingerprint = structure.fingerprint()
    full = _Hashes(model, full=True) if read_weights else None
    complete = full.fingerprint() if full is not None else ""
    known = {} if full is None else full.known
    return Canonical(tuple(order(model.graph, structure.known)), structure.known, known, fingerprint, complete)


def order(graph: oir.Graph, hashes: dict[oir.Value, str]) -> Iterator[oir.Node]:
    """The nodes of a graph, operands first, from its outputs backwards; then the others, by their hashes."""
    seen: set[oir.Node] = set()
    dead = [node for node in graph if not any(out.uses() or out.is_graph_output() for out in node.outputs)]
    dead.sort(key=lambda node: [hashes.get(out, "") for out in node.outputs])
    roots = [value.producer() for value in graph.outputs]
    for root in [*roots, *dead]:
        yield from _depth_first(root, graph, seen)


def _depth_first(root: oir.Node | None, graph: oir.Graph, seen: set[oir.Node]) -> Iterator[oir.Node]:
    if root is None or root in seen or root.graph is not graph:
        return
    seen.add(root)
    stack = [(root, _producers(root))]
    while stack:
        node, waiting = stack[-1]
        following = next((one for one in waiting if one not in seen and one.graph is graph), None)
        if following is None:
            stack.pop()
            yield node
        else:
            seen.add(following)
            stack.append((following, _producers(following)))


def _producers(node: oir.Node) -> Iterator[oir.Node]:
    """The nodes whose results a node reads, in its nested graphs too."""
    for value in reads(node):
        found = value.producer()
        if found is not None:
            yield found


def reads(node: oir.Node) -> Iterator[oir.Value]:
    """The values a node reads, in order, and those that its nested graphs read from outside."""
    yield from (value for value in node.inputs if value is not None)
    for body in bodies(node) if node.attributes else ():
        for inner in body:
            yield from reads(inner)
        yield from body.outputs


def tensor_text(tensor: oir.TensorProtocol) -> str:
    """Dtype and shape of a constant, with its values where these are structure: `float[64]`, `int64[2] [0, -1]`.

    Values are shown of integers and booleans of up to 8 elements and of single numbers.
    """
    whole = tensor.dtype.is_integer() or tensor.dtype == oir.DataType.BOOL
    shown = tensor.size <= (_SHOWN if whole else 1) and tensor.dtype != oir.DataType.STRING
    return f"{text.tensor_kind(tensor)} {text.elements(tensor)}" if shown else text.tensor_kind(tensor)


class _Hashes:
    """The hashes of all values of a model, computed on demand for functions and nested graphs."""

    def __init__(self, model: oir.Model, *, full: bool) -> None:
        self.model, self.full = model, full
        self.known: dict[oir.Value, str] = {}
        self.functions: dict[oir.OperatorIdentifier, str] = {}
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))

    def fingerprint(self) -> str:
        graph = self.model.graph
        nodes = self._graph(graph, "main")
        spare = sorted(
            self._tensor(value.const_value)
            for value in graph.initializers.values()
            if value.const_value is not None and not value.uses()
        )
        return _hash(nodes, [self.of(value) for value in graph.outputs], spare, size=16)

    def of(self, value: oir.Value | None) -> str:
        """The hash of a value whose producer was visited, or that has none."""
        if value is None:
            return "none"
        found = self.known.get(value)
        if found is None:
            tensor = value.const_value
            found = self.known[value] = "outside" if tensor is None else _hash("weight", self._tensor(tensor))
        return found

    def _graph(self, graph: oir.Graph, place: str) -> list[str]:
        """Hash all values of a graph; gives the sorted hashes of its nodes."""
        for index, value in enumerate(graph.inputs):
            default = "" if value.const_value is None else self._tensor(value.const_value)
            self.known[value] = _hash("input", place, index, default)
        found = []
        for node in graph:
            one = self._node(node)
            found.append(one)
            for index, out in enumerate(node.outputs):
                self.known[out] = _hash(one, index)
        return sorted(found)

    def _node(self, node: oir.Node) -> str:
        operands = [self.of(value) for value in node.inputs]
        if node.op_type in COMMUTATIVE and node.domain in STANDARD_DOMAINS:
            operands.sort()
        domain = "" if node.domain in STANDARD_DOMAINS else node.domain
        key = node.op_identifier()
        called = self._function(key) if key in self.model.functions else ""
        return _hash(domain, node.op_type, called, operands, self._attributes(node), len(node.outputs))

    def _function(self, key: oir.OperatorIdentifier) -> str:
        if key not in self.functions:
            self.functions[key] = "recursive"
            function = self.model.functions[key]
            nodes = self._graph(function.graph, "function")
            outputs = [self.of(value) for value in function.outputs]
            self.functions[key] = _hash(nodes, outputs, sorted(function.attributes))
        return self.functions[key]

    def _attributes(self, node: oir.Node) -> list[tuple[str, str]]:
        found = []
        for name, one in attributes(node, self.opset):
            if one.is_ref():
                shown = f"@{one.ref_attr_name}"
            elif one.type in _GRAPHS:
                graphs = [one.as_graph()] if one.type == oir.AttributeType.GRAPH else one.as_graphs()
                shown = _hash(*(self._body(graph, f"{name} {index}") for index, graph in enumerate(graphs)))
            elif one.type in _TENSORS:
                tensors = [one.value] if one.type == oir.AttributeType.TENSOR else one.value
                shown = _hash(*map(self._tensor, tensors))
            else:
                shown = attribute_text(one)
            found.append((name, shown))
        return found

    def _body(self, graph: oir.Graph, place: str) -> str:
        nodes = self._graph(graph, place)
        return _hash(nodes, [self.of(value) for value in graph.outputs])

    def _tensor(self, tensor: oir.TensorProtocol) -> str:
        return f"{tensor_text(tensor)} {text.weight_hash(tensor)}" if self.full else tensor_text(tensor)


def attributes(node: oir.Node, opset: int) -> Iterator[tuple[str, oir.Attr]]:
    """The attributes of a node by name, those left out that have the value that the operator has without them."""
    known = defaults_of(node.op_type, opset) if node.domain in STANDARD_DOMAINS else {}
    for name, one in sorted(node.attributes.items()):
        plain = not one.is_ref() and one.type not in (*_GRAPHS, *_TENSORS)
        if not (plain and name in known and known[name] == str(_plain(match.attribute(node, name)))):
            yield name, one


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def attribute_text(attribute: oir.Attr) -> str:
    """The value of an attribute that is no graph: as `burnish.ir.text` shows it; weights by dtype and shape."""
    return text.attribute_text(attribute, tensor_text)


def _hash(*parts: object, size: int = 8) -> str:
    return hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=size).hexdigest()
