"""The view of a linear layer, y = x Wᵀ + b over one axis of x, however the exporter spelled it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.blocked import matmul_nbits_weight
from burnish.ir.views.parameter import Parameter, find_parameter, same_shape, write_input
from burnish.ir.walk import is_op, walk

_CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Linear:
    """A Gemm, MatMul or MatMul and Add with constant weights, or a contrib form of it that can only be read.

    Attributes:
        node: the Gemm, MatMul, FusedMatMul or MatMulNBits.
        add: the Add of the bias behind a MatMul, if there is one.
        parameter: the constant weight; None for MatMulNBits.
        bias_parameter: the constant bias, if there is one.
        in_features: features of the input.
        out_features: features of the output.
        stored_transposed: the weight is stored as [out, in].
        input_axis: the axis of the input that holds the features: -1, or 0 for a Gemm with transA.
    """

    node: oir.Node
    add: oir.Node | None
    parameter: Parameter | None
    bias_parameter: Parameter | None
    in_features: int
    out_features: int
    stored_transposed: bool
    input_axis: int

    @property
    def nodes(self) -> tuple[oir.Node, ...]:
        """The nodes the layer consists of."""
        return (self.node,) if self.add is None else (self.node, self.add)

    @property
    def input(self) -> oir.Value:
        """What the layer reads."""
        return self.node.inputs[0]  # type: ignore[return-value]

    @property
    def output(self) -> oir.Value:
        """What the layer computes, bias included."""
        return self.nodes[-1].outputs[0]

    @property
    def shared(self) -> list[oir.Node]:
        """Other nodes that read the same weight."""
        return self.parameter.others(self.node) if self.parameter is not None else []

    @property
    def dtype(self) -> oir.DataType | None:
        """The dtype the layer computes in; None when unknown."""
        return self.parameter.dtype if self.parameter is not None else self.output.dtype

    @property
    def read_only(self) -> str | None:
        """Why the layer cannot be rewritten exactly, in plain words; None when it can."""
        if self.node.domain == _CONTRIB:
            return f"its weight is held by a {self.node.op_type}"
        if self.parameter is None or self.parameter.quantized:
            return "its weight is quantized"
        return "its weight is stored in fewer bits" if self.parameter.widened else None

    @property
    def bias_is_free(self) -> bool:
        """Whether a bias costs no node: there is one, or the node takes one."""
        return self.bias_parameter is not None or is_op(self.node, "Gemm")

    def weight(self) -> np.ndarray:
        """The weight, float64 [out, in], alpha included."""
        if self.parameter is None:
            return matmul_nbits_weight(self.node)
        array = self.parameter.read().reshape(self.parameter.shape[-2:])
        alpha = float(match.attribute(self.node, "alpha", 1.0))
        return (array if self.stored_transposed else array.T) * alpha

    def bias(self) -> np.ndarray | None:
        """The bias, float64 [out], beta included; None when there is none."""
        if self.bias_parameter is None:
            return None
        beta = float(match.attribute(self.node, "beta", 1.0)) if self.add is None else 1.0
        return np.broadcast_to(self.bias_parameter.read().reshape(-1), (self.out_features,)) * beta

    def write(self, model: oir.Model, weight: np.ndarray, bias: np.ndarray | None) -> Linear:
        """Give the layer a new weight and bias; the other users of a shared weight keep the old one.

        Args:
            model: the model the layer is in.
            weight: float64 [out, in]; may have other sizes than before, the caller answers for input and output.
            bias: float64 [out], or None for no bias.

        Returns:
            The layer as it is now; this view is out of date.

        Raises:
            ValueError: the layer can only be read.
        """
        dtype = self.dtype
        if self.parameter is None or dtype is None or self.node.domain == _CONTRIB:
            raise ValueError(f"{match.describe(self.node)} cannot be rewritten")
        stem = self.parameter.source.name or "weight"
        stored = weight if self.stored_transposed else weight.T
        lead = (1,) * (len(self.parameter.shape) - 2)
        write_input(model, self.node, 1, stored.reshape(lead + stored.shape), dtype, stem)
        self.node.attributes.pop("alpha", None)
        if is_op(self.node, "Gemm"):
            self.node.attributes.pop("beta", None)
            if bias is not None:
                write_input(model, self.node, 2, bias, dtype, f"{stem}_bias")
            elif match.input_of(self.node, 2) is not None:
                edit.set_input(self.node, 2, None)
                self.node.resize_inputs(2)
        elif self.add is not None:
            if bias is None:
                edit.bypass(self.add, self.node.outputs[0])
            else:
                side = 1 if self.add.inputs[0] is self.node.outputs[0] else 0
                write_input(model, self.add, side, bias, dtype, f"{stem}_bias")
        elif bias is not None:
            return _append_bias(model, self, bias, dtype, f"{stem}_bias")
        found = find_linear(self.node)
        if found is None:
            raise ValueError(f"{match.describe(self.node)} is no linear layer any more")
        return found


def _append_bias(model: oir.Model, layer: Linear, bias: np.ndarray, dtype: oir.DataType, name: str) -> Linear:
    old = layer.node
    product = edit.make("MatMul", old.inputs, like=old)
    value = same_shape(product, old.outputs[0])
    add = edit.make("Add", [value, edit.add_rounded(model, name, bias, dtype)], like=old)
    same_shape(add, old.outputs[0])
    edit.replace_node(old, [product, add])
    found = find_linear(product)
    if found is None:
        raise ValueError(f"{match.describe(product)} is no linear layer")
    return found


def find_linear(node: oir.Node | None, *, with_add: bool = True) -> Linear | None:
    """The linear layer of a Gemm, MatMul, FusedMatMul or MatMulNBits, or of the Add of a MatMul's bias.

    Args:
        node: any node.
        with_add: take the Add behind a MatMul as the layer's bias; else the MatMul is seen alone.
    """
    if is_op(node, "Add") and node is not None:
        pair = match.operand(node, "MatMul")
        found = find_linear(pair[0]) if pair is not None else None
        return found if found is not None and found.add is node else None
    if is_op(node, "Gemm") and node is not None:
        return _gemm(node)
    if is_op(node, "MatMul") and node is not None:
        return _matmul(node, with_add)
    if is_op(node, "FusedMatMul", domain=_CONTRIB) and node is not None:
        return _fused(node)
    if is_op(node, "MatMulNBits", domain=_CONTRIB) and node is not None:
        return _blocked(node)
    return None


def linears(model: oir.Model) -> Iterator[Linear]:
    """The linear layers of all graphs of the model, in order."""
    for node in walk(model):
        if node.op_type in ("Gemm", "MatMul", "FusedMatMul", "MatMulNBits"):
            found = find_linear(node)
            if found is not None:
                yield found


def _gemm(node: oir.Node) -> Linear | None:
    parameter = find_parameter(node.inputs[1])
    if parameter is None or len(parameter.shape) != 2 or weights.is_constant(node.inputs[0]):
        return None
    stored_transposed = bool(match.attribute(node, "transB", 0))
    out, features = parameter.shape if stored_transposed else parameter.shape[::-1]
    bias = None
    value = match.input_of(node, 2)
    if value is not None and float(match.attribute(node, "beta", 1.0)) != 0.0:
        bias = find_parameter(value)
        if bias is None or not _is_bias(bias.shape, out, 2):
            return None
    return Linear(
        node, None, parameter, bias, features, out, stored_transposed, 0 if match.attribute(node, "transA", 0) else -1
    )


def _matmul(node: oir.Node, with_add: bool) -> Linear | None:
    parameter = find_parameter(node.inputs[1])
    if parameter is None or weights.is_constant(node.inputs[0]) or find_parameter(node.inputs[0]) is not None:
        return None
    rank = match.rank(node.inputs[0])
    lead = parameter.shape[:-2]
    if (
        len(parameter.shape) < 2
        or any(d != 1 for d in lead)
        or (lead and (rank is None or rank < len(parameter.shape)))
    ):
        return None
    features, out = parameter.shape[-2:]
    add = match.sole_consumer(node.outputs[0], "Add") if with_add and rank != 1 else None
    bias = None
    if add is not None:
        other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
        bias = find_parameter(other)
        if bias is None or not _is_bias(bias.shape, out, rank or 2) or add.graph is not node.graph:
            add = bias = None
    return Linear(node, add, parameter, bias, features, out, False, -1)


def _fused(node: oir.Node) -> Linear | None:
    parameter = find_parameter(node.inputs[1])
    special = any(match.attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if parameter is None or len(parameter.shape) != 2 or special:
        return None
    stored_transposed = bool(match.attribute(node, "transB", 0))
    out, features = parameter.shape if stored_transposed else parameter.shape[::-1]
    return Linear(node, None, parameter, None, features, out, stored_transposed, -1)


def _blocked(node: oir.Node) -> Linear | None:
    constants = all(weights.is_constant(v) for v in node.inputs[1:] if v is not None)
    bias = find_parameter(match.input_of(node, 5))
    if not constants or match.input_of(node, 4) is not None:
        return None
    return Linear(node, None, None, bias, match.attribute(node, "K"), match.attribute(node, "N"), True, -1)


def _is_bias(shape: tuple[int, ...], out: int, rank: int) -> bool:
    """Whether a constant of `shape` adds one number (or the same number) to each feature of a result of `rank`."""
    return len(shape) <= rank and all(d == 1 for d in shape[:-1]) and (not shape or shape[-1] in (1, out))
