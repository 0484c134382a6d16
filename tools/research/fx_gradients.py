"""Gradients of the torch bridge against finite differences, on the inputs of the onnx package's own tests.

`python -m burnish.tools.research.fx_gradients` prints what disagrees and how many cases were compared by operator;
`burnish.tools.research.fx_nodes` writes these numbers into its page.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.tools.research import fx_cases, node_tests
from burnish.tools.research.node_tests import Case

STEPS = (1e-6, 1e-4, 1e-2)
"""Steps of the differences; the larger ones are for cases that compute in float32 on the way."""
ALLOWED = 1e-3
ALLOWED_IN_FLOAT32 = 2e-2
"""The same for graphs with casts, which may go through float32."""


@dataclass(frozen=True)
class Slope:
    """What was found for one case.

    Attributes:
        error: how far the derivatives along a random direction are apart, relative to the larger one; None when there
            are none to compare.
        why: the reason for None.
        allowed: how large the error may be.
    """

    error: float | None
    why: str = ""
    allowed: float = ALLOWED

    @property
    def agrees(self) -> bool:
        """Whether there is something to compare, and it agrees."""
        return self.error is not None and self.error <= self.allowed


def slope(case: Case) -> Slope:
    """Compare the derivatives of a weighted sum of all float outputs along one direction of all float inputs.

    The module and its inputs are made float64. Where the forward difference and the backward difference disagree, the
    function has a kink or a jump and there is nothing to compare.
    """
    import torch

    from burnish.backends.fx.builder import to_graph_module

    if any(node.op_type in fx_cases.RANDOM for node in case.model.graph.node):
        return Slope(None, "random")
    module = to_graph_module(oir.from_proto(case.model), fallback=False).double()
    random = np.random.default_rng(0)
    fixed = _numbers(case)
    given = [fx_cases.given(array) for array in case.inputs]
    given = [one if i in fixed else _wide(one, random) for i, one in enumerate(given)]
    moving = [one for i, one in enumerate(given) if i not in fixed]
    leaves = [x for one in moving for x in _tensors(one) if x.dtype == torch.float64] + list(module.parameters())
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = [y for y in _floats(module(*given)) if y.requires_grad]
    if not leaves or not outputs:
        return Slope(None, "no float output depends on a float input")
    every = [y.requires_grad for y in _floats(module(*given))]
    shares = [torch.from_numpy(np.asarray(random.standard_normal(tuple(y.shape)))) * y.isfinite() for y in outputs]
    ways = [torch.from_numpy(np.asarray(random.standard_normal(tuple(x.shape)))) for x in leaves]
    found = torch.autograd.grad(_total(outputs, shares), leaves, allow_unused=True)
    analytic = sum(float((g * way).sum()) for g, way in zip(found, ways, strict=True) if g is not None)
    start = [leaf.detach().clone() for leaf in leaves]
    best, smooth = math.inf, False
    for step in STEPS:
        sums = []
        for sign in (0.0, 1.0, -1.0):
            with torch.no_grad():
                for leaf, origin, way in zip(leaves, start, ways, strict=True):
                    leaf.copy_(origin + sign * step * way)
                moved = [y for y, o in zip(_floats(module(*given)), every, strict=True) if o]
                if [y.shape for y in moved] != [y.shape for y in outputs]:
                    return Slope(None, "shapes depend on the inputs")
                sums.append(float(_total(moved, shares)))
        forward, backward = (sums[1] - sums[0]) / step, (sums[0] - sums[2]) / step
        size = max(abs(analytic), abs(forward), abs(backward), 1e-3)
        smooth |= abs(forward - backward) < 0.02 * size
        best = min(best, abs((forward + backward) / 2 - analytic) / size)
    casts = any(node.op_type.startswith("Cast") for node in case.model.graph.node)
    if best <= ALLOWED or smooth:
        return Slope(best, allowed=ALLOWED_IN_FLOAT32 if casts else ALLOWED)
    return Slope(None, "a kink or a jump")


def _total(outputs: Sequence[Any], shares: Sequence[Any]) -> Any:
    return sum((y.nan_to_num(0.0, 0.0, 0.0).double() * share).sum() for y, share in zip(outputs, shares, strict=True))


def _numbers(case: Case) -> set[int]:
    """The inputs that the bridge reads as numbers, when the case is a single node."""
    from burnish.backends.fx import operators, registry

    assert operators
    if len(case.model.graph.node) != 1:
        return set()
    node = case.model.graph.node[0]
    opset = next((one.version for one in case.model.opset_import if one.domain == node.domain), 1)
    entry = registry.find(node.domain, node.op_type, opset)
    held = {node.input[i] for i in entry.static if i < len(node.input)} if entry is not None else set()
    return {i for i, value in enumerate(case.model.graph.input) if value.name in held}


def _floats(values: Any) -> list[Any]:
    """The tensors of float32 or float64."""
    import torch

    return [y for y in _tensors(values) if y.dtype in (torch.float32, torch.float64)]


def _wide(value: Any, random: np.random.Generator) -> Any:
    """Floats in float64, moved a little away from the round numbers at which functions like to have kinks."""
    import torch

    if isinstance(value, tuple):
        return tuple(_wide(one, random) for one in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype.itemsize < 2:
        return value
    first, second = (torch.from_numpy(np.asarray(random.uniform(0.5, 1.0, tuple(value.shape)))) for _ in range(2))
    return value.double() * (1 + 1e-3 * first) + 1e-3 * second


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, torch.Tensor):
        yield value


def slopes(cases: Iterable[tuple[str, Case]]) -> Iterator[tuple[str, Case, Slope]]:
    """What was found for every one of the cases that the bridge computes, with the operators given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, case in cases:
            if case.group != "light" and fx_cases.judge(case, None).word == fx_cases.RIGHT:
                try:
                    yield name, case, slope(case)
                except RuntimeError as error:
                    yield name, case, Slope(None, f"not in float64: {str(error).splitlines()[0]}")


def measure(only: str = "") -> Iterator[tuple[str, Case, Slope]]:
    """What was found for the onnx package's cases whose name contains `only`."""
    return slopes((name, case) for name, case in fx_cases.grouped(node_tests.cases()) if only in case.name)


def main() -> None:
    """Print what disagrees, and the numbers of cases compared and not compared by operator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains it")
    for name, case, found in measure(parser.parse_args().only):
        if not found.agrees:
            print(name, case.name, found.error, found.why, sep=" | ")


if __name__ == "__main__":
    main()
