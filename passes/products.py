"""Two layers with nothing between them, multiplied into one."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.convolution import Convolution, find_convolution
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.parameter import fits
from burnish.passes.layers import Layer
from burnish.passes.rank import matrices

Pair = tuple[Linear, Linear] | tuple[Convolution, Convolution]


def linear_pair(node: oir.Node) -> tuple[Linear, Linear] | None:
    """The linear layer of `node` behind the one whose output, bias included, it reads."""
    second = find_linear(node)
    first = find_linear(second.input.producer()) if second is not None else None
    return (first, second) if first is not None and second is not None and first.output is second.input else None


def convolution_pair(node: oir.Node) -> tuple[Convolution, Convolution] | None:
    """The convolution of `node` behind the one whose output it reads."""
    second = find_convolution(node)
    first = find_convolution(second.input.producer()) if second is not None else None
    return (first, second) if first is not None and second is not None else None


def obstacle(pair: Pair) -> str | None:
    """Why two layers cannot be one, in plain words; None when they can."""
    first, second = pair
    for layer in pair:
        if layer.read_only:
            return f"{layer.node.op_type} cannot be rewritten: {layer.read_only}"
        if layer.shared:
            return f"{layer.shared[0].op_type} shares the weight of {layer.node.op_type}"
    if isinstance(first, Linear) and isinstance(second, Linear):
        if first.input_axis != -1 or second.input_axis != -1:
            return "the features are on the first axis"
    elif isinstance(second, Convolution) and isinstance(first, Convolution):
        if first.transposed or second.transposed:
            return "one of them is transposed"
        padded = second.auto_pad == "NOTSET" and any(second.pads)
        if any(size != 1 for size in (*second.kernel, *second.strides)) or padded:
            return "the second sees more than the channels of each position"
        if first.groups != second.groups:
            return "the two have different groups"
    if first.node.graph is not second.node.graph:
        return "the first is in another graph"
    if not match.used_once(first.output):
        return "other nodes read what lies between them"
    if isinstance(first, Linear) and second.node.op_type == "Gemm" and first.node.op_type != "Gemm":
        return "a Gemm reads two axes only" if match.rank(first.input) != 2 else None
    return None


def product(pair: Pair) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Weight and bias of the layer that computes what the two do, float64; None when its dtype does not hold them."""
    first, second = pair
    weight = matrices(second) @ matrices(first)
    bias, inner = second.bias(), first.bias()
    if inner is not None:
        passed = matrices(second) @ inner.reshape(len(weight), -1, 1)
        bias = passed.reshape(-1) + (bias if bias is not None else 0.0)
    shape = (_outputs(second), -1, *first.kernel) if isinstance(first, Convolution) else weight.shape[1:]
    weight, dtype = weight.reshape(shape), second.dtype
    if dtype is None or not fits(weight, dtype) or (bias is not None and not fits(bias, dtype)):
        return None
    return weight, bias


def _outputs(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, Linear) else layer.out_channels


def merge(model: oir.Model, pair: Pair, weight: np.ndarray, bias: np.ndarray | None) -> None:
    """Write the one layer in the place of the two."""
    first, second = pair
    if isinstance(first, Convolution):
        for name in ("strides", "pads", "dilations", "auto_pad", "kernel_shape"):
            second.node.attributes.pop(name, None)
            if name in first.node.attributes:
                second.node.attributes.add(first.node.attributes[name])
    edit.set_input(second.node, 0, first.input)
    second.write(model, weight, bias)
