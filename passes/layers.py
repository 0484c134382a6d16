"""The layers of a model that hold a matrix, where their inputs are observed, and how the rows of these are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.views.convolution import Convolution, convolutions
from burnish.ir.views.linear import Linear, find_linear, linears
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.ir.walk import is_op, walk
from burnish.passes import grids
from burnish.passes.gram import ConvolutionGram, Gram
from burnish.passes.reducers import Reducer
from burnish.passes.sites import refusal

Layer = Linear | Convolution
R = TypeVar("R", bound=Reducer)

_FLOATS = (oir.DataType.FLOAT, oir.DataType.FLOAT16)

STATISTICS = 1 << 30
"""Bytes of statistics of layers that are held at once; further layers need further runs over the samples."""


def layers(model: oir.Model) -> dict[str, Layer]:
    """The linear layers and convolutions of all graphs, in the order of the nodes, by name.

    A layer is called like its node, or like its output where nodes have no name of their own; branches may have several
    outputs of one name, which are numbered.
    """
    found: dict[int, Layer] = {id(one.node): one for one in linears(model)}
    found |= {id(one.node): one for one in convolutions(model)}
    nodes = [
        node for graph in (model.graph, *(f.graph for f in model.functions.values())) for node in graph.all_nodes()
    ]
    ordered = [found[id(node)] for node in nodes if id(node) in found]
    names = Counter(one.node.name for one in ordered)
    named: dict[str, Layer] = {}
    for one in ordered:
        name = str(one.node.name if one.node.name and names[one.node.name] == 1 else one.output.name)
        again = sum(name == key.rpartition(" #")[0] or name == key for key in named)  # in branches beside each other
        named[name if not again else f"{name} #{again + 1}"] = one
    return named


def unusable(parameter: Parameter) -> str | None:
    """Why the numbers of a weight cannot be rounded to integers, in plain words; None when they can be."""
    if not parameter.finite:
        return "its weight holds NaN or infinity"
    if 0 in parameter.shape:
        return "its weight holds no numbers"
    tensor = weights.tensor_of(parameter.source)
    if tensor is not None and tensor.dtype in _FLOATS and grids.too_small(tensor.numpy()):
        return f"the numbers of its weight are smaller than scales of {tensor.dtype.name.lower()} can be"
    return None


def lost(layer: Layer) -> str | None:
    """Why a layer cannot have its weight behind a DequantizeLinear, in plain words; None when it can.

    ONNX Runtime 1.32 joins a convolution with a bias and an Add behind it (ConvAddActivationFusion), and does not look
    whether the model gives out what is between them.
    """
    given = isinstance(layer, Convolution) and layer.output.is_graph_output()
    if given and any(is_op(reader, "Add") for reader in match.consumers(layer.output)):
        return "ONNX Runtime 1.32 loses an output of the model that is a convolution and is added to something, too"
    return None


def others(model: oir.Model) -> Iterator[tuple[oir.Node, str]]:
    """Products with a matrix, and convolutions, that are no layers, each with the reason why it keeps its numbers."""
    for node in walk(model, "MatMul", "Gemm", "Conv", "ConvTranspose"):
        given = match.input_of(node, 1)
        if given is not None and given.is_graph_input() and given.is_initializer():
            yield (
                node,
                (
                    f"its weight `{given.name}` is an input with a default, which callers may change; "
                    "`python -m onnxruntime.tools.remove_initializer_from_input` makes it a constant"
                ),
            )
        if is_op(node, "Conv", "ConvTranspose"):
            continue
        held = [find_parameter(value) for value in node.inputs[:2]]
        left, right = (None if one is None or not _is_matrix(one) else one for one in held)
        if (left is None) == (right is None) or any(weights.is_constant(value) for value in node.outputs):
            continue
        if left is not None:
            yield node, "its weight stands on the left, and kernels on integers or of few bits take one on the right"
        elif find_linear(node) is None and right is not None and any(size != 1 for size in right.shape[:-2]):
            count = int(np.prod(right.shape[:-2]))
            yield node, f"its weight is a stack of {count} matrices, and kernels on integers or of few bits take one"
        elif is_op(node, "Gemm") and find_linear(node) is None:
            yield node, "what it adds is not one constant for each output"


def _is_matrix(parameter: Parameter) -> bool:
    return len(parameter.shape) > 1 and min(parameter.shape[-2:]) > 1 and parameter.dtype in _FLOATS


def unobservable(model: oir.Model, layer: Layer) -> str | None:
    """Why what passes through a layer cannot be observed, in plain words; None when it can."""
    return refusal(model, layer.output) or refusal(model, layer.input)


def gram_of(layer: Layer, *, patches: bool = True, exact: bool = False) -> Gram:
    """An empty reducer for the input of a layer: the Gram matrix of the rows that its weight multiplies.

    Args:
        layer: a layer; a transposed convolution multiplies the channels of each position.
        patches: unroll the patches of a convolution; else take the channels of each position, which is much cheaper.
        exact: see `Gram`.
    """
    if isinstance(layer, Linear):
        return Gram(axis=layer.input_axis, exact=exact)
    pointwise = all(size == 1 for size in (*layer.kernel, *layer.strides)) and not any(layer.pads) and layer.groups == 1
    if layer.transposed or not patches or pointwise:
        return Gram(axis=1, exact=exact)
    same = {"SAME_UPPER": "upper", "SAME_LOWER": "lower"}.get(layer.auto_pad, "")
    pads = () if layer.auto_pad == "VALID" else layer.pads
    return ConvolutionGram(
        exact=exact,
        kernel=layer.kernel,
        strides=layer.strides,
        dilations=layer.dilations,
        pads=pads,
        same=same,
        groups=layer.groups,
    )


def portions(found: Mapping[str, Layer], wanted: Mapping[str, R], limit: int = STATISTICS) -> Iterator[dict[str, R]]:
    """The reducers of layers in groups that hold no more than `limit` bytes, layers of one input together.

    Args:
        found: layers by name, in order.
        wanted: what is to see the input of some of them; one that needs more is alone.
        limit: bytes.
    """
    part: dict[str, R] = {}
    held = 0
    seen: set[tuple[int, str]] = set()
    for name, reducer in wanted.items():
        layer = found[name]
        key = (id(layer.input), reducer.options)
        size = reducer.nbytes(_row_shape(layer, reducer))
        if part and held + (0 if key in seen else size) > limit:
            yield part
            part, held, seen = {}, 0, set()
        held += 0 if key in seen else size
        part[name] = reducer
        seen.add(key)
    if part:
        yield part


def _row_shape(layer: Layer, reducer: Reducer) -> tuple[int, ...]:
    """A shape whose features are those of the input of a layer."""
    features = layer.in_features if isinstance(layer, Linear) else layer.in_channels
    return {0: (features, 1), 1: (1, features, 1)}.get(reducer.feature_axis or 0, (1, features))
