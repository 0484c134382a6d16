"""Rounding a matrix to blocks of integers along its inputs."""

from __future__ import annotations

from typing import Literal

import numpy as np

from burnish.passes.grids import Grid, Scales, fit, quantize

Rounding = Literal["nearest", "mse"]


def rounded(
    weight: np.ndarray, grid: Grid, block: int, rounding: Rounding, *, mirrored: bool, dtype: np.dtype[np.floating]
) -> tuple[np.ndarray, Scales]:
    """The integers for a matrix, and their scales.

    Args:
        weight: float64 [out, in].
        grid: the integers.
        block: how many neighbours of a row share a scale.
        rounding: `nearest` takes the smallest steps that reach all numbers of a block, `mse` those of the least sum of
            squared errors.
        mirrored: scales may be negative, see `burnish.passes.grids.fit`.
        dtype: of the scales.

    Raises:
        InputError: the numbers are not finite.
    """
    scales = fit(weight, grid, 1, block, "mse" if rounding == "mse" else "minmax", mirrored=mirrored, dtype=dtype)
    return quantize(weight, scales), scales
