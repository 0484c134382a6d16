"""What is put on a shelf comes back as it was, from memory or from disk."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from burnish.passes.shelf import Shelf

ARRAYS = [
    np.arange(12.0).reshape(3, 4),
    np.arange(12.0).reshape(3, 4).T,
    np.array(7, np.int64),
    np.zeros((0, 3), np.float32),
    np.array([True, False]),
    np.arange(5).astype(ml_dtypes.bfloat16),
    np.array(["a", "b"], object),
]


@pytest.mark.parametrize("limit", [1 << 20, 100, 0])
def test_arrays_come_back(limit: int) -> None:
    shelf = Shelf(limit)
    for number, array in enumerate(ARRAYS):
        shelf.put(("a", number), array)
    assert shelf.held <= limit
    assert shelf.held + shelf.spilled == sum(array.nbytes for array in ARRAYS if array.dtype.kind != "O")
    for number, array in enumerate(ARRAYS):
        found = shelf.get(("a", number))
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
    shelf.close()
