"""What becomes of a constant of the model: a Python value, a parameter, or a buffer."""

from __future__ import annotations

from typing import Any

import onnx_ir as oir

from burnish.backends.fx import registry
from burnish.ir.walk import STANDARD_DOMAINS

_LARGEST = 16
"""Integers of more elements than this are tensors: they are a table, not the dimensions of something."""
_LARGEST_STATIC = 64
_TRAINED = (oir.DataType.FLOAT, oir.DataType.FLOAT16, oir.DataType.BFLOAT16, oir.DataType.DOUBLE)
_LAYERS = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu", "LSTM", "GRU", "RNN", "BatchNormalization",
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "GroupNormalization",
    "InstanceNormalization", "FusedConv", "FusedMatMul", "FusedGemm", "Gather", "Attention",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "BiasGelu", "FastGelu", "MatMulNBits", "MoE",
})  # fmt: skip
"""Operators for which a single number is a weight; elsewhere it is an epsilon, a scale or a bound."""
_MOVES = ("Identity", "Cast", "Concat", "Slice", "Gather", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Expand")
_ASKS_SHAPE = ("Shape", "Size", "CastLike")


def literal(tensor: oir.TensorProtocol, *, static: bool = False) -> Any:
    """A small constant as a number or nested lists: int64 and bool up to rank 2; any number where `static`.

    Returns:
        None when it has to be a tensor.
    """
    if (
        tensor.size > (_LARGEST_STATIC if static else _LARGEST)
        or len(tensor.shape) > 2
        or (tensor.size == 0 and len(tensor.shape) > 1)
    ):
        return None
    if tensor.dtype in (oir.DataType.INT64, oir.DataType.BOOL):
        return tensor.numpy().tolist()
    if static and (tensor.dtype in _TRAINED or tensor.dtype.is_integer()):
        array = tensor.numpy()
        return array.astype("float64" if tensor.dtype in _TRAINED else "int64").tolist()
    return None


def trained(value: oir.Value, tensor: oir.TensorProtocol, wish: bool | None) -> bool:
    """Whether a constant is a parameter.

    Args:
        value: the initializer or the output of the Constant node.
        tensor: its tensor.
        wish: the caller's decision, None for the rule: floats that some layer reads as a weight.
    """
    if tensor.dtype not in _TRAINED or tensor.size == 0:
        return False
    if wish is not None:
        return wish
    uses = [use for use in value.uses() if use.node.op_type not in _ASKS_SHAPE]
    if tensor.size == 1:
        uses = [use for use in uses if use.node.op_type in _LAYERS]
    return any(not _fixed(use.node, use.idx) for use in uses)


def _fixed(node: oir.Node, index: int, depth: int = 8) -> bool:
    """Whether input `index` is a statistic, a scale or a bound, or becomes nothing else on its way."""
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    entry = registry.find(domain, node.op_type, 10**9)
    if entry is not None and (index in entry.fixed or index in entry.static):
        return True
    if node.op_type not in _MOVES or not depth or node.outputs[0].is_graph_output():
        return False
    return all(_fixed(use.node, use.idx, depth - 1) for use in node.outputs[0].uses())
