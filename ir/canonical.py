"""A reading of a graph that depends neither on inner names nor on the order of independent nodes.

Each value gets two hashes of how it is computed from the inputs (a Merkle tree): one in which weights count by dtype
and shape, and one in which their bytes count too. The operands of a commutative operator count without their order,
attributes with their default value not at all. The fingerprint of a model is made of the hashes of all nodes and how
often they are read, of the outputs, and of all initializers, used or not: computing or storing the same once is not the
same as doing so twice. Names of inputs, outputs and dimensions, declared types and opsets are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cmp_to_key

import numpy as np
import onnx_ir as oir

from burnish.ir import match, text, weights
from burnish.ir.views.block_hash import COMMUTATIVE, defaults_of
from burnish.ir.walk import STANDARD_DOMAINS, bodies, graphs

_SHOWN = 8
_GRAPHS = (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS)
_TENSORS = (oir.AttributeType.TENSOR, oir.AttributeType.TENSORS)
_NEAR = 8
"""How many nodes back operands of equal depth of a commutative operator are told apart, before all that is behind."""


@dataclass(frozen=True)
class Canonical:
    """A model, read canonically.

    Attributes:
        structure: a hash of each value that a node computes or a graph is given, 16 hexadecimal digits; weights count
            by dtype and shape, small integers and single numbers by value too.
        full: likewise, with the bytes of all weights; empty when weights were not read.
        structure_fingerprint: of the whole model, 32 hexadecimal digits.
        full_fingerprint: likewise with the weights; empty when weights were not read.
    """

    structure: dict[oir.Value, str]
    full: dict[oir.Value, str]
    structure_fingerprint: str
    full_fingerprint: str


def canonical(model: oir.Model, *, read_weights: bool = True) -> Canonical:
    """Read a model canonically; it is not changed, except that hashes of weights are kept with their tensors.

    Args:
        model: nothing in it may depend on itself; the order of its nodes does not matter.
        read_weights: compute the hashes with weights too.
    """
    structure = _Hashes(model, full=False)
    fingerprint = structure.fingerprint()
    full = _Hashes(model, full=True) if read_weights else None
    complete = full.fingerprint() if full is not None else ""
    return Canonical(structure.known, {} if full is None else full.known, fingerprint, complete)


class Order:
    """An order of nodes that neither names nor the file influence.

    From the outputs of a graph backwards, operands first and in order. Those of a commutative operator stand by what
    hardly ever changes, so that a small change does not turn them around: the one with more nodes in a row behind it
    first, then by the nearest nodes that tell them apart. Where these and the hashes agree, they stand as in the file.

    Args:
        hashes: of the values (`Canonical.structure`).
        opset_of: the version of the standard operators in a graph.
        entries: values that count as the same one: the stream before each block.
    """

    def __init__(
        self, hashes: dict[oir.Value, str], opset_of: Callable[[oir.Graph], int], entries: Collection[oir.Value] = ()
    ) -> None:
        self._hashes, self._opset_of, self._entries = hashes, opset_of, entries
        self._known: dict[tuple[oir.Value, int], str] = {}
        self._depths: dict[oir.Value, int] = {}
        self._key = cmp_to_key(self._compare)
        self._captured: dict[oir.Graph, list[oir.Value]] = {}

    def of(self, graph: oir.Graph) -> Iterator[oir.Node]:
        """All nodes of a graph; those that no output hangs on come last."""
        for node in _operands_first(graph, graph, reads):
            depth = 1 + max((self._depth(value) for value in reads(node)), default=0)
            self._depths.update((out, 0 if out in self._entries else depth) for out in node.outputs)
        roots = [one for one in (value.producer() for value in graph.outputs) if one is not None]
        dead = [node for node in graph if not any(out.uses() or out.is_graph_output() for out in node.outputs)]
        dead.sort(key=lambda node: self._key(node.outputs[0]) if node.outputs else self._key(None))
        yield from _operands_first([*roots, *dead], graph, self._reads)

    def operands(self, node: oir.Node) -> list[oir.Value | None]:
        """The inputs of a node up to the last given one; in canonical order where theirs does not count."""
        found = _given(node)
        return sorted(found, key=self._key) if commutes(node) else found

    def _reads(self, node: oir.Node) -> Iterator[oir.Value]:
        yield from (value for value in self.operands(node) if value is not None)
        for body in held(node):
            if body not in self._captured:
                read = [value for inner in self.of(body) for value in self._reads(inner)]
                outside = (one for one in [*read, *body.outputs] if not _made_in(one, body))
                self._captured[body] = list(dict.fromkeys(outside))
            yield from self._captured[body]

    def _compare(self, one: oir.Value | None, other: oir.Value | None) -> int:
        if one is other:
            return 0
        if (difference := self._depth(other) - self._depth(one)) != 0:
            return difference
        keys = ((self._near(one, depth), self._near(other, depth)) for depth in range(_NEAR))
        first, second = next((pair for pair in keys if pair[0] != pair[1]), (self._whole(one), self._whole(other)))
        return (first > second) - (first < second)

    def _depth(self, value: oir.Value | None) -> int:
        return 0 if value is None else self._depths.get(value, 0)

    def _whole(self, value: oir.Value | None) -> str:
        return "" if value is None else self._hashes.get(value, "")

    def _near(self, value: oir.Value | None, depth: int) -> str:
        """A hash of the last `depth` nodes that a value is computed with."""
        if value is None or value in self._entries:
            return "none" if value is None else "entry"
        found = self._known.get((value, depth))
        if found is None:
            found = self._known[value, depth] = self._nearby(value, depth)
        return found

    def _nearby(self, value: oir.Value, depth: int) -> str:
        tensor, node = weights.tensor_of(value), value.producer()
        if tensor is not None:
            return tensor_text(tensor)
        if node is None or node.graph is None:
            return self._hashes.get(value, "")
        if depth == 0:
            return f"{operator(node)}.{value.index()}"
        read = [self._near(one, depth - 1) for one in _given(node)]
        opset = self._opset_of(node.graph)
        plain = [(name, attribute_text(one)) for name, one in attributes(node, opset) if not _holds_graphs(one)]
        return _hash(operator(node), value.index(), sorted(read) if commutes(node) else read, plain)


def _operands_first(
    roots: Iterable[oir.Node], graph: oir.Graph, reads: Callable[[oir.Node], Iterable[oir.Value]]
) -> Iterator[oir.Node]:
    """The nodes of a graph that some nodes hang on, and these, each behind those whose results it reads."""
    seen: set[oir.Node] = set()

    def producers(node: oir.Node) -> Iterator[oir.Node]:
        made = (value.producer() for value in reads(node))
        return (one for one in made if one is not None and one.graph is graph)

    for root in roots:
        if root in seen or root.graph is not graph:
            continue
        seen.add(root)
        stack = [(root, producers(root))]
        while stack:
            node, waiting = stack[-1]
            following = next((one for one in waiting if one not in seen), None)
            if following is None:
                stack.pop()
                yield node
            else:
                seen.add(following)
                stack.append((following, producers(following)))


def _made_in(value: oir.Value, graph: oir.Graph) -> bool:
    node = value.producer()
    return value.graph is graph if node is None else node.graph is graph


def reads(node: oir.Node) -> Iterator[oir.Value]:
    """The values a node reads and those that its nested graphs read, in the order of the file."""
    yield from (value for value in node.inputs if value is not None)
    for body in bodies(node) if node.attributes else ():
        for inner in body:
            yield from reads(inner)
        yield from body.outputs


def held(node: oir.Node) -> list[oir.Graph]:
    """The graphs nested directly in a node, in the order of the attributes' names."""
    found: list[oir.Graph] = []
    for _, one in sorted(node.attributes.items()):
        if one.type in _GRAPHS and not one.is_ref():
            found += [one.as_graph()] if one.type == oir.AttributeType.GRAPH else one.as_graphs()
    return found


def tensor_text(tensor: oir.TensorProtocol) -> str:
    """Dtype and shape of a constant, with its values where these are structure: `float[64]`, `int64[2] [0, -1]`.

    Values are shown of integers and booleans of up to 8 elements and of single numbers.
    """
    whole = tensor.dtype.is_integer() or tensor.dtype == oir.DataType.BOOL
    shown = tensor.size <= (_SHOWN if whole else 1) and tensor.dtype != oir.DataType.STRING
    return f"{text.tensor_kind(tensor)} {text.elements(tensor)}" if shown else text.tensor_kind(tensor)


def operator(node: oir.Node) -> str:
    """The operator of a node, with its domain unless that is the standard one."""
    domain = "" if node.domain in STANDARD_DOMAINS else f"{node.domain}."
    return f"{domain}{node.op_type}"


def commutes(node: oir.Node) -> bool:
    """Whether the order of a node's operands does not count."""
    return node.op_type in COMMUTATIVE and node.domain in STANDARD_DOMAINS


def opsets(model: oir.Model) -> Callable[[oir.Graph], int]:
    """What tells the version of the standard operators in a graph of a model: that of its function, or the model's."""
    own: dict[oir.Graph, int] = {}
    for function in model.functions.values():
        inside = [function.graph]
        for graph in inside:
            own[graph] = _standard(function.opset_imports)
            inside += [body for node in graph if node.attributes for body in bodies(node)]
    general = _standard(model.opset_imports)
    return lambda graph: own.get(graph) or general


def _standard(imports: dict[str, int]) -> int:
    return imports.get("", imports.get("ai.onnx", 0))


def _given(node: oir.Node) -> list[oir.Value | None]:
    """The inputs of a node up to the last one that is given."""
    found = list(node.inputs)
    while found and found[-1] is None:
        found.pop()
    return found


class _Hashes:
    """The hashes of all values of a model."""

    def __init__(self, model: oir.Model, *, full: bool) -> None:
        self.model, self.full = model, full
        self.known: dict[oir.Value, str] = {}
        self.functions: dict[oir.OperatorIdentifier, str] = {}
        self.opset_of = opsets(model)

    def fingerprint(self) -> str:
        for key in _callees_first(self.model):
            self.functions[key] = self._function(self.model.functions[key])
        main = self._graph(self.model.graph, "main")
        values = (value for graph in graphs(self.model) for value in graph.initializers.values())
        stored = [(one.const_value, len(one.uses())) for one in values]
        weighed = sorted((self._tensor(tensor), uses) for tensor, uses in stored if tensor is not None)
        return _hash(main, weighed, sorted(self.functions.values()), size=16)

    def of(self, value: oir.Value | None) -> str:
        """The hash of a value whose producer was visited, or that has none."""
        if value is None:
            return "none"
        found = self.known.get(value)
        if found is None:
            tensor = weights.tensor_of(value)
            found = self.known[value] = "outside" if tensor is None else _hash("weight", self._tensor(tensor))
        return found

    def _graph(self, graph: oir.Graph, place: str) -> tuple[list[str], list[str]]:
        """Hash all values of a graph; gives the sorted hashes of its nodes, and those of its outputs."""
        for index, value in enumerate(graph.inputs):
            default = "" if value.const_value is None else self._tensor(value.const_value)
            self.known[value] = _hash("input", place, index, default)
        found, opset = [], self.opset_of(graph)
        for node in _operands_first(graph, graph, reads):
            one = self._node(node, place, opset)
            found.append(_hash(one, [len(out.uses()) for out in node.outputs]))
            for index, out in enumerate(node.outputs):
                if not weights.is_constant(out):
                    self.known[out] = _hash(one, index)
        return sorted(found), [self.of(value) for value in graph.outputs]

    def _node(self, node: oir.Node, place: str, opset: int) -> str:
        stored = weights.tensor_of(node.outputs[0]) if node.op_type == "Constant" and node.outputs else None
        if stored is not None:  # by whatever attribute it is given
            return _hash("Constant", self._tensor(stored))
        operands = [self.of(value) for value in _given(node)]
        if commutes(node):
            operands.sort()
        called = self.functions.get(node.op_identifier(), "")
        given = [(name, self._attribute(one, f"{place}/{name}")) for name, one in attributes(node, opset)]
        return _hash(operator(node), called, operands, given, len(node.outputs))

    def _attribute(self, one: oir.Attr, place: str) -> str:
        if _holds_graphs(one):
            inside = [one.as_graph()] if one.type == oir.AttributeType.GRAPH else one.as_graphs()
            return _hash(*(self._graph(graph, f"{place} {index}") for index, graph in enumerate(inside)))
        if one.type in _TENSORS and not one.is_ref():
            tensors = [one.value] if one.type == oir.AttributeType.TENSOR else one.value
            return _hash(*map(self._tensor, tensors))
        return attribute_text(one)

    def _function(self, function: oir.Function) -> str:
        general = self.model.opset_imports
        imports = sorted(item for item in function.opset_imports.items() if general.get(item[0]) != item[1])
        parameters = sorted((name, attribute_text(one)) for name, one in function.attributes.items())
        return _hash(self._graph(function.graph, "function"), len(function.inputs), parameters, imports)

    def _tensor(self, tensor: oir.TensorProtocol) -> str:
        return f"{tensor_text(tensor)} {text.weight_hash(tensor)}" if self.full else tensor_text(tensor)


def _callees_first(model: oir.Model) -> Iterator[oir.OperatorIdentifier]:
    """The functions of a model, each behind those that it calls."""
    calls: dict[oir.OperatorIdentifier, list[oir.OperatorIdentifier]] = {}
    for key, function in model.functions.items():
        called = (node.op_identifier() for node in function.graph.all_nodes())
        calls[key] = [one for one in dict.fromkeys(called) if one in model.functions]
    seen: set[oir.OperatorIdentifier] = set()
    for key in calls:
        stack = [(key, iter(calls[key]))] if key not in seen else []
        seen.add(key)
        while stack:
            last, waiting = stack[-1]
            following = next((one for one in waiting if one not in seen), None)
            if following is None:
                stack.pop()
                yield last
            else:
                seen.add(following)
                stack.append((following, iter(calls[following])))


def attributes(node: oir.Node, opset: int) -> Iterator[tuple[str, oir.Attr]]:
    """The attributes of a node by name, those left out that have the value that the operator has without them."""
    known = defaults_of(node.op_type, opset) if node.attributes and node.domain in STANDARD_DOMAINS else {}
    for name, one in sorted(node.attributes.items()):
        plain = not one.is_ref() and one.type not in (*_GRAPHS, *_TENSORS)
        if not (plain and name in known and known[name] == str(_plain(node, name))):
            yield name, one


def _plain(node: oir.Node, name: str) -> object:
    value = match.attribute(node, name)
    if isinstance(value, float):
        return float(np.float32(value))
    return list(value) if isinstance(value, tuple) else value


def _holds_graphs(attribute: oir.Attr) -> bool:
    return not attribute.is_ref() and attribute.type in _GRAPHS


def attribute_text(attribute: oir.Attr) -> str:
    """The value of an attribute that is no graph: as `burnish.ir.text` shows it; weights by dtype and shape."""
    return text.attribute_text(attribute, tensor_text)


def _hash(*parts: object, size: int = 8) -> str:
    return hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=size).hexdigest()
