"""The inputs of one call besides the caches: ids, masks, positions and lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.backends.decoding.ports import InputPort, Ports
from burnish.ir.errors import InputError

Array = NDArray[Any]
_HIDDEN = -6e4
"""Added to the scores of what is hidden: small enough for any softmax, and a number in float16 too."""


def inputs(ports: Ports, ids: NDArray[np.int64], lengths: NDArray[np.int64], slots: int) -> dict[str, Array]:
    """The arrays by name.

    Args:
        ports: of the decoder.
        ids: [rows, n], each a token of its row.
        lengths: tokens that each row has in the caches, [rows].
        slots: length of the caches.

    Raises:
        InputError: the rows have different lengths and an input has no axis for them.
    """
    rows, new = ids.shape
    positions = lengths[:, None] + np.arange(new)
    if ports.limit is not None:
        positions = np.minimum(positions, ports.limit - 1)
    longest = int(lengths.max(initial=0)) + new
    made: dict[str, Array] = {}
    for port in ports.inputs:
        if port.kind == "ids":
            found: Array = ids
        elif port.kind == "positions":
            found = positions[:1] if port.shape[0] == 1 and rows > 1 and _alike(port, lengths) else positions
        elif port.kind == "slots":
            found = slots + np.arange(new)
        elif port.kind == "mask":
            found = _mask(port, ports.packing, lengths, slots, new)
        elif port.kind == "total":
            found = np.asarray(longest).reshape([1] * len(port.shape))
        else:
            found = lengths + new - (port.kind == "ends")
            found = found.reshape(rows, *[1] * (len(port.shape) - 1))
        made[port.name] = np.ascontiguousarray(found.astype(port.dtype)).reshape(found.shape)
    return made


def _alike(port: InputPort, lengths: NDArray[np.int64]) -> bool:
    if len(set(lengths.tolist())) > 1:
        raise InputError(f"the input `{port.name}` has one row of positions for rows of different lengths")
    return True


def _mask(port: InputPort, packing: str, lengths: NDArray[np.int64], slots: int, new: int) -> Array:
    """[rows, slots + new], or [rows, 1, new, slots + new] with what is later hidden."""
    rows = len(lengths)
    if packing == "start":
        longest = int(lengths.max(initial=0)) + new
        through = np.arange(longest) < (lengths + new)[:, None]
    else:
        through = np.arange(slots + new) >= (slots - lengths)[:, None]
    if len(port.shape) == 4:
        total = through.shape[1]
        if packing == "start":
            own = np.arange(total) <= (lengths[:, None] + np.arange(new))[:, :, None]
        else:
            own = np.broadcast_to(np.arange(total) <= (slots + np.arange(new))[:, None], (rows, new, total))
        through = (through[:, None, :] & own)[:, None]
    if not port.additive:
        return through if port.kept else ~through
    return np.where(through, 0, _HIDDEN)
