"""The table of operators that can be given to TVM, and how to add one.

An operator is one function, entered under its ONNX name and the first opset it is for:

    @lowers("Softmax", since=13)
    def softmax(make, x, axis=-1):
        return relax.op.nn.softmax(x, axis)

* Inputs arrive by position as Relax expressions, None where the model leaves one out; attributes as keyword arguments
  under their ONNX names. An attribute without a parameter is never ignored: the node is then refused.
* `sizes=(1,)`: these inputs arrive as lists of sizes, plain numbers or `tirx` expressions, as far as they are proven;
  a node whose sizes depend on data is refused.
* `make` (`burnish.backends.tvm.lowering.Maker`) emits expressions and knows shapes and dtypes.
* The result is one expression, or a tuple of one for each output with `several=True`.
* `Unsupported` says why a node cannot be given to TVM: it then stays on ONNX Runtime.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]


class Unsupported(Exception):
    """A node that cannot be given to TVM, with the reason."""


@dataclass(frozen=True)
class Entry:
    """One entry of the table.

    Attributes:
        function: what lowers it.
        since: the first opset of the domain it is for.
        sizes: inputs that arrive as lists of sizes.
        several: whether the function returns a tuple of outputs.
        attributes: the names of the attributes it understands.
        most: how many inputs it takes; None for any number.
    """

    function: Function
    since: int
    sizes: tuple[int, ...]
    several: bool
    attributes: frozenset[str]
    most: int | None = None


_TABLE: dict[tuple[str, str], list[Entry]] = {}


def lowers(
    *names: str,
    domain: str = "",
    since: int = 1,
    sizes: tuple[int, ...] = (),
    several: bool = False,
    more: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Enter a function into the table under `names`; `more` names the attributes it takes as `**options`."""

    def enter(function: Function) -> Function:
        found = list(inspect.signature(function).parameters.values())
        attributes = frozenset(one.name for one in found if one.kind is one.KEYWORD_ONLY) | set(more)
        most: int | None = sum(one.kind is one.POSITIONAL_OR_KEYWORD for one in found) - 1
        if any(one.kind is one.VAR_POSITIONAL for one in found):
            most = None
        for name in names:
            rows = _TABLE.setdefault((domain, name), [])
            if any(row.since == since for row in rows):
                raise ValueError(f"{domain}::{name} has an entry for opset {since} already")
            rows.append(Entry(function, since, sizes, several, attributes, most))
            rows.sort(key=lambda row: row.since)
        return function

    return enter


def find(domain: str, name: str, opset: int) -> Entry | None:
    """The entry of an operator at an opset of its domain; None when there is none."""
    rows = _TABLE.get(("" if domain == "ai.onnx" else domain, name), [])
    known = [row for row in rows if row.since <= opset]
    return known[-1] if known else None


def names() -> list[tuple[str, str]]:
    """Every (domain, operator) in the table."""
    return sorted(_TABLE)
