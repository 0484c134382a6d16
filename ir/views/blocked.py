"""Reading the weight of `com.microsoft::MatMulNBits`."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.packing import unpack


def matmul_nbits_weight(node: oir.Node) -> np.ndarray:
    """The weight of a MatMulNBits whose inputs are constants, float64 [N, K].

    Layout, from ONNX Runtime's documentation of contrib operators: packed [N, blocks, block_size * bits / 8], low bits
    first; one scale a block; zero points packed in the same way or, when floating point, one a block, by default
    2^(bits - 1).
    """
    features, out = int(match.attribute(node, "K")), int(match.attribute(node, "N"))
    bits, block = int(match.attribute(node, "bits", 4)), int(match.attribute(node, "block_size"))
    blocks = -(-features // block)
    packed = np.asarray(weights.constant(node.inputs[1])).reshape(out, blocks, -1)
    scales = np.asarray(weights.exact(node.inputs[2])).reshape(out, blocks, 1)  # type: ignore[arg-type]
    zero = match.input_of(node, 3)
    if zero is None:
        offset = np.full((out, blocks, 1), 2.0 ** (bits - 1))
    else:
        points = np.asarray(weights.constant(zero))
        flat = points if points.dtype.kind == "f" else unpack(points.reshape(out, -1), bits)[:, :blocks]
        offset = flat.astype(np.float64).reshape(out, blocks, 1)
    levels = unpack(packed, bits).astype(np.float64)
    return np.asarray(((levels - offset) * scales).reshape(out, -1)[:, :features])
