"""What depends on constants only is computed once, in float64, and stored in the model's own dtype."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.evaluate import FOLDABLE, evaluate
from burnish.ir.walk import STANDARD_DOMAINS, is_op, main_graphs
from burnish.passes.base import ExactPass, Outcome

_COPIED = 1024  # bytes of the largest constant that may be stored once more in another form while it is still read
_CUTS = ("Slice", "Split")
_STORED = 256  # elements from which on a weight in fewer bits is not widened
_NODE_BYTES = 256  # what a node with its names and metadata takes in the file; gone when it is folded


@dataclass(frozen=True)
class FoldConstants(ExactPass):
    """Compute what depends on constants only, as long as the model does not grow.

    Attributes:
        slack: bytes that the model may grow by in total.
    """

    slack: int = 65536

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        left = self.slack
        for graph in main_graphs(model):
            for node in list(graph):
                if node.op_type in FOLDABLE and node.domain in STANDARD_DOMAINS and node.graph is not None:
                    left -= self._fold(model, node, outcome, left)

    def _fold(self, model: oir.Model, node: oir.Node, outcome: Outcome, left: int) -> int:
        """Fold one node; returns by how many bytes the model has grown."""
        read = [value for value in node.inputs if value is not None]
        if not read or not all(weights.is_constant(value) for value in read):
            return 0
        if (node.op_type == "Identity" and node.outputs[0].is_graph_output()) or _widens(node):
            return 0
        parted = is_op(node, *_CUTS) and _is_parted(read[0])
        if parted:
            left = max(left, sum(tensor.nbytes for tensor in evaluate(node, largest=0) or ()))
        elif any(value.const_value is not None and value.const_value.nbytes > _COPIED for value in _shared(read)):
            left = 0
        largest = _dying(read) + max(left, 0) + _NODE_BYTES
        tensors = evaluate(node, largest=largest)
        if tensors is None:
            outcome.skip(node, "its result is larger than what it would replace, or it cannot be computed here")
            return 0
        growth = sum(tensor.nbytes for tensor in tensors) - _dying(read) - _NODE_BYTES
        if growth > max(left, 0):
            outcome.skip(node, "its result is larger than what it would replace")
            return 0
        if not outcome.take(node):
            return 0
        values = []
        for out, tensor in zip(node.outputs, tensors, strict=False):
            if out.is_graph_output():
                name = out.name or "constant"
            elif node.op_type == "Transpose" and read[0].name:
                name = f"{read[0].name}.T"
            else:
                name = edit.release_name(model, out)
            values.append(edit.add_constant(model, name, tensor))
        for out, value in zip(node.outputs, values, strict=False):
            edit.replace_value(out, value)
        edit.remove_unused([node])
        for value in values:
            edit.drop_if_unused(value)
        return 0 if parted else max(growth, 0)


def _widens(node: oir.Node) -> bool:
    """Whether a node only reads a stored weight in more bits than it takes."""
    tensor = weights.tensor_of(node.inputs[0]) if node.op_type == "Cast" else None
    if tensor is None or tensor.size < _STORED or not tensor.dtype.is_floating_point():
        return False
    wanted = oir.DataType(match.attribute(node, "to"))
    return wanted.is_floating_point() and wanted.bitwidth > tensor.dtype.bitwidth


def _is_parted(value: oir.Value) -> bool:
    """Whether all readers of a constant cut constant parts out of it, together no more than it holds."""
    total, readers = 0, match.consumers(value)
    for reader in readers:
        if not is_op(reader, *_CUTS) or not all(weights.is_constant(one) for one in reader.inputs if one is not None):
            return False
        total += sum(tensor.nbytes for tensor in evaluate(reader, largest=0) or ())
    return len(readers) > 1 and value.const_value is not None and total <= value.const_value.nbytes


def _dying(read: list[oir.Value]) -> int:
    """Bytes of the constants that only this node reads."""
    kept = {id(value) for value in _shared(read)}
    once = {id(value): value.const_value for value in read if id(value) not in kept}
    return sum(tensor.nbytes for tensor in once.values() if tensor is not None)


def _shared(read: list[oir.Value]) -> list[oir.Value]:
    """The constants that other nodes read as well."""
    return [value for value in read if len(match.consumers(value)) > 1 or value.is_graph_output()]
