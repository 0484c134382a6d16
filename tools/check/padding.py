"""Which elements of an output count: not those of positions that a mask of the sample leaves out.

What a model computes at padding is read by nobody, and exporters differ there: a position that may look at nothing is
NaN, a mean of all, or anything else, by how the mask is spelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from burnish.tools.check.sketch import are_numbers

Roles = Mapping[str, Mapping[str, object]]


class Padding:
    """The masks of one sample.

    Args:
        feeds: the inputs, by name.
        roles: what they mean, as a lock records it.
    """

    def __init__(self, feeds: Mapping[str, np.ndarray], roles: Roles) -> None:
        told = [(array, roles[name]) for name, array in feeds.items() if name in roles and array.ndim == 2]
        masks = [(array, role) for array, role in told if role["kind"] == "mask" and not role.get("additive")]
        self._masks = [array.astype(np.float64) == role.get("kept", 1) for array, role in masks]
        self._lengths = {array.shape[1] for array, role in told if role["kind"] in ("ids", "positions")}

    def counted(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """Truth values that spread to an output of this shape; None where all of it counts.

        The first axis is that of the rows. Positions are on the second axis of three, and on the third of four, as the
        keys and values of a cache have them; where no axis is that of a mask, rows that a mask leaves out whole do not
        count. With several masks a position counts that any of those that fit it lets through.
        """
        masks = [mask for mask in self._masks if shape and len(mask) == shape[0]]
        if not masks:
            return None
        rows = np.logical_and.reduce([mask.any(axis=1) for mask in masks])
        counts = rows.reshape(-1, *[1] * (len(shape) - 1))
        axis = {3: 1, 4: 2}.get(len(shape))
        if axis is not None:
            aligned = [self._aligned(mask, shape[axis]) for mask in masks]
            fitting = [one for one in aligned if one is not None]
            spread = [size if number in (0, axis) else 1 for number, size in enumerate(shape)]
            if fitting:
                counts = counts & np.logical_or.reduce(fitting).reshape(spread)
        return None if counts.all() else counts

    def without(self, array: Any) -> Any:
        """An output with 0 where it does not count; what is no array of numbers counts as it is."""
        if not isinstance(array, np.ndarray) or not are_numbers(array):
            return array
        counted = self.counted(array.shape)
        return array if counted is None else np.where(counted, array, np.zeros((), array.dtype))

    def _aligned(self, mask: np.ndarray, size: int) -> np.ndarray | None:
        """The columns of a mask that are the positions of an axis: all, or the last for what is new behind a past."""
        if mask.shape[1] == size:
            return mask
        return mask[:, mask.shape[1] - size :] if size in self._lengths and 0 < size < mask.shape[1] else None
