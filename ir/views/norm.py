"""The view of a normalization: one operator, or the arithmetic that exporters spell it out as."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.views.affine import Affine, batch_affine
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.ir.walk import is_op, walk

_CONTRIB = ("SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_FUSED = (
    "BatchNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    *_CONTRIB,
)


@dataclass(frozen=True)
class Norm:
    """A normalization with constant gain and bias.

    Attributes:
        kind: batch, layer, rms, group or instance.
        nodes: the nodes it consists of, in order; the last one computes `output`.
        input: what it normalizes, before any Cast of its own.
        output: the result, gain, bias and Cast included.
        axes: the axes over which the statistics are taken, counted from the end; empty for batch, group and instance.
        epsilon: added to the variance or mean square.
        scale: the gain; None for ones.
        bias: None for zeros.
        groups: groups of channels of a group norm, else 0.
        compute_dtype: the dtype of the statistics when Casts set it apart from that of the input, else None.
        read_only: why it cannot be replaced, in plain words; None when it can.
        sides: nodes that read inner values and only ask for a shape.
    """

    kind: str
    nodes: tuple[oir.Node, ...]
    input: oir.Value
    output: oir.Value
    axes: tuple[int, ...]
    epsilon: float
    scale: Parameter | None = None
    bias: Parameter | None = None
    groups: int = 0
    compute_dtype: oir.DataType | None = None
    read_only: str | None = None
    sides: tuple[oir.Node, ...] = field(default=())

    @property
    def is_one_node(self) -> bool:
        """Whether one operator computes all of it."""
        return len(self.nodes) == 1

    @property
    def outside_reader(self) -> oir.Node | None:
        """A node that reads an inner value and so keeps part of it alive; None when there is none."""
        own = {id(node) for node in (*self.nodes, *self.sides)}
        for node in self.nodes:
            for value in node.outputs:
                if value is self.output:
                    continue
                for user in match.consumers(value):
                    if id(user) not in own:
                        return user
        return None

    @property
    def inner_output(self) -> oir.Value | None:
        """An inner value that is an output of the graph; None when there is none."""
        inner = (value for node in self.nodes for value in node.outputs if value is not self.output)
        return next((value for value in inner if value.is_graph_output()), None)

    def gain(self, size: int) -> np.ndarray:
        """The gain as float64 [size], ones where there is none."""
        return np.ones(size) if self.scale is None else np.broadcast_to(self.scale.read().reshape(-1), (size,))

    def offset(self, size: int) -> np.ndarray:
        """The bias as float64 [size], zeros where there is none."""
        return np.zeros(size) if self.bias is None else np.broadcast_to(self.bias.read().reshape(-1), (size,))

    def affine(self, version: int) -> Affine | str:
        """What an inference batch norm does per channel, or in plain words why it is none.

        Args:
            version: the opset of the model.
        """
        return batch_affine(self.nodes[0], version) if self.kind == "batch" else "its statistics are those of the input"


def find_norm(node: oir.Node | None) -> Norm | None:
    """The normalization that `node` stands for.

    Args:
        node: one operator that normalizes; of a spelled out layer or RMS norm the Sqrt, or the Pow by -0.5, of the
            variance; of a spelled out group norm its InstanceNormalization.

    Returns:
        The view; None when the node is none of these, or gain and bias are no constants.
    """
    from burnish.ir.views.spelled_norm import find_spelled_group, find_spelled_norm

    if node is None:
        return None
    if is_op(node, "Sqrt", "Pow"):
        return find_spelled_norm(node)
    if is_op(node, "InstanceNormalization"):
        return find_spelled_group(node) or _fused(node)
    return _fused(node)


def norms(model: oir.Model) -> Iterator[Norm]:
    """The normalizations of all graphs of the model, in order."""
    for node in walk(model):
        if node.op_type in ("Sqrt", "Pow", *_FUSED):
            found = find_norm(node)
            if found is not None:
                yield found


def _fused(node: oir.Node) -> Norm | None:
    contrib = is_op(node, *_CONTRIB, domain="com.microsoft")
    if not contrib and not is_op(node, *_FUSED) or node.inputs[0] is None:
        return None
    skip = node.op_type.startswith("Skip")
    gain = match.input_of(node, 2 if skip else 1)
    beta = match.input_of(node, 3 if node.op_type == "SkipLayerNormalization" else 2)
    if node.op_type == "SkipSimplifiedLayerNormalization":
        beta = None
    scale, bias = find_parameter(gain), find_parameter(beta)
    if (gain is not None and scale is None) or (beta is not None and bias is None):
        return None
    kind = {
        "BatchNormalization": "batch",
        "GroupNormalization": "group",
        "InstanceNormalization": "instance",
        "RMSNormalization": "rms",
        "SimplifiedLayerNormalization": "rms",
        "SkipSimplifiedLayerNormalization": "rms",
    }.get(node.op_type, "layer")
    axes: tuple[int, ...] = ()
    if kind in ("layer", "rms"):
        first, rank = int(match.attribute(node, "axis", -1)), match.rank(node.inputs[0])
        if first >= 0 and rank is None:
            return None
        axes = tuple(range(first if first < 0 or rank is None else first - rank, 0))
    reason = "it adds the residual as well" if skip else None
    if kind == "batch" and match.attribute(node, "training_mode", 0):
        reason = "it runs in training mode"
    epsilon = float(match.attribute(node, "epsilon", 1e-12 if skip else 1e-5))
    groups = int(match.attribute(node, "num_groups", 0))
    return Norm(kind, (node,), node.inputs[0], node.outputs[0], axes, epsilon, scale, bias, groups, None, reason)
