"""Channels between two layers scaled so that the weights on both sides of them are of one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.views.convolution import Convolution, find_convolution
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.parameter import fits
from burnish.ir.walk import is_op
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.layers import Layer, layers, unusable

_BETWEEN = ("Relu", "LeakyRelu", "Identity", "Dropout", "MaxPool", "AveragePool")
"""Functions of each channel by itself with f(s x) = s f(x) for s > 0."""

_ROUNDS = 50
_LARGEST = 10
"""Channels are scaled by at most 2 to this power."""


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second reads, channel by channel, what the first computes, and nothing else does."""

    first: Layer
    second: Layer


@dataclass(frozen=True)
class EqualizeChannels(ExactPass):
    """Scale the channels between two layers so that the weights before and behind them are equally large.

    What one scale for all channels then has to cover is smaller, so integers of few bits lose less. Between the layers
    there may be functions with f(s x) = s f(x): Relu and pools, but neither Clip (ReLU6) nor Gelu. Scales are powers of
    two, so that nothing is rounded. See Nagel et al., Data-Free Quantization (2019), section 4.1.
    """

    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        pairs: list[Pair] = []
        for layer in layers(model).values():
            found = _follow(layer)
            if isinstance(found, Pair):
                pairs.append(found)
            elif found is not None:
                outcome.skip(layer.node, found, matched=False)
        weights: dict[int, np.ndarray] = {}
        for pair in pairs:
            for layer in (pair.first, pair.second):
                weights[id(layer.node)] = layer.weight()
        scales = _balanced(pairs, weights)
        for pair, scale in zip(pairs, scales, strict=True):
            if (scale == 1).all():
                continue
            first, second = _now(pair.first), _now(pair.second)
            bias = first.bias()
            before = first.weight() / _along(scale, first.weight())
            shift = None if bias is None else bias / scale
            behind = _into(second, second.weight(), scale)
            changed = [before, behind] if shift is None else [before, behind, shift]
            if first.dtype is None or not all(fits(array, first.dtype) for array in changed):
                outcome.skip(pair.first.node, "the scaled weights do not fit their dtype")
                continue
            if not outcome.take(pair.first.node):
                return
            first.write(model, before, shift)
            second = _now(pair.second)
            second.write(model, behind, second.bias())


def _balanced(pairs: list[Pair], weights: dict[int, np.ndarray]) -> list[np.ndarray]:
    """What the channels of each pair are divided by: powers of two that leave both sides within a factor of two.

    A layer can stand in two pairs, so the pairs are gone through until nothing changes.
    """
    scales = [np.ones(weights[id(pair.first.node)].shape[0]) for pair in pairs]
    for _ in range(_ROUNDS):
        quiet = True
        for index, pair in enumerate(pairs):
            before, behind = weights[id(pair.first.node)], weights[id(pair.second.node)]
            sizes = np.abs(before).reshape(len(before), -1).max(1), _sizes(pair.second, behind)
            there = (sizes[0] > 0) & (sizes[1] > 0)
            power = np.zeros(len(before))
            power[there] = np.log2(sizes[0][there] / sizes[1][there]) / 2
            power = np.where(np.abs(power) > 0.5 + 1e-9, np.rint(power), 0.0)
            power = np.clip(np.log2(scales[index]) + power, -_LARGEST, _LARGEST) - np.log2(scales[index])
            if not power.any():
                continue
            quiet = False
            step = 2.0**power
            scales[index] = scales[index] * step
            weights[id(pair.first.node)] = before / _along(step, before)
            weights[id(pair.second.node)] = _into(pair.second, behind, step)
        if quiet:
            break
    return scales


def _along(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return scale.reshape(-1, *(1,) * (weight.ndim - 1))


def _grouped(layer: Layer, weight: np.ndarray) -> np.ndarray:
    """A weight [out, in / groups, ...] as [groups, out / groups, in / groups, taps]."""
    groups = layer.groups if isinstance(layer, Convolution) else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _sizes(layer: Layer, weight: np.ndarray) -> np.ndarray:
    """The largest magnitude that multiplies each channel of the input [in]."""
    return np.asarray(np.abs(_grouped(layer, weight)).max((1, 3)).reshape(-1))


def _into(layer: Layer, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight times what its inputs are divided by."""
    grouped = _grouped(layer, weight)
    return np.asarray((grouped * scale.reshape(len(grouped), 1, -1, 1)).reshape(weight.shape))


def _now(layer: Layer) -> Layer:
    """The view of a layer of which a weight may have been written meanwhile."""
    found = find_linear(layer.node) if isinstance(layer, Linear) else find_convolution(layer.node)
    if found is None:
        raise ValueError(f"{match.describe(layer.node)} is no layer any more")
    return found


def _follow(layer: Layer) -> Pair | str | None:
    """The pair that a layer begins; why it begins none; None where nothing like a layer comes behind it."""
    value = layer.output
    while True:
        if value.is_graph_output():
            return "its result is an output of the graph"
        readers = match.consumers(value)
        if len(readers) != 1 or len(value.uses()) != 1:
            return f"{len(readers)} nodes read its result" if len(readers) > 1 else None
        (node,) = readers
        if node.graph is not layer.node.graph:
            return "a branch reads its result"
        second = find_convolution(node) or find_linear(node)
        if second is not None and second.input is value:
            reason = _refusal(layer) or _refusal(second) or _mismatch(layer, second)
            return reason if reason is not None else Pair(layer, second)
        if not is_op(node, *_BETWEEN) or any(out.uses() for out in node.outputs[1:]):
            what = (
                "is not the same for scaled numbers" if is_op(node, "Clip", "Gelu", "Sigmoid", "Tanh") else "reads it"
            )
            return f"the {node.op_type} behind it {what}"
        value = node.outputs[0]


def _refusal(layer: Layer) -> str | None:
    """Why the weights of a layer cannot be scaled."""
    if layer.read_only is not None:
        return layer.read_only
    if layer.shared:
        return f"{layer.shared[0].op_type} shares a weight"
    if layer.dtype is None or not layer.dtype.is_floating_point():
        return "a weight is not floating point"
    return None if layer.parameter is None else unusable(layer.parameter)


def _mismatch(first: Layer, second: Layer) -> str | None:
    """Why what the first layer computes are not, one by one, the channels of the second."""
    if isinstance(first, Convolution) != isinstance(second, Convolution):
        return f"its channels are not those of the {second.node.op_type}"
    if isinstance(second, Linear) and second.input_axis != -1:
        return f"the {second.node.op_type} reads its features along another axis"
    before = first.out_channels if isinstance(first, Convolution) else first.out_features
    behind = second.in_channels if isinstance(second, Convolution) else second.in_features
    return None if before == behind else f"it has {before} channels, the {second.node.op_type} {behind}"
