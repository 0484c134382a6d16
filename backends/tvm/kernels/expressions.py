"""Sizes of TVM as C++, and its dtypes as DLPack's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tvm import tirx

from burnish.backends.tvm.registry import Unsupported

_OPERATORS = {"Add": "({} + {})", "Sub": "({} - {})", "Mul": "({} * {})"}
_CALLS = {"FloorDiv": "floordiv", "FloorMod": "floormod", "Min": "std::min<int64_t>", "Max": "std::max<int64_t>"}
_DTYPE = re.compile(r"(bool|bfloat|float|uint|int)(\d*)\Z")
_CODES = {"int": "kDLInt", "uint": "kDLUInt", "float": "kDLFloat", "bfloat": "kDLBfloat", "bool": "kDLBool"}


def is_variable(size: Any) -> bool:
    """Whether a size is one symbol alone."""
    return isinstance(size, tirx.Var)


def is_size(value: Any) -> bool:
    """Whether a value is a number that TVM computes from sizes."""
    return isinstance(value, tirx.Var | tirx.IntImm) or type(value).__name__ in (*_OPERATORS, *_CALLS, "Cast")


def variables(size: Any) -> Iterator[Any]:
    """The symbols in a size."""
    if isinstance(size, tirx.Var):
        yield size
    elif not isinstance(size, int | tirx.IntImm):
        for name in ("a", "b", "value"):
            if hasattr(size, name):
                yield from variables(getattr(size, name))


def text(size: Any, names: Mapping[Any, str]) -> str:
    """A size as a C++ expression of `int64_t`.

    Raises:
        Unsupported: an operation that sizes do not need.
    """
    if isinstance(size, int | tirx.IntImm):
        return f"INT64_C({int(size)})"
    if isinstance(size, tirx.Var):
        return names[size]
    kind = type(size).__name__
    if kind == "Cast":
        return text(size.value, names)
    if kind in _OPERATORS:
        return _OPERATORS[kind].format(text(size.a, names), text(size.b, names))
    if kind in _CALLS:
        return f"{_CALLS[kind]}({text(size.a, names)}, {text(size.b, names)})"
    raise Unsupported(f"a size is computed by `{kind}`")


def count(shape: Sequence[Any], likely: int) -> int:
    """How many elements a shape has if every symbol were `likely`."""
    return math.prod(_value(size, likely) for size in shape)


def _value(size: Any, likely: int) -> int:
    if isinstance(size, int | tirx.IntImm):
        return int(size)
    if isinstance(size, tirx.Var):
        return likely
    kind = type(size).__name__
    if kind == "Cast":
        return _value(size.value, likely)
    a, b = _value(size.a, likely), _value(size.b, likely)
    operations = {"Add": a + b, "Sub": a - b, "Mul": a * b, "Min": min(a, b), "Max": max(a, b)}
    operations |= {"FloorDiv": a // b, "FloorMod": a % b} if b else {}
    return operations.get(kind, likely)


def bits_of(dtype: str) -> int:
    """Bits of an element in memory."""
    found = _DTYPE.match(dtype)
    if found is None:
        raise Unsupported(f"tensors of `{dtype}` are not passed on")
    return int(found[2] or 8)


def bytes_of(dtype: str) -> int:
    """Bytes of an element in memory.

    Raises:
        Unsupported: elements share a byte, or DLPack has no such dtype.
    """
    bits = bits_of(dtype)
    if bits % 8:
        raise Unsupported(f"tensors of `{dtype}` are not passed on")
    return bits // 8


def dlpack(dtype: str) -> str:
    """The initializer of a `DLDataType`."""
    found = _DTYPE.match(dtype)
    assert found is not None
    return f"DLDataType{{{_CODES[found[1]]}, {bits_of(dtype)}, 1}}"


def plain(size: Any) -> str:
    """A size as a reader writes it."""
    return str(int(size)) if isinstance(size, int | tirx.IntImm) else str(size)
