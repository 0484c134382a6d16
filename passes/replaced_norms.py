"""Normalizations written as `BN(x) + eta * x` or as an affine map, which remember the normalization they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.affine import Affine, add_affine, chain
from burnish.ir.views.norm import Norm
from burnish.ir.views.parameter import same_shape
from burnish.ir.walk import is_op, walk
from burnish.passes.norm_fit import Fit

EPSILON = 1e-5
"""Of the BatchNormalization."""

_FORMER = "burnish.former_norm"


@dataclass(frozen=True, eq=False)
class Former:
    """The normalization over the last axis that was there before.

    Attributes:
        centred: LayerNorm; else RMSNorm.
        epsilon: added to the variance or mean square.
        gain, bias: float64 [channels].
    """

    centred: bool
    epsilon: float
    gain: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Replaced:
    """A place where a normalization was replaced.

    Attributes:
        former: the normalization.
        input: what it read, and its replacement reads.
        output: what the replacement computes, in the layout of `input`.
        batch: the BatchNormalization of `BN(x) + eta * x`; None for a plain affine.
        trained: the constants that are learnt: gamma, beta and eta, or scale and shift.
    """

    former: Former
    input: oir.Value
    output: oir.Value
    batch: oir.Node | None
    trained: tuple[oir.Value, ...]

    @property
    def statistics(self) -> tuple[oir.Value, ...]:
        """Mean and variance of `batch`; none of a plain affine."""
        return () if self.batch is None else tuple(value for value in self.batch.inputs[3:5] if value is not None)


def former(norm: Norm) -> Former:
    """What is kept of a normalization over the last axis, whose size is known."""
    size = int(match.dim(norm.input, -1) or 0)
    return Former(norm.kind == "layer", norm.epsilon, norm.gain(size), norm.offset(size))


def repbn_weights(fit: Fit) -> dict[str, np.ndarray]:
    """`gamma`, `beta`, `mean`, `variance` [channels] and `eta` [] of the RepBN that computes an affine; eta is 0."""
    gamma = fit.scale * np.sqrt(fit.variance + EPSILON)
    beta = fit.shift + fit.scale * fit.mean
    return {"gamma": gamma, "beta": beta, "mean": fit.mean, "variance": fit.variance, "eta": np.zeros(())}


def affine_weights(fit: Fit) -> dict[str, np.ndarray]:
    """`scale` and `shift` [channels]."""
    return {"scale": fit.scale, "shift": fit.shift}


def replace(model: oir.Model, norm: Norm, numbers: Mapping[str, np.ndarray]) -> None:
    """Let the weights of `repbn_weights` or `affine_weights` compute what `norm` does.

    RepBN is SLAB's `BN(x) + eta * x` (arXiv:2405.11582) with fixed statistics; where x has more than two axes, its last
    one, that of the channels, is moved to the place where BatchNormalization wants it, and back.
    """
    kept = former(norm)
    nodes = _repbn(model, norm, numbers) if "gamma" in numbers else _affine(model, norm, numbers)
    nodes[-1].meta[_FORMER] = kept
    edit.replace_node(norm.nodes[-1], nodes)


def _affine(model: oir.Model, norm: Norm, numbers: Mapping[str, np.ndarray]) -> list[oir.Node]:
    scale, shift = (_stored(model, norm, name, numbers[name]) for name in ("scale", "shift"))
    scaled = edit.make("Mul", [norm.input, scale], like=norm.nodes)
    shifted = edit.make("Add", [same_shape(scaled, norm.output), shift], like=norm.nodes)
    same_shape(shifted, norm.output)
    return [scaled, shifted]


def _repbn(model: oir.Model, norm: Norm, numbers: Mapping[str, np.ndarray]) -> list[oir.Node]:
    rank = int(match.rank(norm.input) or 0)
    given = [_stored(model, norm, name, numbers[name]) for name in ("gamma", "beta", "mean", "variance", "eta")]
    nodes: list[oir.Node] = []
    x = norm.input
    if rank > 2:
        nodes.append(edit.make("Transpose", [x], {"perm": [0, rank - 1, *range(1, rank - 1)]}, like=norm.nodes))
        x = nodes[-1].outputs[0]
        x.type = norm.input.type
        if norm.input.shape is not None:
            sizes = list(norm.input.shape)
            x.shape = oir.Shape([sizes[0], sizes[-1], *sizes[1:-1]])
    batch = edit.make("BatchNormalization", [x, *given[:4]], {"epsilon": EPSILON}, like=norm.nodes)
    times = edit.make("Mul", [x, given[4]], like=norm.nodes)
    total = edit.make("Add", [same_shape(batch, x), same_shape(times, x)], like=norm.nodes)
    same_shape(total, x)
    nodes += [batch, times, total]
    if rank > 2:
        nodes.append(edit.make("Transpose", total.outputs, {"perm": [0, *range(2, rank), 1]}, like=norm.nodes))
        same_shape(nodes[-1], norm.output)
    return nodes


def _stored(model: oir.Model, norm: Norm, name: str, array: np.ndarray) -> oir.Value:
    assert norm.input.dtype is not None
    return edit.add_rounded(model, f"{norm.output.name or 'norm'}_{name}", array, norm.input.dtype)


def replaced(model: oir.Model) -> Iterator[Replaced]:
    """The places where this process has replaced normalizations of the model, in order.

    What a normalization was is kept with the graph in memory, not in a file.
    """
    version = model.graph.opset_imports.get("", 1)
    for node in walk(model):
        kept = node.meta.get(_FORMER)
        if not isinstance(kept, Former):
            continue
        moved = is_op(node, "Transpose")
        last = match.producer(node.inputs[0]) if moved else node
        found = add_affine(last, version)
        if found is not None:
            above = match.producer(found.input, "Transpose") if moved else None
            source = found.input if above is None else above.inputs[0]
            if source is not None:
                yield Replaced(kept, source, node.outputs[0], found.nodes[0], _constants(found))
        elif (plain := chain(node)) is not None:
            yield Replaced(kept, plain.input, node.outputs[0], None, _constants(plain))


def _constants(affine: Affine) -> tuple[oir.Value, ...]:
    """What the nodes read besides their input, without the statistics of a BatchNormalization."""
    read = (value for node in affine.nodes for value in node.inputs[: 3 if len(node.inputs) > 2 else 2])
    return tuple(value for value in read if value is not None and weights.is_constant(value))
