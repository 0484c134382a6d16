"""What a node and a model cost: multiply-adds, element operations, parameters, bytes moved.

A number that cannot be computed is None and comes with the reason; it is never 0. Activations are counted in the
shapes of the graph, so a model needs inferred shapes (`burnish.ir.concrete`) and numbers for its symbolic dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.element_operations import ELEMENT_OPERATIONS, NO_MULTIPLY_ADDS
from burnish.ir.multiply_adds import CONTRIB, MULTIPLY_ADDS
from burnish.ir.sizes import Dims, Sizes, UnknownSizeError, elements, stored, value_bytes
from burnish.ir.walk import STANDARD_DOMAINS, bodies, graphs, is_op, walk

Functions = Mapping[oir.OperatorIdentifier, oir.Function]

_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
_ONLY_SHAPES = ("Shape", "Size")
_PICK_ELEMENTS = ("Gather", "GatherElements", "GatherND", "Slice", "GatherBlockQuantized")
_ENDLESS = 1 << 31  # exporters write a trip count near 2**63 for a loop that ends by its condition


@dataclass(frozen=True)
class Cost:
    """What one run of something costs.

    Attributes:
        macs: multiply-adds; None when unknown.
        operations: steps on single elements, apart from the multiply-adds; None when unknown.
        parameters: elements of the constants it reads, each constant once; a packed 4-bit weight counts as its numbers.
        bytes_read: bytes of the values it reads, weights included; None when unknown.
        bytes_written: bytes of the values it writes; None when unknown.
        unknown: why numbers are None.
        per_iteration: some of it is of one iteration of a loop whose trip count only the run decides.
    """

    macs: int | None = 0
    operations: int | None = 0
    parameters: int = 0
    bytes_read: int | None = 0
    bytes_written: int | None = 0
    unknown: tuple[str, ...] = ()
    per_iteration: bool = False

    def known(self) -> Cost:
        """The same with 0 for every unknown number: a lower bound."""
        return replace(
            self,
            macs=self.macs or 0,
            operations=self.operations or 0,
            bytes_read=self.bytes_read or 0,
            bytes_written=self.bytes_written or 0,
        )


@dataclass(frozen=True)
class NodeCost:
    """A node and what it costs in one run of the model, over all iterations of the loops around it."""

    node: oir.Node
    cost: Cost


@dataclass(frozen=True)
class Stored:
    """A constant tensor of the model.

    Attributes:
        name: the name of the value it is stored under.
        dtype: its element type; of the numbers in it where it is packed.
        shape: its shape as stored.
        parameters: its elements; of the numbers in it where it is packed.
        bytes: its bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Attributes:
        nodes: every node that runs, in order: the bodies of loops and functions, and of each If the larger branch.
        total: the sum over `nodes`; a number is None where one of the nodes does not know it.
        at_least: the sum over what is known.
        stored: every constant tensor once, however often it is read.
        operators: node count of each operator over all graphs, and the sum over those of its nodes that run.
    """

    nodes: tuple[NodeCost, ...]
    total: Cost
    at_least: Cost
    stored: tuple[Stored, ...]
    operators: dict[str, tuple[int, Cost]]

    @property
    def macs(self) -> int | None:
        """Multiply-adds of one run; None when unknown."""
        return self.total.macs

    @property
    def by_dtype(self) -> dict[str, Stored]:
        """Parameters and bytes of all constants of each element type, the largest first."""
        groups: dict[str, list[Stored]] = {}
        for one in self.stored:
            groups.setdefault(one.dtype, []).append(one)
        sums = [
            Stored(f"{len(group)} tensors", dtype, (), sum(s.parameters for s in group), sum(s.bytes for s in group))
            for dtype, group in groups.items()
        ]
        return {one.dtype: one for one in sorted(sums, key=lambda one: (-one.bytes, one.dtype))}


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs: a number is None where one of them is. Parameters add up without regard to sharing."""
    found = list(costs)
    reasons = dict.fromkeys(reason for cost in found for reason in cost.unknown)
    return Cost(
        _sum(cost.macs for cost in found),
        _sum(cost.operations for cost in found),
        sum(cost.parameters for cost in found),
        _sum(cost.bytes_read for cost in found),
        _sum(cost.bytes_written for cost in found),
        tuple(reasons),
        any(cost.per_iteration for cost in found),
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)


def node_cost(node: oir.Node, dims: Dims | None = None, functions: Functions | None = None) -> Cost:
    """What one run of a node costs, with all that happens in its sub-graphs or in the function it calls.

    A Loop or Scan costs its body times its trip count where that is known, else one iteration. An If costs its larger
    branch.

    Args:
        node: a node of a graph whose values have shapes.
        dims: numbers for the symbolic dimensions.
        functions: the model's functions, for a node that calls one.
    """
    cost = total(part.cost for part in _parts(node, dims or {}, functions or {}))
    return replace(cost, parameters=_parameters(node))


def model_cost(model: oir.Model, dims: Dims | None = None) -> ModelCost:
    """What one run of a model costs; it is not changed. See `node_cost` for control flow.

    Args:
        model: a model whose values have shapes.
        dims: numbers for the symbolic dimensions.
    """
    nodes = tuple(part for node in model.graph for part in _parts(node, dims or {}, model.functions))
    kept = stored_tensors(model)
    unshared = sum(one.parameters for one in kept)
    whole = replace(total(part.cost for part in nodes), parameters=unshared)
    at_least = replace(total(part.cost.known() for part in nodes), parameters=unshared)
    return ModelCost(nodes, whole, at_least, kept, _by_operator(model, nodes))


def dims_of(model: oir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The numbers that `feeds` (arrays by input name) give to open dimensions: by name and as `INPUT.AXIS`."""
    found: dict[str, int] = {}
    for value in model.graph.inputs:
        array = feeds.get(value.name or "")
        for axis, size in enumerate(value.shape or ()):
            if array is not None and axis < array.ndim and not (isinstance(size, int) and size >= 0):
                found[f"{value.name}.{axis}"] = array.shape[axis]
                if not isinstance(size, int) and size.value is not None:
                    found[size.value] = array.shape[axis]
    return found


def operator_name(node: oir.Node) -> str:
    """The operator as reports name it: with its domain unless that is ONNX's own."""
    return node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"


def _by_operator(model: oir.Model, nodes: Iterable[NodeCost]) -> dict[str, tuple[int, Cost]]:
    counts: dict[str, int] = {}
    for node in walk(model):
        counts[operator_name(node)] = counts.get(operator_name(node), 0) + 1
    costs: dict[str, list[Cost]] = {}
    for part in nodes:
        costs.setdefault(operator_name(part.node), []).append(part.cost)
    order = sorted(counts, key=lambda name: (-counts[name], name))
    return {name: (counts[name], total(costs.get(name, []))) for name in order}


def _parts(node: oir.Node, dims: Dims, functions: Functions) -> Iterator[NodeCost]:
    """The node, then the nodes that run inside it."""
    function = functions.get(node.op_identifier())
    if function is not None:
        rest = {key: one for key, one in functions.items() if key != node.op_identifier()}
        yield NodeCost(node, Cost())
        for inner in function:
            yield from _parts(inner, dims, rest)
    elif is_op(node, "If"):
        yield from _branch(node, dims, functions)
    elif is_op(node, *_CONTROL_FLOW):
        yield NodeCost(node, Cost())
        trips = _trips(node, dims)
        for inner in match.attribute(node, "body") or ():
            yield from (_repeated(part, trips) for part in _parts(inner, dims, functions))
    else:
        yield NodeCost(node, _own(node, dims))


def _branch(node: oir.Node, dims: Dims, functions: Functions) -> Iterator[NodeCost]:
    condition = weights.scalar(node.inputs[0])
    names = ["then_branch", "else_branch"] if condition is None else ["then_branch" if condition else "else_branch"]
    branches: list[oir.Graph] = [match.attribute(node, name) for name in names]
    parts = [[part for inner in graph for part in _parts(inner, dims, functions)] for graph in branches]
    costs = [total(part.cost for part in body) for body in parts]
    ranks = [(cost.known().macs or 0, cost.known().operations or 0) for cost in costs]
    chosen = ranks.index(max(ranks))
    own = Cost()
    if any(cost.macs is None for index, cost in enumerate(costs) if index != chosen):
        own = Cost(macs=None, operations=None, unknown=(f"a branch of {match.describe(node)} is of unknown size",))
    yield NodeCost(node, own)
    yield from parts[chosen]


def _trips(node: oir.Node, dims: Dims) -> int | None:
    """How often the body of a Loop or Scan runs, at most; None when only the run decides."""
    if is_op(node, "Loop"):
        found = weights.scalar(node.inputs[0])
        return int(found) if found is not None and 0 <= found < _ENDLESS else None
    if is_op(node, "Scan"):
        axis = (match.attribute(node, "scan_input_axes") or (0,))[0]
        try:
            return Sizes(node, dims).read(len(node.inputs) - match.attribute(node, "num_scan_inputs"))[axis]
        except UnknownSizeError:
            return None
    return None


def _repeated(part: NodeCost, trips: int | None) -> NodeCost:
    cost = part.cost
    if trips is None:
        return NodeCost(part.node, replace(cost, per_iteration=True))

    def times(number: int | None) -> int | None:
        return None if number is None else number * trips

    return NodeCost(
        part.node,
        replace(
            cost,
            macs=times(cost.macs),
            operations=times(cost.operations),
            bytes_read=times(cost.bytes_read),
            bytes_written=times(cost.bytes_written),
        ),
    )


def _own(node: oir.Node, dims: Dims) -> Cost:
    """The cost of a node without sub-graphs that calls no function of the model."""
    key = ("" if node.domain in STANDARD_DOMAINS else node.domain, node.op_type)
    reasons: list[str] = []
    sizes = Sizes(node, dims)

    def number(compute: Callable[[], int]) -> int | None:
        try:
            return compute()
        except UnknownSizeError as error:
            reasons.append(str(error))
        except (IndexError, TypeError, ValueError, ZeroDivisionError):
            reasons.append(f"the shapes of {match.describe(node)} do not fit the operator")
        return None

    macs: int | None
    operations: int | None
    if key not in ELEMENT_OPERATIONS:
        macs, operations = 0 if key in NO_MULTIPLY_ADDS else None, None
        reasons.append(f"the work of `{operator_name(node)}` has no closed form")
    else:
        formula = MULTIPLY_ADDS.get(key)
        macs = number(lambda: formula(sizes)) if formula is not None else 0
        operations = number(lambda: ELEMENT_OPERATIONS[key](sizes))
    stored_here = node.op_type == "Constant"
    read = number(lambda: _bytes_read(node, dims))
    written = 0 if stored_here else number(lambda: sum(value_bytes(out, dims) for out in node.outputs if out.name))
    return Cost(macs, operations, _parameters(node), read, written, tuple(dict.fromkeys(reasons)))


def _bytes_read(node: oir.Node, dims: Dims) -> int:
    return sum(bytes_taken(value, node, dims) for value in values_given(node))


def values_given(node: oir.Node) -> list[oir.Value]:
    """The inputs of a node, each once."""
    return list({id(value): value for value in node.inputs if value is not None}.values())


def bytes_taken(value: oir.Value, node: oir.Node, dims: Dims) -> int:
    """Bytes of `value` that `node` reads: none for its shape, and only those that are picked from a table."""
    if node.op_type in _ONLY_SHAPES:
        return 0
    if node.op_type not in _PICK_ELEMENTS or value is not node.inputs[0]:
        return value_bytes(value, dims)
    width = value_bytes(value, dims) / max(elements(value, dims) * (_in_a_byte(node, value) or 1), 1)
    return int(elements(node.outputs[0], dims) * width)


def _parameters(node: oir.Node) -> int:
    """Elements of the constants that a node and its sub-graphs read, each once."""
    readers = [node, *(inner for body in bodies(node) for inner in body.all_nodes())]
    found: dict[object, int] = {}
    for reader in readers:
        for index, value in enumerate(reader.inputs):
            tensor = stored(value) if value is not None else None
            if tensor is not None and value is not None:
                found[_identity(value, tensor)] = _packed(reader, index) or tensor.size
    return sum(found.values())


def _identity(value: oir.Value, tensor: oir.TensorProtocol) -> object:
    """Equal for values that are stored in the same place."""
    if isinstance(tensor, oir.ExternalTensor):
        return (str(tensor.path), tensor.offset, tensor.length)
    return id(tensor) if value.const_value is tensor or _named(value, "value") else id(value)


def _named(value: oir.Value, attribute: str) -> bool:
    node = value.producer()
    return node is not None and attribute in node.attributes


def _packed(node: oir.Node, index: int) -> int | None:
    """How many numbers a weight holds whose dtype does not say it: the packed matrix of MatMulNBits and
    GatherBlockQuantized.
    """
    if index == 1 and is_op(node, "MatMulNBits", domain=CONTRIB):
        return int(match.attribute(node, "K")) * int(match.attribute(node, "N"))
    value = node.inputs[0] if index == 0 else None
    tensor = stored(value) if value is not None else None
    each = _in_a_byte(node, value) if value is not None else None
    return tensor.size * each if tensor is not None and each is not None else None


def _in_a_byte(node: oir.Node, value: oir.Value) -> int | None:
    """How many numbers each byte of the table of a GatherBlockQuantized holds; None for any other value."""
    table = is_op(node, "GatherBlockQuantized", domain=CONTRIB) and value is node.inputs[0]
    return 8 // int(match.attribute(node, "bits", 4)) if table and value.dtype == oir.DataType.UINT8 else None


def stored_tensors(model: oir.Model) -> tuple[Stored, ...]:
    """The constant tensors of a model, each once: initializers and Constant nodes of all its graphs and functions."""
    found: dict[object, Stored] = {}
    for graph in graphs(model):
        made = [out for node in graph if is_op(node, "Constant") for out in node.outputs]
        for value in (*graph.initializers.values(), *made):
            tensor = stored(value)
            if tensor is not None and (key := _identity(value, tensor)) not in found:
                found[key] = _described(value, tensor)
    return tuple(found.values())


def _described(value: oir.Value, tensor: oir.TensorProtocol) -> Stored:
    packed = [(use.node, count) for use in value.uses() if (count := _packed(use.node, use.idx))]
    dtype = f"UINT{match.attribute(packed[0][0], 'bits', 4)}" if packed else tensor.dtype.name
    shape = tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type]
    return Stored(value.name or "?", dtype, shape, packed[0][1] if packed else tensor.size, tensor.nbytes)
