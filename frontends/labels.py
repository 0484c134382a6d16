"""What goes with the inputs of samples: labels, and the groups that rows come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.frontends.batch import batch_axes
from burnish.ir.errors import InputError

LABELS, GROUPS = ("labels", "label"), ("groups", "group")
"""The names they are given under."""


def taken(arrays: dict[str, Any], names: Sequence[str], model: oir.Model) -> Any:
    """What stands under the first of these names that is there and no input's; it is taken out. None without one."""
    inputs = {value.name for value in model.graph.inputs}
    name = next((name for name in names if name in arrays and name not in inputs), None)
    return None if name is None else arrays.pop(name)


def cut_like(
    array: np.ndarray | None, parts: Sequence[object], stacked: bool, wanted: int | None, name: str, place: str
) -> list[np.ndarray | None]:
    """An array that goes with the inputs, cut as they are.

    Args:
        array: with an entry for each sample or each row.
        parts: what the inputs were cut into.
        stacked: the samples were stacked: there is an entry for each.
        wanted: else how many entries there must be, or several times as many; None where that is not known.
        name: what the array is called.
        place: where it stands.

    Raises:
        InputError: there are not as many entries.
    """
    if array is None:
        return [None] * len(parts)
    if len(parts) == 1 and (array.ndim == 0 or (not stacked and (array.ndim != 1 or wanted is None))):
        return [array]
    count, wanted = (array.shape[0] if array.ndim else 1), len(parts) if stacked else wanted
    if array.ndim == 0 or (count != wanted if stacked else count % max(wanted or 0, 1)):
        raise InputError(
            f"there are {count} {name} for {wanted} samples",
            place=place,
            hint=f"the first axis of `{name}` counts the samples",
        )
    each = count // len(parts)
    return [array[i] if stacked else array[i * each : (i + 1) * each] for i in range(len(parts))]


def groups_of(given: object, feeds: Mapping[str, np.ndarray], model: oir.Model, place: str) -> np.ndarray:
    """What tells where rows come from, [1] or [rows].

    Raises:
        InputError: they are no whole numbers or texts, or neither one nor as many as there are rows.
    """
    found = array_of(given, place).reshape(-1)
    if found.dtype.kind not in "iubUSO":
        raise InputError(
            f"found {found.dtype}, not whole numbers or texts", place=place, hint="rows of one group have the same name"
        )
    if len(found) == 1:
        return found
    try:
        rows = {feeds[name].shape[axis] for name, axis in batch_axes(model).items() if name in feeds}
    except InputError:
        rows = {array.shape[0] if array.ndim else 1 for array in feeds.values()}
    if rows != {len(found)}:
        raise InputError(
            f"there are {len(found)} groups for a sample of {max(rows, default=1)} rows",
            place=place,
            hint="give one for each sample, or one for each row of its batch",
        )
    return found


def array_of(item: Any, place: str) -> np.ndarray:
    """Numbers or texts, as they are given, as an array.

    Raises:
        InputError: they are neither, or lists of several lengths.
    """
    try:
        array = np.asarray(item)
    except Exception as error:
        raise InputError(f"this is no array: {error}", place=place) from error
    texts = array.dtype == object and all(isinstance(element, str) for element in array.flat)
    if array.dtype.kind not in "fiub" and array.dtype.kind not in "US" and not texts and array.dtype.kind != "V":
        raise InputError(
            f"found {type(item).__name__}, not numbers", place=place, hint="give arrays or nested lists of one length"
        )
    return array
