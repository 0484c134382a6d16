"""Products with, and lookups in, matrices of packed integers, as ONNX Runtime's own operators store them.

What ONNX Runtime may round on the way (`accuracy_level`) is not: this is what the operators mean.
"""

from __future__ import annotations

import numpy as np

from burnish.backends.reference.contrib import DOMAIN
from burnish.backends.reference.registry import Array, Call, operator
from burnish.ir.packing import unpack


def _numbers(levels: Array, scales: Array, zeros: Array | None, place: Array, bits: int) -> Array:
    """The numbers [rows, width] behind unsigned integers [rows, width]; `place` is the block of each column."""
    rows = len(levels)
    blocks = scales.size // max(rows, 1)
    offset = np.full((rows, blocks), 2.0 ** (bits - 1))
    if zeros is not None:
        floating = zeros.dtype.kind == "f"
        offset = (zeros if floating else unpack(zeros.reshape(rows, -1), bits)[:, :blocks]).reshape(rows, blocks)
    return np.asarray((levels - offset.astype(np.float64)[:, place]) * scales.reshape(rows, blocks)[:, place])


@operator("MatMulNBits", domain=DOMAIN)
def _matmul_n_bits(
    call: Call, x: Array, packed: Array, scales: Array, zeros: Array | None = None, order: Array | None = None,
    bias: Array | None = None,
) -> Array:  # fmt: skip
    bits, block, features, out = (int(call.get(name, 4)) for name in ("bits", "block_size", "K", "N"))
    place = np.arange(features) // block if order is None else order
    levels = unpack(packed.reshape(out, -1, block * bits // 8), bits).reshape(out, -1)[:, :features]
    y = np.asarray(x @ _numbers(levels, scales, zeros, place, bits).T)
    return y if bias is None else y + bias


@operator("GatherBlockQuantized", domain=DOMAIN)
def _gather_block_quantized(
    call: Call, packed: Array, places: Array, scales: Array, zeros: Array | None = None
) -> Array:
    bits, block = int(call.get("bits", 4)), int(call.get("block_size", 128))
    if call.get("gather_axis", 0) or packed.ndim != 2 or call.get("quantize_axis", 1) not in (1, -1):
        raise NotImplementedError("a table that is not looked up by rows")
    if packed.dtype != np.uint8:
        raise NotImplementedError(f"a table of {packed.dtype}")
    at = places.reshape(-1)
    own = None if zeros is None else zeros[at]
    levels = unpack(packed[at], bits)
    found = _numbers(levels, scales[at], own, np.arange(levels.shape[1]) // block, bits)
    return found.reshape(*places.shape, -1)
