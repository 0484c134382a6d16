"""Whether a node computes each token for itself, so that tokens may be given one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference

_ALONE = frozenset(
    """
    Abs Add And BiasGelu Cast CastLike Ceil Clip Cos DequantizeLinear Div Elu Equal Erf Exp FastGelu Floor Gelu Greater
    GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg
    Not Or PRelu Pow QuantizeLinear QuickGelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub
    Sum Swish Tan Tanh ThresholdedRelu Where Xor BitwiseAnd Dropout Expand
    RotaryEmbedding MoE QMoE MatMulNBits GatherBlockQuantized DynamicQuantizeMatMul
    """.split()
)
"""Operators that compute each element, or each row of features, for itself."""

_MOVES = frozenset("Reshape Transpose Squeeze Unsqueeze Flatten Shape Size".split())
_LAST = frozenset(
    """
    LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization
    SkipSimplifiedLayerNormalization
    """.split()
)
"""Norms whose statistics run from `axis`, the last one where there is none, to the end."""

_ALONG = frozenset("Softmax LogSoftmax Hardmax ArgMax ArgMin TopK Concat Split LpNormalization".split())
"""Operators along the axis of their attribute."""


def mixes(node: oir.Node, facts: Inference) -> bool:
    """Whether a node may compute something of several tokens, or is not known not to."""
    if node.op_type in _ALONE or node.op_type in _MOVES:
        return False
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return True
    return any(not isinstance(size, int) for size in _together(node, shape, facts))


def _together(node: oir.Node, shape: Sequence[Dim], facts: Inference) -> list[Dim | None]:
    """The sizes of the axes along which a node computes with several elements; [None] when that is not known."""
    rank, op = len(shape), node.op_type
    if op in _LAST:
        return list(shape[match.attribute(node, "axis", -1) % rank :])
    if op in _ALONG:
        return [shape[match.attribute(node, "axis", 0 if op in ("ArgMax", "ArgMin", "Split") else -1) % rank]]
    if op.startswith("Reduce"):
        axes = match.axes_of(node)
        return [None] if axes is None else [shape[axis % rank] for axis in axes]
    if op in ("MatMul", "FusedMatMul", "MatMulInteger"):
        return [shape[-2] if match.attribute(node, "transA", 0) else shape[-1]]
    if op == "Gemm":
        return [shape[0] if match.attribute(node, "transA", 0) else shape[-1]]
    if op == "Slice":
        axes = facts.numbers(match.input_of(node, 3))
        return [None] if axes is None else [shape[axis % rank] for axis in axes]
    if op == "Gather":
        return [shape[match.attribute(node, "axis", 0) % rank]]
    return [None]
