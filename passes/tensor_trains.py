"""Matrices as tensor trains: a chain of small cores, one for each pair of a factor of the inputs and of the outputs.

A weight W [in, out] with in = k₁ ⋯ k_d and out = n₁ ⋯ n_d is G₁ ⋯ G_d with cores Gᵢ [rᵢ₋₁, kᵢ, nᵢ, rᵢ], r₀ = r_d = 1
(Oseledets 2011, SIAM J. Sci. Comput. 33; Novikov et al. 2015, arXiv:1509.06569).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod

import numpy as np
import onnx_ir as oir

from burnish.ir import edit
from burnish.ir.views.linear import Linear
from burnish.ir.views.parameter import same_shape

Cores = list[np.ndarray]


def modes(size: int, count: int) -> list[int] | None:
    """`size` as a product of `count` factors larger than 1, as equal as it goes, ascending; None when it has none."""
    if count == 1:
        return [size] if size > 1 else None
    root = round(size ** (1 / count))
    for first in sorted(range(2, max(isqrt(size), root) + 1), key=lambda one: abs(one - root)):
        rest = modes(size // first, count - 1) if size % first == 0 else None
        if rest is not None:
            return sorted([first, *rest])
    return None


def decompose(weight: np.ndarray, inputs: Sequence[int], outputs: Sequence[int], most: int) -> Cores:
    """The cores of a weight by successive truncated SVDs, left to right.

    Args:
        weight: float64 [in, out].
        inputs, outputs: factors of the two sizes, as many of each.
        most: the largest rank between two cores.
    """
    count = len(inputs)
    order = [axis for pair in range(count) for axis in (pair, count + pair)]
    rest = weight.reshape(*inputs, *outputs).transpose(order).reshape(1, -1)
    cores = []
    for size, width in zip(inputs[:-1], outputs[:-1], strict=True):
        rows = len(rest) * size * width
        left, sizes, right = np.linalg.svd(rest.reshape(rows, -1), full_matrices=False)
        rank = min(most, len(sizes))
        cores.append(left[:, :rank].reshape(len(rest), size, width, rank))
        rest = sizes[:rank, None] * right[:rank]
    return [*cores, rest.reshape(len(rest), inputs[-1], outputs[-1], 1)]


def compose(cores: Cores) -> np.ndarray:
    """The weight of cores, float64 [in, out]."""
    found = np.ones((1, 1, 1))
    for core in cores:
        joined = np.einsum("xyr,rkns->xkyns", found, core)
        rows, size, columns, width, rank = joined.shape
        found = joined.reshape(rows * size, columns * width, rank)
    return found[:, :, 0]


def within(weight: np.ndarray, inputs: Sequence[int], outputs: Sequence[int], numbers: float) -> Cores | None:
    """The cores of the largest rank that hold no more than `numbers`; None when those of rank 1 hold more."""
    low, high = 0, max(weight.shape)
    full = decompose(weight, inputs, outputs, max(weight.shape) ** 2)
    while low < high:
        middle = (low + high + 1) // 2
        ranks = [1, *(min(middle, core.shape[3]) for core in full)]
        held = sum(a * k * n * b for a, k, n, b in zip(ranks, inputs, outputs, ranks[1:], strict=False))
        low, high = (middle, high) if held <= numbers else (low, middle - 1)
    return decompose(weight, inputs, outputs, low) if low else None


def nearest_svd(weight: np.ndarray, numbers: int) -> float:
    """The Frobenius error, relative, of the plain SVD whose factors hold no more than `numbers`."""
    squares = np.linalg.svd(weight, compute_uv=False) ** 2
    return float(np.sqrt(squares[numbers // sum(weight.shape) :].sum() / max(squares.sum(), np.finfo(float).tiny)))


def write(model: oir.Model, layer: Linear, cores: Cores) -> None:
    """Write a linear layer over the last axis as a chain of products, one for each core, and its bias.

    Leading axes stay what they are, known or not: every Reshape copies them.

    Args:
        model: the model.
        layer: its input has a known rank.
        cores: as `decompose` gives them.
    """
    old, dtype, bias = layer.nodes[-1], layer.dtype, layer.bias()
    shape = layer.input.shape
    if dtype is None or shape is None:
        raise ValueError("the layer has no dtype or shape")
    chain = _Chain(model, layer, list(shape)[:-1])
    done, rest = 1, prod(core.shape[1] for core in cores)
    value = layer.input
    for core in cores:
        before, size, width, after = core.shape
        rest //= size
        if rest > 1:
            value = chain.reshape(value, [done, before * size, rest])
            value = chain.transpose(value, [0, 2, 1])
        else:
            value = chain.reshape(value, [done, before * size])
        value = chain.product(value, core.reshape(before * size, width * after), dtype)
        if rest > 1:
            value = chain.reshape(value, [done, rest, width, after])
            value = chain.transpose(value, [0, 2, 3, 1])
        done *= width
    chain.reshape(value, [done])
    if bias is not None:
        stem = f"{chain.stem}_bias"
        chain.add("Add", [chain.nodes[-1].outputs[0], edit.add_rounded(model, stem, bias, dtype)], [done])
    same_shape(chain.nodes[-1], layer.output)
    edit.replace_node(old, chain.nodes)


class _Chain:
    """New nodes in order, whose values have the leading axes `lead` and others behind them."""

    def __init__(self, model: oir.Model, layer: Linear, lead: Sequence[int | oir.SymbolicDim]) -> None:
        self.model, self.layer, self.lead = model, layer, list(lead)
        self.stem = str(layer.parameter.source.name) if layer.parameter is not None else "weight"
        self.nodes: list[oir.Node] = []

    def add(self, op: str, inputs: Sequence[oir.Value], shape: Sequence[int], **attributes: object) -> oir.Value:
        node = edit.make(op, inputs, attributes, like=self.layer.nodes)
        node.outputs[0].type = self.layer.output.type
        node.outputs[0].shape = oir.Shape([*self.lead, *shape])
        self.nodes.append(node)
        return node.outputs[0]

    def reshape(self, value: oir.Value, shape: Sequence[int]) -> oir.Value:
        wanted = np.array([*(0 for _ in self.lead), *shape], np.int64)
        return self.add("Reshape", [value, edit.add_constant(self.model, f"{self.stem}_shape", wanted)], shape)

    def transpose(self, value: oir.Value, order: Sequence[int]) -> oir.Value:
        shape = [value.shape[len(self.lead) + one] for one in order]  # type: ignore[index]
        first = range(len(self.lead))
        return self.add("Transpose", [value], shape, perm=[*first, *(len(self.lead) + one for one in order)])  # type: ignore[arg-type]

    def product(self, value: oir.Value, core: np.ndarray, dtype: oir.DataType) -> oir.Value:
        before = list(value.shape)[len(self.lead) : -1]  # type: ignore[arg-type]
        weight = edit.add_rounded(self.model, f"{self.stem}_core", core, dtype)
        return self.add("MatMul", [value, weight], [*before, core.shape[1]])  # type: ignore[list-item]
