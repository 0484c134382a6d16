"""Scaling channels where two constants meet, so that what one is divided by the other is multiplied with.

Scales are given as logarithms, so none is zero or negative. Four places have such pairs (Hu et al. 2025,
arXiv:2501.13987):

- a norm's gain and the layers that read it;
- the values of a head and the output layer;
- queries and keys: under rotary embedding both elements of a turned pair need one scale, since the turn mixes them;
- the two factors of a gated MLP: what is multiplied with the gate, and the layer that reads the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.inference import Inference
from burnish.ir.views.activation import ROOTS, find_activation
from burnish.ir.views.affine import Affine
from burnish.ir.views.attention_layer import AttentionLayer, Heads
from burnish.ir.views.linear import Linear, find_linear, linears
from burnish.ir.views.norm import Norm
from burnish.ir.views.parameter import same_shape
from burnish.ir.views.turned import Turned
from burnish.ir.walk import walk
from burnish.passes import absorb

_ACTIVATIONS = ("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Relu", "Sigmoid", "Tanh", "Swish", "Elu", "Selu")

LARGEST = 1e3
"""A scale further from 1 than this factor is none: a channel that carries nothing."""


@dataclass(frozen=True, eq=False)
class Gated:
    """A gated MLP: `down(gate * up(x))`.

    Attributes:
        up: the layer whose result is multiplied with the gate.
        rows: which rows of its weight make that result, int64 [features].
        downs: the layers that read the product.
    """

    up: Linear
    rows: np.ndarray
    downs: tuple[Linear, ...]


def balance(writing: np.ndarray, reading: np.ndarray) -> np.ndarray:
    """The logarithm of what to divide channels by, so that both sides reach equally far (Nagel et al. 2019, eq. 11).

    Args:
        writing, reading: how far each channel reaches on each side, float64 of one shape.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 0.5 * np.log(writing / reading)
    return np.asarray(np.where(np.abs(found) <= np.log(LARGEST), found, 0.0))


def score_pairs(layer: AttentionLayer, layers: Iterable[AttentionLayer] = ()) -> np.ndarray | str:
    """Which elements of a head of queries and keys need one scale, those of equal numbers, int64 [head size].

    Instead of the numbers the reason why no scale is possible beside the other layers of the model, in plain words.
    """
    if layer.shared:
        return f"{match.describe(layer.shared[0])} reads its queries, keys or values as well"
    if (reason := layer.overlap(layers)) is not None:
        return reason
    if layer.cache.kind != "none":
        return "its keys are kept in a cache that the model takes or gives"
    if layer.projections[1] is None:
        return "it has no keys of its own"
    if layer.query_norm is not None or layer.key_norm is not None:
        return "a norm of its queries or keys takes every scale off again"
    if reason := layer.projections[0].read_only or layer.projections[1].read_only:
        return reason
    groups = np.arange(layer.head_size)
    turns = (layer.rotary, layer.key_rotary)
    if turns == (None, None):
        return groups
    if turns[0] is None or turns[1] is None or _turn(turns[0]) != _turn(turns[1]):
        return "its queries and keys are not turned alike"
    start, size, interleaved = _turn(turns[0])
    turned = np.arange(size)
    first = turned - turned % 2 if interleaved else turned % (size // 2)
    groups[start : start + size] = start + first
    return groups


def _turn(one: Turned) -> tuple[int, int, bool]:
    return one.start, one.dims, one.interleaved


def score_scales(layer: AttentionLayer, groups: np.ndarray) -> np.ndarray:
    """The balancing logarithms for the keys of each head, float64 [key heads, head size], equal within groups."""
    heads = layer.read()
    assert heads.key is not None
    keys = np.abs(heads.key).max(axis=2)
    queries = np.abs(heads.query).max(axis=2).reshape(layer.kv_heads, -1, layer.head_size).max(axis=1)
    both = np.stack([keys, queries])
    together = np.stack([both[:, :, groups == group].max(axis=2) for group in groups], axis=2)
    return balance(together[0], together[1])


def scale_scores(model: oir.Model, layer: AttentionLayer, logs: np.ndarray) -> None:
    """Divide the keys of each head by `exp(logs)`, float64 [key heads, head size], and multiply its queries with it.

    Where a rotary embedding turns pairs of elements, `logs` have to be equal within each pair; the layer is out of date
    afterwards.
    """
    old, scale = layer.read(), np.exp(logs)
    assert old.key is not None
    wide = np.repeat(scale, layer.heads // layer.kv_heads, axis=0)
    layer.write(
        model,
        Heads(
            old.query * wide[:, :, None],
            old.key / scale[:, :, None],
            old.value,
            old.output,
            None if old.query_bias is None else old.query_bias * wide,
            None if old.key_bias is None else old.key_bias / scale,
            old.value_bias,
            old.output_bias,
        ),
    )


def value_scales(layer: AttentionLayer) -> np.ndarray:
    """The balancing logarithms for the values of each head, float64 [key heads, value size]."""
    heads = layer.read()
    assert heads.value is not None
    outputs = np.abs(heads.output).max(axis=0).reshape(layer.kv_heads, -1, layer.value_size).max(axis=1)
    return balance(np.abs(heads.value).max(axis=2), outputs)


def scale_values(model: oir.Model, layer: AttentionLayer, logs: np.ndarray) -> None:
    """Divide the values of each head by `exp(logs)`, float64 [key heads, value size]; the output layer undoes it."""
    old, scale = layer.read(), np.exp(logs)
    assert old.value is not None
    wide = np.repeat(scale, layer.heads // layer.kv_heads, axis=0)
    bias = None if old.value_bias is None else old.value_bias / scale
    value, output = old.value / scale[:, :, None], old.output * wide
    layer.write(model, Heads(old.query, old.key, value, output, old.query_bias, old.key_bias, bias, old.output_bias))


def find_gated(model: oir.Model, facts: Inference) -> Iterator[Gated | tuple[oir.Node, str]]:
    """The gated MLPs of a model, and the layers behind an activation, where no scale passes, with the reason."""
    found_ends = (find_activation(node) for node in walk(model, *ROOTS))
    ends = {one.end: one.kind for one in found_ends if one is not None}
    for layer in linears(model):
        product = layer.input.producer()
        if product is None or product.graph is not layer.node.graph or layer.input_axis != -1:
            continue
        if product in ends or product.op_type in _ACTIVATIONS:
            kind = ends.get(product, product.op_type)
            yield layer.node, f"{kind} before it is no product with a gate, and no scale passes through it"
        elif product.op_type == "Mul" and product.domain == "":
            found = _gated(layer, product, facts)
            if found is not None:
                yield found


def _gated(layer: Linear, product: oir.Node, facts: Inference) -> Gated | None:
    downs = []
    for use in product.outputs[0].uses():
        one = find_linear(use.node)
        if use.node.op_type in ("Shape", "Size"):
            continue
        if one is None or one.node is not use.node or use.idx != 0 or one.input_axis != -1 or one.read_only:
            return None
        downs.append(one)
    if not downs or downs[0].node is not layer.node or product.outputs[0].is_graph_output():
        return None
    shape = facts.shape(product.outputs[0])
    for value in product.inputs:
        if value is None or facts.shape(value) != shape or not match.used_once(value):
            continue
        source, rows = value, None
        split = match.producer(value, "Split")
        if split is not None:
            before = facts.shape(split.inputs[0])
            if before is None or match.attribute(split, "axis", 0) % len(before) != len(before) - 1:
                continue
            sizes = [size for out in split.outputs if isinstance(size := (facts.shape(out) or (None,))[-1], int)]
            whole = split.inputs[0]
            if len(sizes) < len(split.outputs) or whole is None or not match.used_once(whole):
                continue
            at = list(split.outputs).index(value)
            source, rows = whole, np.arange(sum(sizes[:at]), sum(sizes[: at + 1]))
        up = find_linear(source.producer(), with_add=True)
        if up is not None and up.output is source and not up.read_only and not up.shared:
            return Gated(up, np.arange(up.out_features) if rows is None else rows, tuple(downs))
    return None


def gated_scales(one: Gated) -> np.ndarray:
    """The balancing logarithms of a gated MLP, float64 [features]."""
    downs = np.stack([np.abs(down.weight()).max(axis=0) for down in one.downs]).max(axis=0)
    return balance(np.abs(one.up.weight()[one.rows]).max(axis=1), downs)


def scale_gated(model: oir.Model, one: Gated, logs: np.ndarray) -> None:
    """Divide what is multiplied with the gate by `exp(logs)`, float64 [features], and undo it in the layers behind."""
    scale = np.exp(logs)
    divide_gated(model, one, scale)
    for down in one.downs:
        down.write(model, down.weight() * scale, down.bias())


def divide_gated(model: oir.Model, one: Gated, scale: np.ndarray) -> None:
    """Divide what is multiplied with the gate by `scale`, float64 [features]; the layers behind stay as they are."""
    weight, bias = one.up.weight().copy(), one.up.bias()
    weight[one.rows] /= scale[:, None]
    if bias is not None:
        bias = bias.copy()
        bias[one.rows] /= scale
    one.up.write(model, weight, bias)


def norm_readers(norm: Norm) -> tuple[Linear, ...] | str:
    """The linear layers that read a norm of the last axis, or why its gain cannot be divided."""
    rank = match.rank(norm.input)
    if norm.kind not in ("layer", "rms") or norm.axes != (-1,) or rank is None or norm.read_only:
        return norm.read_only or "it is no normalization of the last axis"
    if norm.scale is None and norm.is_one_node:
        return "it has no gain"
    plan = _taken_in(norm, np.ones(1))
    if isinstance(plan, str):
        return plan
    found = tuple(layer for layer, _, _ in plan.layers if isinstance(layer, Linear))
    return found if len(found) == len(plan.layers) else "a convolution reads it"


def _taken_in(norm: Norm, scale: np.ndarray) -> absorb.Plan | str:
    rank = match.rank(norm.input)
    assert rank is not None
    return absorb.into_layers_after(Affine(norm.nodes, norm.input, scale, np.zeros(1), rank - 1))


def norm_scales(norm: Norm, readers: tuple[Linear, ...]) -> np.ndarray:
    """The balancing logarithms for the gain of a norm, float64 [features]; a gain reaches as far as its number."""
    reading = np.stack([np.abs(layer.weight()).max(axis=0) for layer in readers]).max(axis=0)
    return balance(np.abs(norm.gain(len(reading))), reading)


def scale_norm(model: oir.Model, norm: Norm, logs: np.ndarray) -> None:
    """Divide the gain and bias of a norm by `exp(logs)`, float64 [features], and undo it in the layers that read it.

    Args:
        model: the model.
        norm: one for which `norm_readers` gives layers; a norm without a gain gets a product with one.
        logs: the logarithms.

    Raises:
        ValueError: the layers cannot take it in.
    """
    scale = np.exp(logs)
    plan = _taken_in(norm, scale)
    if isinstance(plan, str):
        raise ValueError(plan)
    for layer, weight, bias in plan.layers:
        layer.write(model, weight, bias)
    if norm.scale is None:
        _add_gain(model, norm, 1 / scale)
    else:
        divide_gain(model, norm, scale)


def divide_gain(model: oir.Model, norm: Norm, scale: np.ndarray) -> None:
    """Divide the gain, which there is, and the bias of a norm by `scale`, float64 [features], and nothing else."""
    gain, offset = norm.gain(len(scale)) / scale, norm.offset(len(scale)) / scale
    for parameter, array in ((norm.scale, gain), (norm.bias, offset)):
        if parameter is not None and parameter.dtype is not None:
            node = next(node for node in norm.nodes if any(one is parameter.value for one in node.inputs))
            index = next(index for index, one in enumerate(node.inputs) if one is parameter.value)
            edit.set_input(
                node, index, edit.add_rounded(model, parameter.source.name or "gain", array, parameter.dtype)
            )


def _add_gain(model: oir.Model, norm: Norm, gain: np.ndarray) -> None:
    last, uses = norm.nodes[-1], list(norm.output.uses())
    assert last.graph is not None
    stored = edit.add_rounded(model, f"{norm.output.name}_gain", gain, norm.output.dtype or oir.DataType.FLOAT)
    product = edit.make("Mul", [norm.output, stored], like=last)
    last.graph.insert_after(last, [product])
    for use in uses:
        use.node.replace_input_with(use.idx, same_shape(product, norm.output))
