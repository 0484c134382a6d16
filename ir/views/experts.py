"""Mixtures of experts: a router chooses a few of many matrices for each token.

Three spellings: the chosen matrices are gathered from a stack, for each token or for each expert in turn; every expert
has matrices of its own and gathers its tokens; com.microsoft MoE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Miss
from burnish.ir.views.choice import altered
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.parameter import Parameter, find_parameter, write_input
from burnish.ir.walk import is_op, walk

_MICROSOFT = "com.microsoft"
_TO_SCORES = ("Softmax", "Sigmoid", "Add", "Mul", "Div", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Sub")
_MOVES = ("Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity")
_LONGEST = 8


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of every expert.

    Attributes:
        count: experts.
        out_features, in_features: of each.
        readers: the nodes that read the stack of matrices, with the index of that input; empty for separate ones.
        transposed: the stack is stored as [experts, in, out].
        layers: the linear layer of each expert, where the matrices are separate.
        biases: the nodes that read the stack of biases [experts, out], as `readers`.
        read_only: why it cannot be written, in plain words; None when it can.
    """

    count: int
    out_features: int
    in_features: int
    readers: tuple[tuple[oir.Node, int], ...]
    transposed: bool
    layers: tuple[Linear, ...] = ()
    biases: tuple[tuple[oir.Node, int], ...] = ()
    read_only: str | None = None

    def weight(self) -> np.ndarray:
        """The matrices, float64 [experts, out, in].

        Raises:
            ValueError: they are quantized in a way that is not read.
        """
        if self.layers:
            return np.stack([layer.weight() for layer in self.layers])
        found = _stack(self.readers)
        if found is None:
            raise ValueError(self.read_only or "the matrices are no constants")
        array = found.read()
        return array.transpose(0, 2, 1) if self.transposed else array

    def bias(self) -> np.ndarray | None:
        """The biases, float64 [experts, out]; None when there are none."""
        if self.layers:
            parts = [layer.bias() for layer in self.layers]
            known = [one for one in parts if one is not None]
            return np.stack(known) if len(known) == len(parts) else None
        found = _stack(self.biases)
        return found.read().reshape(self.count, self.out_features) if found is not None else None

    def write(self, model: oir.Model, weight: np.ndarray, bias: np.ndarray | None) -> None:
        """Give every expert a new matrix of the old shape; whoever else reads the old ones keeps them.

        Args:
            model: the model the experts are in.
            weight: float64 [experts, out, in].
            bias: float64 [experts, out]; None exactly where `bias()` is None.

        Raises:
            ValueError: another shape or number of biases, or `read_only`.
        """
        if self.read_only is not None:
            raise ValueError(self.read_only)
        old = self.bias()
        shape = self.count, self.out_features, self.in_features
        if weight.shape != shape or (old is None) != (bias is None) or (bias is not None and bias.shape != shape[:2]):
            raise ValueError(f"the matrices are {list(shape)}, with biases only where there were some")
        for index, layer in enumerate(self.layers):
            layer.write(model, weight[index], None if bias is None else bias[index])
        _write_stack(model, self.readers, weight.transpose(0, 2, 1) if self.transposed else weight)
        if bias is not None:
            _write_stack(model, self.biases, bias)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
        anchor: the TopK that chooses, or the operator that is the whole mixture.
        count: experts.
        chosen: experts for each token.
        router: the linear layer whose results are the scores of the experts.
        source: what the router reads.
        matrices: those of the experts, in the order in which they are applied.
        spelling: `gathered`, `separate` or `operator`.
    """

    anchor: oir.Node
    count: int
    chosen: int
    router: Linear
    source: oir.Value
    matrices: tuple[ExpertMatrix, ...]
    spelling: str


def find_experts(model: oir.Model, facts: Inference | None = None) -> Iterator[Experts | Miss]:
    """Every mixture of experts of the model in graph order, and every near miss with its reason.

    Args:
        model: the model; not changed.
        facts: what is proven of the model as it is.
    """
    known = facts if facts is not None else Inference(model)
    for node in walk(model):
        if is_op(node, "TopK"):
            found = _routed(node, known)
            if found is not None:
                yield found
        elif is_op(node, "MoE", "QMoE", domain=_MICROSOFT):
            yield _operator(node, known)


def _router(value: oir.Value | None, count: int) -> Linear | None:
    """The linear layer whose `count` results are scored, above functions of single scores."""
    for _ in range(_LONGEST):
        node = value.producer() if value is not None else None
        if node is None:
            return None
        layer = find_linear(node)
        if layer is not None and layer.out_features == count:
            return layer
        if not is_op(node, *_TO_SCORES):
            return None
        computed = [one for one in node.inputs if one is not None and not weights.is_constant(one)]
        value = node.inputs[0] if is_op(node, "Reshape", "Squeeze", "Unsqueeze") or len(computed) != 1 else computed[0]
    return None


def _routed(node: oir.Node, facts: Inference) -> Experts | Miss | None:
    shape, chosen = facts.shape(node.inputs[0]), facts.numbers(match.input_of(node, 1))
    if shape is None or not isinstance(shape[-1], int) or len(node.outputs) < 2:
        return None
    if match.attribute(node, "axis", -1) % len(shape) != len(shape) - 1 or not match.attribute(node, "largest", 1):
        return None
    count, router = shape[-1], _router(node.inputs[0], shape[-1])
    if router is None:
        return None
    if chosen is None or len(chosen) != 1:
        return Miss(node, "how many experts are chosen is not known")
    gathers, taken = _uses_of_choice(node.outputs[1], count, facts)
    if gathers:
        reason = altered(gathers, node.outputs[1], count, chosen[0], facts)
        found, spelling = reason or _gathered(gathers, count), "gathered"
    else:
        found, spelling = _separate(taken, count), "separate"
    if isinstance(found, str):
        return Miss(node, found, near=bool(gathers or taken))
    return Experts(node, count, chosen[0], router, router.input, found, spelling)


def _uses_of_choice(
    indices: oir.Value, count: int, facts: Inference
) -> tuple[list[oir.Node], list[tuple[int, oir.Node]]]:
    """What is done with the numbers of the chosen experts.

    Returns:
        The nodes that gather from a constant with an entry for each expert, and those that gather tokens, each with the
        expert whose row of the mask of chosen experts it depends on.
    """
    gathers: dict[oir.Node, None] = {}
    taken: dict[oir.Node, int] = {}
    pending: list[tuple[oir.Value, int | None]] = [(indices, None)]
    seen: set[tuple[oir.Value, int | None]] = set()
    while pending:
        value, expert = pending.pop(0)
        if (value, expert) in seen:
            continue
        seen.add((value, expert))
        for node in match.consumers(value):
            if is_op(node, "Shape", "Size"):
                continue
            table = find_parameter(node.inputs[0]) if is_op(node, "Gather", "GatherND") else None
            if table is not None and table.value is not value:
                if len(table.shape) >= 2 and table.shape[0] == count and not match.attribute(node, "axis", 0):
                    gathers[node] = None
                continue
            for index, out in enumerate(node.outputs):
                dtype = facts.dtype(out)
                if dtype is None or dtype.is_floating_point():
                    if is_op(node, "Gather", "GatherND") and expert is not None:
                        taken[node] = expert
                    continue
                pending.append((out, _row(node, value, index, count, facts) if expert is None else expert))
    return list(gathers), [(expert, node) for node, expert in taken.items()]


def _row(node: oir.Node, value: oir.Value, index: int, count: int, facts: Inference) -> int | None:
    """The expert whose row of a mask [experts, ...] a node takes, or with whose number it compares."""
    if is_op(node, "Equal"):
        number = match.with_constant(node)
        found = weights.integers(number[1]) if number is not None else None
        return found[0] if found is not None and len(found) == 1 else None
    shape = facts.shape(value)
    if node.inputs[0] is not value or shape is None or not shape or shape[0] != count:
        return None
    if is_op(node, "Split") and not match.attribute(node, "axis", 0) and len(node.outputs) == count:
        return index
    row = facts.numbers(match.input_of(node, 1)) if is_op(node, "Gather", "Slice") else None
    if row is None or len(row) != 1 or match.attribute(node, "axis", 0):
        return None
    if is_op(node, "Slice") and (facts.numbers(match.input_of(node, 3)) or [0]) != [0]:
        return None
    return row[0] % count


def _gathered(gathers: list[oir.Node], count: int) -> tuple[ExpertMatrix, ...] | str:
    """Stacks of matrices and of biases, from the nodes that gather from them."""
    stacks: dict[oir.Value, list[oir.Node]] = {}
    for node in gathers:
        stacks.setdefault(node.inputs[0], []).append(node)  # type: ignore[arg-type]
    found: dict[oir.Node, ExpertMatrix] = {}
    for value in sorted(stacks, key=lambda value: _position(stacks[value][0])):
        parameter = find_parameter(value)
        if parameter is None or len(parameter.shape) != 3:
            continue
        products = [_product(node) for node in stacks[value]]
        known = [one for one in products if one is not None]
        if len(known) < len(products) or len({turned for _, turned in known}) != 1:
            return "how its matrices are multiplied is not known"
        turned = known[0][1]
        rows, columns = parameter.shape[1:]
        out, features = (columns, rows) if turned else (rows, columns)
        reason = "its matrices are quantized" if parameter.quantized else None
        readers = tuple((node, 0) for node in stacks[value])
        found[known[0][0]] = ExpertMatrix(count, out, features, readers, turned, read_only=reason)
        for product, _ in known[1:]:
            found[product] = found[known[0][0]]
    for value, nodes in stacks.items():
        parameter = find_parameter(value)
        if parameter is not None and len(parameter.shape) == 3:
            continue
        matrix = found.get(_biased(nodes[0]))  # type: ignore[arg-type]
        if parameter is None or len(parameter.shape) != 2 or matrix is None:
            return "a constant that it gathers is neither a stack of matrices nor of biases"
        biases = tuple((node, 0) for node in nodes)
        found = {node: replace(one, biases=biases) if one is matrix else one for node, one in found.items()}
    return tuple(dict.fromkeys(found.values())) if found else "no matrices are gathered"


def _biased(gather: oir.Node) -> oir.Node | None:
    """The product to which a gathered bias is added."""
    add = match.sole_consumer(gather.outputs[0], "Add")
    value = next((one for one in add.inputs if one is not gather.outputs[0]), None) if add is not None else None
    for _ in range(_LONGEST):
        node = value.producer() if value is not None else None
        if node is None or is_op(node, "MatMul", "Gemm"):
            return node
        if not is_op(node, *_MOVES, "Gather"):
            return None
        value = node.inputs[0]
    return None


def _position(node: oir.Node) -> int:
    graph = node.graph
    return next((index for index, one in enumerate(graph) if one is node), 0) if graph is not None else 0


def _product(gather: oir.Node) -> tuple[oir.Node, bool] | None:
    """The product that gathered matrices are a factor of, and whether they are [..., in, out] there."""
    value, turned = gather.outputs[0], False
    for _ in range(_LONGEST):
        node = match.sole_consumer(value)
        if node is None:
            return None
        if is_op(node, "MatMul"):
            return node, (node.inputs[1] is value) != turned
        if is_op(node, "Gemm"):
            second = node.inputs[1] is value
            flipped = bool(match.attribute(node, "transB" if second else "transA", 0))
            return node, second != (turned != flipped)
        if is_op(node, "Transpose"):
            perm = match.attribute(node, "perm")
            axes = list(perm) if perm is not None else []
            last = len(axes) - 1
            if axes != [*range(last - 1), last, last - 1]:
                return None
            turned = not turned
        elif not is_op(node, *_MOVES):
            return None
        value = node.outputs[0]
    return None


def _separate(taken: list[tuple[int, oir.Node]], count: int) -> tuple[ExpertMatrix, ...] | str:
    """The linear layers that each expert applies to its tokens, put together by their places."""
    layers: list[list[Linear]] = []
    for expert in range(count):
        own: dict[oir.Node, Linear] = {}
        pending = [out for number, node in taken if number == expert for out in node.outputs]
        seen: set[oir.Value] = set()
        while pending:
            value = pending.pop(0)
            if value in seen:
                continue
            seen.add(value)
            for node in match.consumers(value):
                layer = find_linear(node)
                if layer is not None:
                    own[layer.node] = layer
                if not node.op_type.startswith("Scatter") and not is_op(node, "Shape", "Size"):
                    pending += node.outputs
        layers.append(sorted(own.values(), key=lambda layer: _position(layer.node)))
    if not any(layers):
        return "no matrices depend on the choice"
    shapes = {tuple((one.in_features, one.out_features, one.bias_parameter is None) for one in own) for own in layers}
    if len(shapes) != 1:
        return "its experts have matrices of different shapes"
    found = []
    for group in zip(*layers, strict=True):
        reason = next((one.read_only for one in group if one.read_only is not None), None)
        found.append(ExpertMatrix(count, group[0].out_features, group[0].in_features, (), False, group, (), reason))
    return tuple(found)


def _operator(node: oir.Node, facts: Inference) -> Experts | Miss:
    shape = facts.shape(match.input_of(node, 1))
    count = shape[-1] if shape else None
    router = _router(match.input_of(node, 1), count) if isinstance(count, int) else None
    if not isinstance(count, int) or router is None:
        return Miss(node, "its router is no linear layer")
    matrices = []
    quantized = node.op_type == "QMoE"
    for at in (2, 5, 8) if quantized else (2, 4, 6):
        stack = find_parameter(match.input_of(node, at))
        if match.input_of(node, at) is None:
            continue
        if stack is None or len(stack.shape) != 3 or stack.shape[0] != count:
            return Miss(node, "its matrices are no constant stack with one for each expert")
        bias = at + 2 if quantized else at + 1
        biases = ((node, bias),) if match.input_of(node, bias) is not None else ()
        out, features = stack.shape[1:]
        if quantized:
            features *= 8 // int(match.attribute(node, "expert_weight_bits", 4))
        reason = "its matrices are quantized" if quantized or stack.quantized else None
        matrices.append(ExpertMatrix(count, out, features, ((node, at),), False, (), biases, reason))
    chosen = int(match.attribute(node, "k", 1))
    source = node.inputs[0]
    assert source is not None
    return Experts(node, count, chosen, router, source, tuple(matrices), "operator")


def _stack(readers: tuple[tuple[oir.Node, int], ...]) -> Parameter | None:
    return find_parameter(readers[0][0].inputs[readers[0][1]]) if readers else None


def _write_stack(model: oir.Model, readers: tuple[tuple[oir.Node, int], ...], array: np.ndarray) -> None:
    """Let all readers of a stack read a new one."""
    found = _stack(readers)
    if found is None or found.dtype is None:
        return
    first, at = readers[0]
    write_input(model, first, at, array.reshape(found.shape), found.dtype, found.source.name or "experts")
    for node, index in readers[1:]:
        node.replace_input_with(index, first.inputs[at])
