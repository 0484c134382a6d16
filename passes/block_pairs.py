"""Two blocks side by side: node for node the same but for the numbers of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, permutations

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.inference import Inference
from burnish.ir.views.block import Block
from burnish.ir.views.block_hash import COMMUTATIVE, attributes_of
from burnish.ir.views.flow import SKIP_NORMS, Flow, Flows, Step
from burnish.ir.views.norm import find_norm
from burnish.ir.walk import STANDARD_DOMAINS, bodies

_WEIGHTS: dict[tuple[str, str], Sequence[int]] = {
    ("", "MatMul"): (0, 1),
    ("", "Gemm"): (1, 2),
    ("", "Conv"): (1, 2),
    ("", "PRelu"): (1,),
    ("", "BatchNormalization"): (1, 2, 3, 4),
    ("", "LayerNormalization"): (1, 2),
    ("", "SimplifiedLayerNormalization"): (1,),
    ("", "RMSNormalization"): (1,),
    ("", "GroupNormalization"): (1, 2),
    ("", "InstanceNormalization"): (1, 2),
    ("com.microsoft", "FusedMatMul"): (1,),
    ("com.microsoft", "FusedConv"): (1, 2),
    ("com.microsoft", "Attention"): (1, 2),
    ("com.microsoft", "MultiHeadAttention"): (3,),
    ("com.microsoft", "BiasGelu"): (1,),
    ("com.microsoft", "FastGelu"): (1,),
}
"""The inputs that are weights, by domain and operator."""

_VECTORS = ("Add", "Sub", "Mul", "Div")
"""Operators whose constant vectors are weights: biases and scales of channels."""


class Different(Exception):
    """Two blocks are not the same node for node, or differ in something that is no weight."""


@dataclass(frozen=True)
class Use:
    """Where a block reads a weight of its own, and the other block's weight in that place."""

    node: oir.Node
    index: int
    own: oir.Value
    other: oir.Value


class Pairs:
    """Pairs blocks of one model, which must not be changed meanwhile."""

    def __init__(self, model: oir.Model) -> None:
        self._facts = Inference(model)
        self._flows = Flows()

    def _place(self, value: oir.Value, block: Block) -> oir.Value:
        """An end of a block in the flow of its graph, where sums that are no output are values of its own."""
        flow, ends = self._flows.around(block.nodes[0]), {block.entry: block.adders[0], block.exit: block.adders[1]}
        if value in flow.source or ends.get(value) is None:
            return value
        return next(total for total, node in flow.sums.items() if node is ends[value])

    def paired(self, own: Block, other: Block) -> list[Use]:
        """The weights of two blocks, place by place, those left out that are one value.

        Both are read from their ends backwards. All that is no weight has to be equal: operators, attributes, single
        numbers (a scale that depends on the layer), integers, masks, windows and rotary tables. States of caches
        correspond and need not be equal.

        Args:
            own, other: blocks of one reading of the model.

        Raises:
            Different: the blocks cannot have the same weights, with the reason.
        """
        for block in (own, other):
            if "attention" in block.kinds and not block.attention:
                raise Different(f"the attention of block {block.index} could not be read")
        if own.nodes[0].graph is not other.nodes[0].graph:
            raise Different("they are in different graphs")
        entries = [self._place(block.entry, block) for block in (own, other)]
        pairing = _Pairing(self._flows.around(own.nodes[0]), self._facts, own, other, entries)
        pairing.pair(self._place(own.exit, own), self._place(other.exit, other))
        return pairing.uses


class _Pairing:
    def __init__(self, flow: Flow, facts: Inference, own: Block, other: Block, entries: Sequence[oir.Value]) -> None:
        self._flow, self._facts = flow, facts
        self._own, self._other = own, other
        self._entries = entries
        self._inside = [{*one.nodes, *(node for node in one.adders if node is not None)} for one in (own, other)]
        self._aside = _aside(own) | _aside(other)
        self._partner: dict[oir.Value, oir.Value] = {}
        self.uses: list[Use] = []

    def pair(self, own: oir.Value | None, other: oir.Value | None) -> None:
        """Find what computes `own` and `other` to be alike, as far as it is in the blocks."""
        ends = own is self._entries[0], other is self._entries[1]
        if all(ends) or own is other and not any(ends):
            return
        if any(ends) or own is None or other is None:
            raise Different("they compute different things")
        if own in self._partner:
            if self._partner[own] is not other:
                raise Different(f"`{own.name}` and `{other.name}` are not used alike")
            return
        one, two = self._flow.step(own), self._flow.step(other)
        if one is None or two is None or one.node not in self._inside[0] or two.node not in self._inside[1]:
            if self._state(own, self._own) != self._state(other, self._other):
                raise Different(f"one reads `{own.name}`, the other `{other.name}`")
            return
        self._partner[own] = other
        if one.outputs.index(own) != two.outputs.index(other):
            raise Different(f"`{own.name}` and `{other.name}` are different outputs of what makes them")
        self._nodes(one, two)

    @staticmethod
    def _state(value: oir.Value, block: Block) -> int | oir.Value:
        """The number of an input that carries a state of the block; of any other value that value."""
        return block.inputs.index(value) if value in block.inputs else value

    def _nodes(self, one: Step, two: Step) -> None:
        own, other = one.node, two.node
        assert own is not None and other is not None
        if "norm" in (one.part, two.part):
            left, right = find_norm(own), find_norm(other)
            alike = left is not None and right is not None and left.axes == right.axes == (-1,)
            same = alike and (left.kind, left.epsilon) == (right.kind, right.epsilon)  # type: ignore[union-attr]
        else:
            same = one.op == two.op and (one.part == two.part == "sum" or own.domain == other.domain)
            if same and not one.part:
                same = attributes_of(own, self._facts.opset) == attributes_of(other, self._facts.opset)
        if not same or bodies(own):
            raise Different(f"{match.describe(own)} and {match.describe(other)} differ")
        left_inputs, right_inputs = _inputs(one), _inputs(two)
        if len(left_inputs) != len(right_inputs):
            raise Different(f"{match.describe(own)} and {match.describe(other)} read different numbers of values")
        orders = islice(permutations(right_inputs), 24) if one.op in COMMUTATIVE else iter([tuple(right_inputs)])
        reason: Different | None = None
        for order in orders:
            partner, uses = dict(self._partner), list(self.uses)
            try:
                for (index, value), (_, twin) in zip(left_inputs, order, strict=True):
                    self._input(own, index, value, twin, is_norm="norm" in (one.part, two.part))
                return
            except Different as found:
                reason = reason or found
                self._partner, self.uses = partner, uses
        assert reason is not None
        raise reason

    def _input(
        self, node: oir.Node, index: int, own: oir.Value | None, other: oir.Value | None, *, is_norm: bool
    ) -> None:
        one, two = weights.tensor_of(own), weights.tensor_of(other)
        if own is None or other is None or one is None or two is None:
            if (one is None) != (two is None):
                raise Different(f"what {match.describe(node)} reads is a constant in one of them only")
            self.pair(own, other)
            return
        if own is other:
            return
        if (one.dtype, tuple(one.shape)) != (two.dtype, tuple(two.shape)):
            raise Different(f"the constants `{own.name}` and `{other.name}` have different shapes")
        known = _WEIGHTS.get(("" if node.domain in STANDARD_DOMAINS else node.domain, node.op_type), ())
        weight = is_norm or index in known or (node.op_type in _SUMS and _is_vector(one))
        if weight and one.dtype.is_floating_point() and one.size > 1 and own not in self._aside:
            self.uses.append(Use(node, index, own, other))
        elif not np.array_equal(one.numpy(), two.numpy()):
            raise Different(f"`{own.name}` and `{other.name}` are not known to be weights and differ")


_SUMS = (*_VECTORS, *SKIP_NORMS)


def _inputs(step: Step) -> list[tuple[int, oir.Value | None]]:
    """What a step reads, each with the number of the node's input; the sum of a skip-normalization is number 0."""
    node = step.node
    assert node is not None
    if step.part == "norm":
        last = 4 if node.op_type == SKIP_NORMS[0] else 3
        return [(0, step.inputs[0]), *((index, match.input_of(node, index)) for index in range(2, last))]
    if step.part == "sum":
        bias = 4 if node.op_type == SKIP_NORMS[0] else 3
        return [(index, value) for index in (0, 1, bias) if (value := match.input_of(node, index)) is not None]
    return list(enumerate(node.inputs))


def _is_vector(tensor: oir.TensorProtocol) -> bool:
    return sum(size != 1 for size in tensor.shape.numpy()) <= 1


def _aside(block: Block) -> set[oir.Value]:
    """The constants that masks and rotary embeddings of a block are made of."""
    pending: list[oir.Value | None] = []
    for layer in block.attention:
        for mask in layer.mask:
            pending += [*mask.values, mask.keep]
        for turned in (layer.rotary, layer.key_rotary):
            if turned is not None:
                pending += [turned.cos, turned.sin, turned.position]
    found: set[oir.Value] = set()
    seen: set[oir.Value] = set()
    while pending:
        value = pending.pop()
        if value is None or value in seen or value is block.entry:
            continue
        seen.add(value)
        node = value.producer()
        if weights.is_constant(value):
            found.add(value)
        elif node is not None:
            pending += node.inputs
    return found
