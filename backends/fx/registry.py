"""The table of operators, and how to add one.

An operator is one module-level function, entered under its ONNX name:

    @operator("Celu")
    def celu(x, alpha=1.0):
        return torch.celu(tensor(x), alpha)

* Inputs arrive by position, None where the model leaves one out; attributes arrive as keyword arguments under their
  ONNX names, as Python values (a dtype as its ONNX number, a tensor attribute as a tensor, one of a single element as
  the pair of its number and its dtype). Where a later opset made an
  input of an attribute (`axes`, `split`, `min`), give the parameter that name: both forms arrive in it.
* A parameter called `opset` receives the model's opset of the operator's domain, one called `outputs` the number of
  outputs the node has, one called `straight_through` whether an integer output is only dequantized again.
* An attribute without a parameter is never ignored: the node is then treated like an unknown operator. Name every
  attribute of the operator, also those that change nothing.
* Where the meaning changed in opset 13, write two functions, `@operator("Softmax")` and `@operator("Softmax",
  since=13)`: the one with the largest `since` not above the model's opset is taken.
* `static=(1, 2)`: small constants at these inputs arrive as numbers and (nested) lists instead of tensors.
* `scalars=(0,)`: the same for constants of rank 0 only.
* `fixed=(3, 4)`: initializers at these inputs are buffers, not trained parameters.
* A parameter called `result` receives the declared dtype of the first output as its ONNX number, 0 when there is none.
* `refuses=f`: `f(attributes)` says why a node with these attributes cannot be expressed, None when it can.
* `several=True`: the function returns a tuple, one entry an output; otherwise its result is the only output.
* Integers that come from shapes are *host values* (`burnish.backends.fx.values`): ints and lists of ints, which may be
  symbolic. Take them with `integers(x)` where a size is wanted; turn them into tensors with `tensor` and `tensors`.

The function must be findable in its module under its own name: FX writes it into the code that it generates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]
Refusal = Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class Operator:
    """One entry of the table.

    Attributes:
        function: what computes it.
        since: the first opset of the domain it is for.
        static: inputs whose constants arrive as Python values.
        scalars: inputs whose constants of rank 0 arrive as Python numbers.
        fixed: inputs whose initializers are not trained.
        several: whether the function returns a tuple of outputs.
        parameters: the names of the function's parameters.
        refuses: why a node with given attributes cannot be expressed.
    """

    function: Function
    since: int
    static: tuple[int, ...]
    scalars: tuple[int, ...]
    fixed: tuple[int, ...]
    several: bool
    parameters: tuple[str, ...]
    refuses: Refusal | None

    def refusal(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> str | None:
        """Why a node with these inputs and attributes cannot be expressed; None when it can."""
        try:
            inspect.signature(self.function).bind(*inputs, **attributes)
        except TypeError as error:
            return str(error)
        return self.refuses(attributes) if self.refuses is not None else None


_TABLE: dict[tuple[str, str], list[Operator]] = {}


def operator(
    *names: str,
    domain: str = "",
    since: int = 1,
    static: tuple[int, ...] = (),
    scalars: tuple[int, ...] = (),
    fixed: tuple[int, ...] = (),
    several: bool = False,
    refuses: Refusal | None = None,
) -> Callable[[Function], Function]:
    """Enter a function into the table under `names`; the module's docstring has the rules."""

    def enter(function: Function) -> Function:
        parameters = tuple(inspect.signature(function).parameters)
        for name in names:
            rows = _TABLE.setdefault((domain, name), [])
            if any(row.since == since for row in rows):
                raise ValueError(f"{domain}::{name} has an entry for opset {since} already")
            rows.append(Operator(function, since, static, scalars, fixed, several, parameters, refuses))
            rows.sort(key=lambda row: row.since)
        return function

    return enter


def find(domain: str, name: str, opset: int) -> Operator | None:
    """The entry of an operator at an opset of its domain; None when there is none."""
    rows = _TABLE.get(("" if domain == "ai.onnx" else domain, name), [])
    known = [row for row in rows if row.since <= opset]
    return known[-1] if known else None


def names() -> list[tuple[str, str]]:
    """Every (domain, operator) in the table."""
    return sorted(_TABLE)
