"""Pairs of layers whose product is one layer: decay, a new split, and noise for training them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as oir
import torch
from torch import fx, nn

from burnish.ir import match
from burnish.ir.views.convolution import Convolution, find_convolution
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.walk import walk

Layer = Linear | Convolution


@dataclass(frozen=True)
class Factor:
    """A weight as a matrix [out, in]: its name in the module, and how it is stored.

    Attributes:
        path: the name.
        form: `rows` [out, in], `columns` [in, out], either behind axes of length 1, or `kernel` [out, in, *kernel].
    """

    path: str
    form: Literal["rows", "columns", "kernel"]

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as a matrix [out, in] that shares its memory."""
        if self.form == "kernel":
            return weight.flatten(1)
        flat = weight.reshape(weight.shape[-2], weight.shape[-1])
        return flat.T if self.form == "columns" else flat

    def stored(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A matrix [out, in] in the shape in which `like` is stored."""
        return (matrix.T if self.form == "columns" else matrix).reshape(like.shape)


@dataclass(frozen=True)
class Pair:
    """y = U (V x), where several pairs may have the same V.

    Attributes:
        inner: V, [rank, in].
        outer: U of each layer that reads V x, [out, rank].
        biased: whether something is added to V x.
    """

    inner: Factor
    outer: tuple[Factor, ...]
    biased: bool


def pairs(model: oir.Model, values: Mapping[str, oir.Value]) -> list[Pair]:
    """The low-rank pairs: a layer that only layers of its kind read, which make more of the few numbers it gives.

    Args:
        model: the model.
        values: the weights that may be trained, by their names in the module.
    """
    paths = {value: path for path, value in values.items()}
    found = []
    for node in walk(model):
        inner = _layer(node)
        if inner is None or inner.output.is_graph_output():
            continue
        readers = [_layer(user) for user in match.consumers(inner.output)]
        outers = [one for one in readers if one is not None and one.input is inner.output and _expands(one, inner)]
        factors = [_factor(one, paths) for one in (inner, *outers)]
        if outers and len(outers) == len(readers) and all(factor is not None for factor in factors):
            first, *others = (factor for factor in factors if factor is not None)
            found.append(Pair(first, tuple(others), inner.bias_parameter is not None))
    return found


def _layer(node: oir.Node | None) -> Layer | None:
    found = find_linear(node) or find_convolution(node)
    return None if found is None or found.read_only is not None else found


def _sizes(layer: Layer) -> tuple[int, int]:
    """Outputs, and inputs of each."""
    if isinstance(layer, Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.parameter.shape[1] * _product(layer.kernel)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _expands(outer: Layer, inner: Layer) -> bool:
    """Whether `outer` makes more of the few numbers that `inner` gives, each output of all of them."""
    if type(outer) is not type(inner):
        return False
    if isinstance(outer, Convolution) and isinstance(inner, Convolution):
        plain = not outer.transposed and not inner.transposed and outer.groups == inner.groups == 1
        if not plain or any(size != 1 for size in outer.kernel):
            return False
    rank, width = _sizes(inner)
    return rank < width and rank < _sizes(outer)[0]


def _factor(layer: Layer, paths: Mapping[oir.Value, str]) -> Factor | None:
    weight = layer.parameter
    if weight is None or weight.steps or weight.source not in paths:
        return None
    if isinstance(layer, Convolution):
        return Factor(paths[weight.source], "kernel")
    return Factor(paths[weight.source], "rows" if layer.stored_transposed else "columns")


def paths_of(found: list[Pair]) -> list[str]:
    """The names of all factors."""
    return list(dict.fromkeys(one.path for pair in found for one in (pair.inner, *pair.outer)))


def frobenius(module: nn.Module, found: list[Pair]) -> torch.Tensor:
    """Half the squared norms of all products UV, as tr((U'U)(VV')) / 2, whose gradients are U V V' and U' U V."""
    total = torch.zeros(())
    for pair in found:
        inner = pair.inner.matrix(module.get_parameter(pair.inner.path))
        square = inner @ inner.T
        for one in pair.outer:
            outer = one.matrix(module.get_parameter(one.path))
            total = total.to(outer.device) + ((outer.T @ outer) * square).sum() / 2
    return total


def split_anew(module: nn.Module, found: list[Pair]) -> None:
    """Give both factors of each product P the same singular values: U = A √S, V = √S B', where P = A S B'.

    What the model computes stays, up to rounding. Where something is added between the two, they are left alone.
    """
    with torch.no_grad():
        for pair in found:
            if not pair.biased:
                _split(module, pair)


def _split(module: nn.Module, pair: Pair) -> None:
    inner = module.get_parameter(pair.inner.path)
    outers = [module.get_parameter(one.path) for one in pair.outer]
    matrices = [one.matrix(weight) for one, weight in zip(pair.outer, outers, strict=True)]
    # The singular values of the product from those of two small triangles: the product itself may be large.
    left, upper = torch.linalg.qr(torch.cat(matrices).double())
    right, lower = torch.linalg.qr(pair.inner.matrix(inner).double().T)
    a, values, b = torch.linalg.svd(upper @ lower.T)
    root = values.sqrt()
    parts = (left @ a * root).split([len(matrix) for matrix in matrices])
    inner.copy_(pair.inner.stored((root[:, None] * (b @ right.T)).to(inner.dtype), inner))
    for one, weight, part in zip(pair.outer, outers, parts, strict=True):
        weight.copy_(one.stored(part.to(weight.dtype), weight))


class Noise(nn.Module):
    """A weight that is multiplied by 1 + size * normal while training (noise-robust factors)."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight, disturbed while training."""
        return weight * (1 + self.size * torch.randn_like(weight)) if self.training else weight


def disturb(module: fx.GraphModule, found: list[Pair], size: float) -> None:
    """Let all factors pass through noise on their way into the layers."""
    module.add_submodule("healing_noise", Noise(size))
    for node in list(reading(module, paths_of(found))):
        with module.graph.inserting_after(node):
            noisy = module.graph.call_module("healing_noise", (node,))
        node.replace_all_uses_with(noisy, lambda user, noisy=noisy: user is not noisy)
    module.recompile()


def reading(module: fx.GraphModule, paths: list[str]) -> Iterator[fx.Node]:
    """The nodes of the graph that read these weights."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in paths:
            yield node
