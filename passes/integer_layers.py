"""Writing a convolution or linear layer so that it multiplies 8-bit integers: weight, bias, and what is around it.

With a grid of 8-bit floating-point numbers, for which there is no kernel, only what layers read and their weights are
rounded; the bias stays what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeGuard

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.errors import InputError
from burnish.ir.views.convolution import Convolution, find_convolution
from burnish.ir.views.linear import Linear
from burnish.ir.views.parameter import Parameter, same_shape, write_input
from burnish.ir.walk import is_op
from burnish.passes import grids, integer_clips, qdq, ranges
from burnish.passes.grids import Clip, Float8, Grid, Scales
from burnish.passes.integer_flow import CLIPPED, Flow, flow, miscounted, regions
from burnish.passes.layers import Layer, lost, unobservable, unusable
from burnish.passes.lossy import Savings

_FEW = 4
_ACTIVATIONS = ("Relu", "Clip")


def refusal(model: oir.Model, layer: Layer, grid: Grid | None = None) -> str | None:
    """Why a layer cannot multiply integers of a grid with fixed scales, in plain words; None when it can."""
    reason = layer.read_only or unobservable(model, layer) or (lost(layer) if isinstance(grid, Float8) else None)
    if reason is not None:
        return reason
    if isinstance(layer, Convolution) and layer.transposed:
        return (
            "ONNX Runtime has no kernel on integers for a transposed convolution; `quantize-weights` makes it smaller"
        )
    if miscounted(layer.input) is not None:
        return "ONNX Runtime computes the AveragePool before it wrongly on integers"
    if match.sole_consumer(layer.output, "BatchNormalization") is not None:
        return "a BatchNormalization stands behind it, which `fold-batchnorm` puts into its weights first"
    if layer.shared:
        return f"{layer.shared[0].op_type} shares the weight"
    for parameter in (layer.parameter, layer.bias_parameter):
        if parameter is not None and parameter.steps:
            return f"its weight lies behind a {parameter.steps[-1].op_type}"
    if layer.dtype != oir.DataType.FLOAT:
        return "it does not compute in float32"
    for parameter, what in ((layer.parameter, "weight"), (layer.bias_parameter, "bias")):
        if parameter is not None and not parameter.finite:
            return f"its {what} holds NaN or infinity"
    if layer.parameter is not None and (reason := unusable(layer.parameter)) is not None:
        return reason
    if isinstance(layer, Linear) and layer.parameter is not None and len(layer.parameter.shape) > 2:
        return "its weight has more than two axes, and ONNX Runtime takes scales for each output of two only"
    if isinstance(layer, Linear) and layer.add is not None and match.rank(layer.input) is None:
        return "the rank of its input is not known"
    return None


def images(found: Mapping[str, Layer]) -> dict[str, Layer]:
    """The convolutions."""
    return {name: layer for name, layer in found.items() if isinstance(layer, Convolution)}


def is_stem(layer: Layer) -> TypeGuard[Convolution]:
    """Whether it is a convolution on the few channels of an image, or a depthwise one behind the Relu or Clip of such a
    convolution.
    """
    if not isinstance(layer, Convolution) or layer.groups == 1:
        return isinstance(layer, Convolution) and layer.in_channels <= _FEW
    above = layer.input.producer() if layer.groups == layer.in_channels else None
    if above is None or not is_op(above, *_ACTIVATIONS) or above.inputs[0] is None:
        return False
    node = above.inputs[0].producer()
    image = None if node is None else find_convolution(node)
    return image is not None and image.groups == 1 and image.in_channels <= _FEW


def feature_axis(layer: Layer) -> int:
    """The axis of the input that the weight multiplies."""
    return layer.input_axis if isinstance(layer, Linear) else 1


def takes_bias(layer: Layer) -> bool:
    """Whether a bias costs no node."""
    return layer.bias_is_free if isinstance(layer, Linear) else True


def whole(model: oir.Model, layers: Collection[Layer], grid: Grid) -> Flow:
    """What is rounded, and for whom, when these layers multiply numbers of a grid."""
    return flow(model.graph, layers, between=not isinstance(grid, Float8))


def beside(model: oir.Model, layers: Mapping[str, Layer], grid: Grid) -> dict[str, dict[str, frozenset[str]]]:
    """By layer the values that no conversion is needed for when all are on integers, and the layers that this takes.

    These are the ones without which it is converted although all others are on integers, and where that is not enough,
    as where one branch of two suffices, the nearest others. Only layers that rounding reaches the value from are
    looked at, so that a chain takes time in proportion to its length.

    Args:
        model: the model.
        layers: by what they are called.
        grid: what numbers are rounded to.
    """
    found: dict[str, dict[str, frozenset[str]]] = {name: {} for name in layers}
    place = {name: index for index, name in enumerate(layers)}
    for nodes, own in regions(model.graph, layers) if not isinstance(grid, Float8) else ():

        def unconverted(some: Collection[str], nodes: Sequence[oir.Node] = nodes) -> dict[str, frozenset[str]]:
            one = flow(model.graph, [layers[name] for name in some], nodes=nodes)
            return {name: one.unconverted(layers[name]) for name in some}

        here = {str(out.name) for node in nodes for out in node.outputs}
        needed = {(name, value): {name} for name, ends in unconverted(own).items() for value in sorted(ends & here)}
        for other in own if needed else ():
            less = unconverted([name for name in own if name != other])
            for (name, value), some in needed.items():
                if name != other and value not in less[name]:
                    some.add(other)
        for (name, value), some in needed.items():
            for near in sorted(own, key=lambda other: abs(place[other] - place[name])):
                if value in unconverted(some)[name]:
                    break
                some.add(near)
            found[name][value] = frozenset(some - {name})
    return found


def _on_integers(layer: Layer, grid: Grid) -> bool:
    """Whether the kernel adds the bias as integers; that of a product of more than two axes does not."""
    if isinstance(grid, Float8):
        return False
    return not isinstance(layer, Linear) or is_op(layer.node, "Gemm") or match.rank(layer.input) == 2


def savings(model: oir.Model, layer: Layer, grid: Grid, per_channel: bool, corrected: bool) -> Savings:
    """What a layer alone saves; pairs that are on its values already are taken.

    Args:
        model: the model.
        layer: that `refusal` does not refuse.
        grid: what numbers are rounded to.
        per_channel: its weight has a scale for each output.
        corrected: it has a bias afterwards.
    """
    assert layer.parameter is not None
    pairs = sum(qdq.pair_on(value) is None for value in whole(model, [layer], grid).scale_of)
    out = layer.out_features if isinstance(layer, Linear) else layer.out_channels
    count = int(np.prod(layer.parameter.shape))
    scales = out if per_channel else 1
    zero_points = 0 if isinstance(grid, Float8) else pairs + scales
    parameters, size = -pairs - scales - zero_points, 3 * count - 4 * (pairs + scales) - zero_points
    old = layer.bias_parameter
    if old is not None or corrected:
        integers = _on_integers(layer, grid)
        gone = weights.tensor_of(old.source) if old is not None and not old.others(_bias_reader(layer)) else None
        parameters += (0 if gone is None else gone.size) - out - (scales if integers else 0)
        size += (0 if gone is None else gone.nbytes) - 4 * out - (4 * scales if integers else 0)
    return Savings(parameters, size, 0)


def _bias_reader(layer: Layer) -> oir.Node:
    return layer.nodes[-1]


def round_values(
    model: oir.Model, layers: Sequence[Layer], known: Mapping[str, np.ndarray], grid: Grid
) -> list[np.ndarray]:
    """Round what layers, and the operators between them, read and compute.

    Args:
        model: the model.
        layers: layers of the main graph.
        known: the least and the largest number of each value, by its name.
        grid: the integers.

    Returns:
        The scale of the input of each layer.

    Raises:
        InputError: a value is not known.
    """
    found = whole(model, layers, grid)
    inputs = [layer.input for layer in layers]
    given: dict[oir.Value, Scales] = {}
    for value, like in found.scale_of.items():
        if like in given:
            given[value] = qdq.scaled(given[like], found.factors.get(value, 1.0))
            continue
        ends = known.get(str(value.name))
        if ends is None:
            raise InputError(f"the range of `{value.name}` is not known: another pass has changed what is around it")
        given[value] = ranges.scales(float(ends[0]), float(ends[1]), grid)
    for value, readers in found.readers.items():
        if found.scale_of[value] in given and value in found.factors:
            integer_clips.rescale(model, value, given[value])
            continue
        put = qdq.put_pair(model, value, given[value], readers)
        there = qdq.scales_of(put)
        assert there is not None
        given[value] = there
    for node in [one for one in model.graph if one in found.nodes]:
        if is_op(node, *CLIPPED):
            integer_clips.spell_out(model, node)
        elif is_op(node, "Add"):
            integer_clips.round_number(model, node)
    return [given[value].scale for value in inputs]


def fitted(
    layer: Layer,
    input_scale: np.ndarray,
    grid: Grid,
    axis: int | None,
    clip: Clip,
    rounded: tuple[np.ndarray, Scales] | None = None,
) -> tuple[np.ndarray, Scales]:
    """The weight of a layer as integers [out, ...] and their scales, such that the bias has room.

    Args:
        layer: the layer.
        input_scale: of its input.
        grid: the integers.
        axis: 0 for a scale for each output, None for one.
        clip: see `grids.fit`.
        rounded: integers and scales that were found before; rounded to nearest again where the bias needs other scales.
    """
    weight = layer.weight()
    scales = grids.fit(weight, grid, axis, clip=clip) if rounded is None else rounded[1]
    bias = added(layer, grid)
    wider = scales if bias is None else qdq.fitting_bias(scales, bias, input_scale)
    if rounded is not None and np.array_equal(wider.scale, scales.scale):
        return rounded
    return grids.quantize(weight, wider), wider


def added(layer: Layer, grid: Grid) -> np.ndarray | None:
    """The bias that the kernel adds as integers.

    Of a bias beside 8-bit floating-point numbers ONNX Runtime 1.32 makes integers of 32 bits, too, with the product of
    both scales, and does not look whether they overflow.
    """
    return layer.bias() if isinstance(grid, Float8) or _on_integers(layer, grid) else None


def write(
    model: oir.Model,
    layer: Layer,
    input_scale: np.ndarray,
    weight: tuple[np.ndarray, Scales],
    shift: np.ndarray | None,
) -> None:
    """Write integers into a layer whose values are rounded already.

    Args:
        model: the model.
        layer: the layer; this view is out of date afterwards.
        input_scale: of its input.
        weight: integers [out, ...] and scales, as `fitted` gives them.
        shift: what is added to the bias, float64 [out]; None to leave it.
    """
    levels, scales = weight
    bias = layer.bias()
    if shift is not None:
        bias = (0.0 if bias is None else bias) + shift
    integers, rank = _on_integers(layer, scales.grid), match.rank(layer.input) or 3
    one_node = integers and isinstance(layer, Linear) and layer.add is not None
    node = _as_gemm(layer) if one_node else layer.node
    stored, scales = _as_stored(layer, levels, scales)
    qdq.put_weight(model, node, 1, stored, scales)
    for name in ("alpha", "beta"):
        node.attributes.pop(name, None)
    if bias is None:
        return
    stem = _stem(layer.parameter)
    if isinstance(layer, Linear) and layer.add is not None and not one_node:
        side = 1 if layer.add.inputs[0] is node.outputs[0] else 0
        shape = (1,) * (rank - 1) + (-1,)  # as many axes as the product: else ONNX Runtime makes a float32 Gemm of both
        write_input(model, layer.add, side, bias.reshape(shape), oir.DataType.FLOAT, f"{stem}_bias")
    elif not integers:
        write_input(model, node, 2, bias, oir.DataType.FLOAT, f"{stem}_bias")
    else:
        into = qdq.bias_scales(input_scale, scales)
        if match.input_of(node, 2) is None:
            edit.set_input(node, 2, edit.add_constant(model, f"{stem}_bias", bias.astype(np.float32)))
        qdq.put_weight(model, node, 2, grids.quantize(bias, into), into)


def shift(layer: Layer, weight: tuple[np.ndarray, Scales], mean: np.ndarray) -> np.ndarray:
    """What outputs, float64 [out], lose by a rounded weight at the mean of the input, float64 [features]."""
    apart = layer.weight() - grids.dequantize(*weight)
    groups = layer.groups if isinstance(layer, Convolution) else 1
    taps = apart.reshape(groups, apart.shape[0] // groups, apart.shape[1], -1).sum(3)
    return np.asarray(np.einsum("goi,gi->go", taps, mean.reshape(groups, -1)).reshape(-1))


def _as_gemm(layer: Layer) -> oir.Node:
    """A MatMul of matrices and the Add of its bias as one node."""
    assert isinstance(layer, Linear) and layer.add is not None and layer.bias_parameter is not None
    product = edit.make("Gemm", [*layer.node.inputs, layer.bias_parameter.value], like=layer.nodes)
    same_shape(product, layer.add.outputs[0])
    edit.replace_node(layer.add, product)
    return product


def _as_stored(layer: Layer, levels: np.ndarray, scales: Scales) -> tuple[np.ndarray, Scales]:
    """Integers [out, ...] in the layout of the layer's node, and the scales along its axis of outputs."""
    if isinstance(layer, Convolution):
        return levels, scales
    assert layer.parameter is not None
    stored = levels if layer.stored_transposed else levels.T
    stored = stored.reshape(layer.parameter.shape[:-2] + stored.shape)
    if scales.axis is None:
        return stored, scales
    axis = stored.ndim - (2 if layer.stored_transposed else 1)
    return stored, Scales(scales.grid, scales.scale, scales.zero_point, axis)


def _stem(parameter: Parameter | None) -> str:
    return (parameter.source.name if parameter is not None else None) or "weight"
