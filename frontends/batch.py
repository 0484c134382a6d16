"""Inputs of any batch size from one sample of a model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from burnish.frontends.dims import axes_of, free_symbols
from burnish.frontends.roles import required_inputs, roles
from burnish.ir.errors import InputError


def batch_axes(model: oir.Model) -> dict[str, int]:
    """The axis of each input that counts the rows of a batch; inputs without one are left out.

    It is the axis of the symbol that stands first in an input of several axes, wherever else that symbol stands: a
    recurrent state of dimensions [2, batch, 128] has its batch on axis 1.

    Raises:
        InputError: no input has such an axis, an axis is an expression of it, or an input has no known rank.
    """
    values = required_inputs(model)
    for value in values:
        if value.shape is None:
            raise InputError("the input has no declared rank", place=f"input `{value.name}`")
    axes = axes_of(values, roles(model))
    symbols = {symbol for symbol, kind in axes.kinds.items() if kind == "batch"}
    found: dict[str, int] = {}
    for name, dims in axes.inputs.items():
        for axis, dim in enumerate(dims):
            if isinstance(dim, str) and dim in symbols:
                found.setdefault(name, axis)
            elif not isinstance(dim, (int, str)) and symbols & free_symbols(dim):
                raise InputError(
                    f"axis {axis} is `{dim.value}`, which depends on the batch",
                    place=f"input `{name}`",
                    hint="give samples of the batch you want with `--data`",
                )
    if not found:
        fixed = ", ".join(f"`{value.name}` {value.shape}" for value in values) or "there are none"
        raise InputError(
            f"the batch is fixed: no input has a dynamic first axis ({fixed})",
            hint="leave `--batch` out, or export the model with a dynamic batch",
        )
    return found


def with_rows(feeds: Mapping[str, np.ndarray], axes: Mapping[str, int], rows: int) -> dict[str, np.ndarray]:
    """`feeds` with `rows` rows: those they have, over and over.

    Args:
        feeds: arrays by input name, at least one row each.
        axes: as from `batch_axes`.
        rows: the batch wanted.

    Raises:
        InputError: there is no row.
    """
    found = {}
    for name, array in feeds.items():
        axis = axes.get(name)
        if axis is not None and not array.shape[axis]:
            raise InputError("the sample has no rows to repeat", place=f"input `{name}`")
        found[name] = array if axis is None else array.take(np.arange(rows) % array.shape[axis], axis=axis)
    return found
