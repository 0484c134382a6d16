"""Layers as two factors: which can be, the subspace of the outputs that is kept, and writing the pair.

With W [out, in] the weight and M [in, in] a second moment of the rows that it multiplies, the r leading eigenvectors
T [out, r] of W M Wᵀ span the subspace in which the outputs have the most energy, and W' = T (Tᵀ W) is the matrix of
rank r that changes them least, in the mean square (Eckart and Young). With the moment of the data this is the utilized
rank projection (Garg et al. 2024, arXiv:2407.04797) and equals the whitened SVD of SVD-LLM (Wang et al. 2024,
arXiv:2403.07378) without a Cholesky factor or an inverse, so the moment may be singular. With M = I it is the plain
SVD, and with M = diag(s²) the SVD of the weight whose columns are scaled by s (ASVD, Yuan et al. 2023,
arXiv:2312.05821).

What a BatchNormalization behind a convolution multiplies the outputs by is part of the metric, as if it were folded
into the weight: the subspace is that of D W with D diagonal, and W' = D⁻¹ T Tᵀ D W.

A convolution multiplies its patches, [channels, *kernel] flattened, a grouped one in each group by itself. Layers that
read one value are one layer whose outputs are stacked: they share the first factor.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import cost, edit, match, weights
from burnish.ir.errors import InputError
from burnish.ir.views.affine import Affine, batch_affine
from burnish.ir.views.convolution import find_convolution
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.parameter import same_shape
from burnish.passes.gram import Gram
from burnish.passes.layers import Layer, unobservable
from burnish.passes.lossy import Savings
from burnish.passes.rank import by_group, matrices
from burnish.passes.reducers import Magnitudes
from burnish.passes.reservoirs import Several

_OPEN = 1e-10
"""The share of a moment that is added in all directions, so that the weight decides where the data leaves it open."""


def refusal(model: oir.Model, layer: Layer) -> str | None:
    """Why a layer cannot be written as two factors, in plain words; None when it can."""
    reason = layer.read_only or unobservable(model, layer)
    if reason is not None:
        return reason
    if layer.shared:
        return f"{layer.shared[0].op_type} shares the weight"
    for parameter in (layer.parameter, layer.bias_parameter):
        if parameter is not None and parameter.steps:
            return f"its weight lies behind a {parameter.steps[-1].op_type}"
    if layer.dtype is None or not layer.dtype.is_floating_point():
        return "its weight is not floating point"
    if isinstance(layer, Linear):
        return None
    if layer.transposed:
        return "it is a transposed convolution"
    if layer.groups == layer.in_channels > 1:
        return "it is depthwise: each filter is a factor by itself"
    return None


def stacked(layers: Sequence[Layer]) -> np.ndarray:
    """The weights of layers that read one value, float64 [groups, sum of out / groups, features]."""
    return matrices(layers[0]) if len(layers) == 1 else np.concatenate([matrices(one) for one in layers], 1)


def gains(model: oir.Model, layer: Layer) -> np.ndarray | None:
    """What is multiplied with the magnitude of each output before anything else reads it, if it is not 1.

    Returns:
        float64 [groups, out / groups], at least a thousandth of the largest.
    """
    node = match.sole_consumer(layer.output, "BatchNormalization")
    found = (
        None if node is None or isinstance(layer, Linear) else batch_affine(node, model.graph.opset_imports.get("", 1))
    )
    if not isinstance(found, Affine) or isinstance(layer, Linear):
        return None
    sizes = np.abs(np.broadcast_to(found.scale, (layer.out_channels,)))
    return np.maximum(sizes, 1e-3 * sizes.max()).reshape(layer.groups, -1) if sizes.max() > 0 else None


def together(layers: Iterable[Linear]) -> list[tuple[Linear, ...]]:
    """The layers that read one value in the same way, two or more, and so can share a first factor."""
    found: dict[tuple[object, ...], list[Linear]] = {}
    for layer in layers:
        key = (id(layer.input), layer.node.op_type, layer.input_axis, layer.dtype, layer.stored_transposed)
        found.setdefault(key, []).append(layer)
    return [tuple(group) for group in found.values() if len(group) > 1]


def moment_of(
    seen: Several, weight: np.ndarray, metric: Literal["data", "weight", "activation"], centred: bool
) -> np.ndarray:
    """The moment that a basis is taken in.

    Args:
        seen: the `Gram` of what the layers read, and for `activation` its `Magnitudes`.
        weight: float64 [groups, out, in], as `stacked` gives it.
        metric: `data`, the moment of the rows; `weight`, the unit matrix; `activation`, mean magnitudes, diagonal.
        centred: about the mean.

    Returns:
        float64 [groups, in, in].

    Raises:
        InputError: it is not finite.
    """
    groups, _, size = weight.shape
    gram = seen.parts[0]
    assert isinstance(gram, Gram)
    matrix = gram.covariance if centred else gram.matrix / gram.rows
    if not np.isfinite(matrix).all():
        raise InputError("its input holds NaN, infinity, or numbers too large to be squared")
    if metric == "data":
        return steadied(by_group(matrix, size), gram.rows)
    if metric == "weight":
        return np.broadcast_to(np.eye(size), (groups, size, size))
    magnitudes = seen.parts[1]
    assert isinstance(magnitudes, Magnitudes) and magnitudes.mean is not None
    taps = groups * size // len(magnitudes.mean)
    return np.stack([np.diag(one) for one in np.repeat(magnitudes.mean, taps).reshape(groups, size)])


def steadied(moment: np.ndarray, rows: int) -> np.ndarray:
    """A moment mixed with a multiple of the unit matrix where it was seen on few rows, so that the weight counts more.

    The share of the unit matrix is p / (p + 10 n) for n rows of p features. With more than ten rows a feature the
    moment stays as it is. Directions that few rows never showed are not empty: without this a classifier behind a mean,
    seen on a hundred pictures, loses more than by the plain SVD.

    Args:
        moment: float64 [groups, features, features].
        rows: how many it is of.
    """
    size = moment.shape[1]
    if rows > 10 * size:
        return moment
    share = size / (size + 10 * rows)
    means = np.trace(moment, axis1=1, axis2=2)[:, None, None] / size
    return np.asarray((1 - share) * moment + share * means * np.eye(size))


def basis(weight: np.ndarray, moment: np.ndarray, most: int) -> np.ndarray:
    """The leading directions of the outputs, in the smaller of the two spaces that they can be written in.

    Args:
        weight: float64 [groups, out, in].
        moment: float64 [groups, in, in], symmetric, not negative.
        most: how many directions.

    Returns:
        float32 [groups, min(out, in), most], the leading direction first: T itself, or where out is the larger E with
        T = W E up to rotation. `split` makes the columns orthogonal again.
    """
    _, out, size = weight.shape
    found = np.empty((len(weight), min(out, size), min(most, out, size)), np.float32)
    for index, (one, square) in enumerate(zip(weight, moment, strict=True)):
        square = square + _OPEN * np.trace(square) / size * np.eye(size)
        if out <= size:
            vectors = np.linalg.eigh(one @ square @ one.T)[1]
        else:
            energies, directions = np.linalg.eigh(square)
            root = directions * np.sqrt(np.maximum(energies, 0))
            product = one @ root
            vectors = root @ np.linalg.eigh(product.T @ product)[1]
            vectors = vectors / np.maximum(np.linalg.norm(one @ vectors, axis=0), np.finfo(np.float32).tiny)
        found[index] = vectors[:, ::-1][:, : found.shape[2]]
    return found


def split(
    weight: np.ndarray, directions: np.ndarray, rank: int, gain: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Two factors whose product is the projection of the outputs on the first `rank` directions.

    Args:
        weight: float64 [groups, out, in].
        directions: what `basis` gives for it, or for its product with `gain`.
        rank: at most the number of directions.
        gain: the metric of the outputs, float64 [groups, out]; ones when absent.

    Returns:
        First [groups, rank, in] and second [groups, out, rank], float64. Row i of the first and column i of the second
        (times `gain`) have the same length, as those of U√S and √S Vᵀ.
    """
    scaled = weight if gain is None else weight * gain[:, :, None]
    kept = directions[:, :, :rank].astype(np.float64)
    spanning = scaled @ kept if weight.shape[1] > weight.shape[2] else kept
    second = np.linalg.qr(spanning)[0]
    first = second.transpose(0, 2, 1) @ scaled
    sizes = np.sqrt(np.linalg.norm(first, axis=2))
    sizes[sizes == 0] = 1.0
    second = second * sizes[:, None, :]
    return first / sizes[:, :, None], second if gain is None else second / gain[:, :, None]


def biases(
    layers: Sequence[Layer], weight: np.ndarray, pair: tuple[np.ndarray, np.ndarray], mean: np.ndarray | None
) -> list[np.ndarray | None]:
    """The bias of each layer, float64 [out]; with the mean of the rows, what the projection changes at it is added."""
    old = [layer.bias() for layer in layers]
    if mean is None:
        return list(old)
    first, second = pair
    centre = mean.reshape(len(weight), -1, 1)
    change = (weight @ centre - second @ (first @ centre))[:, :, 0]
    parts = np.split(change, np.cumsum([_width(layer) for layer in layers])[:-1], 1)
    return [part.reshape(-1) + (0.0 if one is None else one) for part, one in zip(parts, old, strict=True)]


def savings(layers: Sequence[Layer], rank: int, corrected: bool, dims: Mapping[str, int]) -> Savings:
    """What two factors save.

    Args:
        layers: layers that share the first factor.
        rank: of each group.
        corrected: every layer has a bias afterwards.
        dims: numbers for symbolic dimensions.
    """
    groups = layers[0].groups if not isinstance(layers[0], Linear) else 1
    out, size = sum(map(_width, layers)), _features(layers[0])
    new = groups * rank * (out + size)
    new += sum(_out(one) for one in layers if corrected or one.bias_parameter is not None)
    nodes = {id(node) for layer in layers for node in layer.nodes}
    gone = {layer.parameter.source.name: layer.parameter.source for layer in layers if layer.parameter is not None}
    for one in (layer.bias_parameter for layer in layers):
        if one is not None and all(id(user) in nodes for user in match.consumers(one.source)):
            gone[one.source.name] = one.source
    tensors = [weights.tensor_of(value) for value in gone.values()]
    dtype = layers[0].dtype
    width = 0 if dtype is None else dtype.bitwidth // 8
    before = [cost.node_cost(layer.node, dict(dims)).macs for layer in layers]
    macs = None
    if None not in before:
        rows = sum(one for one in before if one is not None) // (groups * out * size)
        macs = rows * groups * (out * size - rank * (out + size))
    return Savings(
        sum(one.size for one in tensors if one is not None) - new,
        sum(one.nbytes for one in tensors if one is not None) - new * width,
        macs,
    )


def _out(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, Linear) else layer.out_channels


def _width(layer: Layer) -> int:
    """Outputs of one group."""
    return layer.out_features if isinstance(layer, Linear) else layer.out_channels // layer.groups


def _features(layer: Layer) -> int:
    """What a row of one group holds."""
    if isinstance(layer, Linear):
        return layer.in_features
    return layer.in_channels // layer.groups * int(np.prod(layer.kernel))


def found(node: oir.Node) -> Layer:
    """The layer of a node.

    Raises:
        ValueError: it has none any more.
    """
    layer = find_linear(node) or find_convolution(node)
    if layer is None:
        raise ValueError(f"{match.describe(node)} is no layer any more")
    return layer


def write_alike(model: oir.Model, layers: Sequence[Layer], write: Callable[[Sequence[Layer]], None]) -> None:
    """Write layers, and in the same way those that read their very weights, as tied blocks do; new constants are one.

    Args:
        model: the model.
        layers: of one edit.
        write: writes such layers.
    """
    twins: dict[int, list[Layer]] = {}
    for layer in layers:
        for node in layer.shared:
            other = found(node)
            twins.setdefault(id(other.input), []).append(other)
    before = set(model.graph.initializers)
    for one in (layers, *twins.values()):
        write(one)
    if twins:
        join_equal(model, before)


def join_equal(model: oir.Model, before: Container[str]) -> None:
    """Let constants of the main graph that are equal and new be one.

    Args:
        model: the model.
        before: the names of the initializers that are not new.
    """
    first: dict[object, oir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = weights.tensor_of(value)
        if tensor is None or name in before:
            continue
        same = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if same is not value:
            edit.replace_value(value, same)
            edit.drop_if_unused(value)


def write(
    model: oir.Model, layers: Sequence[Layer], pair: tuple[np.ndarray, np.ndarray], bias: Sequence[np.ndarray | None]
) -> None:
    """Write layers that read one value as a first factor, which they share, and a second one each.

    Args:
        model: the model.
        layers: in the order of their nodes.
        pair: factors of the stacked weights, as `split` gives them.
        bias: of each layer, float64 [out].
    """
    first, second = pair
    if not isinstance(layers[0], Linear):
        _write_convolution(model, layers[0], first, second, bias[0])
        return
    linears = [layer for layer in layers if isinstance(layer, Linear)]
    inner = _first_linear(model, linears, first[0])
    parts = np.split(second[0], np.cumsum([layer.out_features for layer in linears])[:-1])
    for layer, part, one in zip(linears, parts, bias, strict=True):
        edit.set_input(layer.node, 0, inner)
        layer.node.attributes.pop("transA", None)
        layer.write(model, part, one)


def _first_linear(model: oir.Model, layers: Sequence[Linear], first: np.ndarray) -> oir.Value:
    one = layers[0]
    gemm = one.node.op_type == "Gemm"
    stored = first if one.stored_transposed else first.T
    origin = [node for layer in layers for node in layer.nodes]
    attributes = {"transA": int(one.input_axis == 0) or None, "transB": int(one.stored_transposed) or None}
    node = edit.make(
        one.node.op_type,
        [one.input, edit.add_rounded(model, _stem(one), stored, _dtype(one))],
        attributes if gemm else None,
        like=origin,
    )
    before = one.node.outputs[0]
    node.outputs[0].type = before.type
    if before.shape is not None:
        node.outputs[0].shape = oir.Shape([*before.shape[:-1], len(first)])
    edit.insert_before(one.node, [node])
    return node.outputs[0]


def _write_convolution(
    model: oir.Model, layer: Layer, first: np.ndarray, second: np.ndarray, bias: np.ndarray | None
) -> None:
    """A convolution to `rank` channels a group, then one that mixes them at each position."""
    if isinstance(layer, Linear):
        raise TypeError(layer)
    old, dtype, stem = layer.node, _dtype(layer), layer.parameter.source.name or "weight"
    groups, rank, _ = first.shape
    taken = first.reshape(groups * rank, layer.in_channels // groups, *layer.kernel)
    given = second.reshape((layer.out_channels, rank) + (1,) * len(layer.kernel))
    before = edit.make("Conv", [layer.input, edit.add_rounded(model, _stem(layer), taken, dtype)], like=old)
    before.attributes.update(old.attributes)
    last = [edit.add_rounded(model, stem, given, dtype)]
    if bias is not None:
        last.append(edit.add_rounded(model, f"{stem}_bias", bias, dtype))
    after = edit.make("Conv", [before.outputs[0], *last], {"group": groups} if groups > 1 else None, like=old)
    before.outputs[0].type = layer.output.type
    if layer.output.shape is not None:
        before.outputs[0].shape = oir.Shape([layer.output.shape[0], groups * rank, *layer.output.shape[2:]])
    same_shape(after, layer.output)
    edit.replace_node(old, [before, after])


def _stem(layer: Layer) -> str:
    name = layer.parameter.source.name if layer.parameter is not None else None
    return f"{name or 'weight'}_first"


def _dtype(layer: Layer) -> oir.DataType:
    if layer.dtype is None:
        raise ValueError(f"{match.describe(layer.node)} has no dtype")
    return layer.dtype
