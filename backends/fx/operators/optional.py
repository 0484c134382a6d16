"""Optional values: None where there is none, else the tensor or sequence itself."""

from __future__ import annotations

from typing import Any

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Value


@operator("Optional")
def optional(x: Value = None, type: Any = None) -> Value:
    """The value as an optional one, none without an input."""
    return x


@operator("OptionalHasElement")
def optional_has_element(x: Value = None) -> bool:
    """Whether there is a value, as a host value."""
    return x is not None


@operator("OptionalGetElement")
def optional_get_element(x: Value) -> Value:
    """The value.

    Raises:
        ValueError: there is none.
    """
    if x is None:
        raise ValueError("the optional value is absent")
    return x
