"""What an operator's implementation is given, and the table they are found in."""

# mypy: disable-error-code="no-any-return"
# NumPy types the results of arithmetic on its arrays as Any.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

Array = np.ndarray
Result = Any
Operator = Callable[..., Result]

REAL = (oir.DataType.FLOAT, oir.DataType.FLOAT16, oir.DataType.BFLOAT16, oir.DataType.DOUBLE)
"""The dtypes that are computed in float64; narrower ones keep their own values."""


@dataclass(frozen=True)
class Call:
    """One node as its implementation sees it.

    Attributes:
        op: the operator.
        attributes: Python values by name; tensors are arrays, floats are not rounded to float32.
        outputs: how many outputs the node declares.
        version: the opset of the operator's domain.
    """

    op: str
    attributes: Mapping[str, Any]
    outputs: int
    version: int

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name`, or `default`."""
        return self.attributes.get(name, default)


OPERATORS: dict[tuple[str, str], Operator] = {}
"""By (domain, operator): `f(call, *inputs)` gives the output or a tuple of outputs; absent inputs are None."""


def operator(*names: str, domain: str = "") -> Callable[[Operator], Operator]:
    """Enter a function into `OPERATORS` under `names`."""

    def enter(function: Operator) -> Operator:
        for name in names:
            OPERATORS[domain, name] = function
        return function

    return enter


def is_real(array: Any) -> bool:
    """Whether `array` holds what the model calls a float."""
    return isinstance(array, np.ndarray) and array.dtype == np.float64


def cast(array: Array, dtype: oir.DataType) -> Array:
    """`array` in `dtype`, where every real dtype is float64 and text is an object array of str."""
    if dtype in REAL:
        if array.dtype.kind in "OSU":
            return array.astype(str).astype(np.float64)
        return array.astype(np.float64, copy=False)
    if dtype == oir.DataType.STRING:
        return _text(array)
    if array.dtype.kind in "OSU":
        array = array.astype(str).astype(np.float64)
    target = dtype.numpy()
    if array.dtype == np.float64 and target.kind in "iu":
        with np.errstate(invalid="ignore"):
            return np.trunc(array).astype(np.int64 if target != np.uint64 else target).astype(target)
    return array.astype(target, copy=False)


def _text(array: Array) -> Array:
    if array.dtype.kind in "OSU":
        return array
    spell: Callable[[Any], str] = (lambda x: f"{x:.8g}") if array.dtype.kind == "f" else str
    out = np.empty(array.shape, object)
    out.reshape(-1)[:] = [spell(x) for x in array.reshape(-1).tolist()]
    return out
