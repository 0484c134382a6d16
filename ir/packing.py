"""Small unsigned integers in bytes, as ONNX and ONNX Runtime store them: the first in the lowest bits."""

from __future__ import annotations

import numpy as np


def pack(levels: np.ndarray, bits: int) -> np.ndarray:
    """The lowest `bits` bits of integers, several to a byte along the last axis.

    Args:
        levels: integers [..., n], signed (then as two's complement) or not.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 [..., ceil(n * bits / 8)]; what is left of the last byte is 0.
    """
    each = 8 // bits
    low = levels.astype(np.uint8) & np.uint8(2**bits - 1)
    missing = -low.shape[-1] % each
    if missing:
        low = np.concatenate([low, np.zeros((*low.shape[:-1], missing), np.uint8)], -1)
    low = low.reshape(*low.shape[:-1], -1, each)
    found = low[..., 0].copy()
    for index in range(1, each):
        found |= low[..., index] << np.uint8(index * bits)
    return np.asarray(found)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned numbers of `bits` bits in bytes [..., n], as uint8 [..., n * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    levels = (packed[..., None].astype(np.uint8) >> shifts) & np.uint8(2**bits - 1)
    return np.asarray(levels.reshape(*packed.shape[:-1], -1))
