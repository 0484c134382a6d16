"""Shapes of the results of layers: products, convolutions, pooling, normalization, attention, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as oir

from burnish.ir import dims, match, weights
from burnish.ir.dims import Dim

if TYPE_CHECKING:
    from burnish.ir.inference import Inference

Shape = tuple[Dim, ...]


def axes_of(facts: Inference, node: oir.Node) -> list[int] | None:
    """The axes a node names in its attribute or in an input whose content is known."""
    found = match.attribute(node, "axes")
    return list(found) if found is not None else facts.numbers(match.input_of(node, 1))


def _matmul(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    left, right = shapes[0], shapes[1]
    if left is None or right is None or not left or not right:
        return None
    batch = dims.broadcast_shapes(left[:-2], right[:-2])
    return [batch + (left[-2:-1] if len(left) > 1 else ()) + (right[-1:] if len(right) > 1 else ())]


def _gemm(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    left, right = shapes[0], shapes[1]
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return None
    return [
        (left[1 if match.attribute(node, "transA", 0) else 0], right[0 if match.attribute(node, "transB", 0) else 1])
    ]


def _window(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source = shapes[0] or ()
    kernel: Sequence[Dim] | None = match.attribute(node, "kernel_shape")
    channels = source[1]
    if node.op_type.endswith(("Conv", "ConvInteger")):
        weight = shapes[1]
        if weight is None:
            return None
        kernel, channels = kernel or weight[2:], weight[0]
    count = len(source) - 2
    if kernel is None or not all(isinstance(k, int) for k in kernel):
        return None
    strides, dilations = (
        match.attribute(node, "strides") or [1] * count,
        match.attribute(node, "dilations") or [1] * count,
    )
    pads, auto = match.attribute(node, "pads") or [0] * 2 * count, match.attribute(node, "auto_pad", "NOTSET")
    spatial = []
    for i in range(count):
        reach = (int(kernel[i]) - 1) * dilations[i] + 1  # type: ignore[arg-type]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            size = dims.divide(dims.add(source[i + 2], strides[i] - 1), strides[i])
        else:
            around = pads[i] + pads[i + count] if auto == "NOTSET" else 0
            span = dims.add(source[i + 2], around - reach)
            up = strides[i] - 1 if match.attribute(node, "ceil_mode", 0) else 0
            exact = up == 0 or strides[i] == 1
            size = span if strides[i] == 1 else dims.divide(dims.add(span, up), strides[i]) if exact else None
            size = dims.add(size, 1) if size is not None else None
        spatial.append(facts.unknown(node.outputs[0], i + 2) if size is None else size)
    out = (source[0], channels, *spatial)
    return [out, out]


def _global_pool(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    source = shapes[0] or ()
    return [source[:2] + (1,) * (len(source) - 2)]


def _first_only(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    return [shapes[0]] * (2 if node.op_type == "Dropout" else 1) + [shapes[1] if len(shapes) > 1 else None] * 4


def _layer_norm(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    source = shapes[0] or ()
    axis = match.attribute(node, "axis", -1) % len(source)
    rest = source[:axis] + (1,) * (len(source) - axis)
    return [source, rest, rest]


def _attention(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    q, k, v = shapes[:3]
    if q is None or k is None or v is None:
        return None
    y = (*q[:3], v[-1])
    if len(q) == 3:
        query_heads, heads = match.attribute(node, "q_num_heads"), match.attribute(node, "kv_num_heads")
        k_size, v_size = dims.divide_exactly(k[2], heads), dims.divide_exactly(v[2], heads)
        if k_size is None or v_size is None:
            return None
        y = (*q[:2], dims.multiply(query_heads, v_size))
        k, v = (k[0], heads, k[1], k_size), (v[0], heads, v[1], v_size)
    present = []
    for one, past in ((k, facts.shape(match.input_of(node, 4))), (v, facts.shape(match.input_of(node, 5)))):
        present.append((one[0], one[1], one[2] if past is None else dims.add(one[2], past[2]), one[3]))
    return [y, *present, None]


def _reduce(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source, axes = shapes[0] or (), axes_of(facts, node)
    if axes is None and match.input_of(node, 1) is not None:
        return None
    if not axes and match.attribute(node, "noop_with_empty_axes", 0):
        return [source]
    return [_reduced(source, axes or list(range(len(source))), match.attribute(node, "keepdims", 1))]


def _reduced(source: Shape, axes: list[int], keep: int) -> Shape:
    gone = {axis % len(source) for axis in axes} if source else set()
    return tuple(1 if i in gone else size for i, size in enumerate(source) if keep or i not in gone)


def _arg(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    return [_reduced(shapes[0] or (), [match.attribute(node, "axis", 0)], match.attribute(node, "keepdims", 1))]


def _top(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source, count = shapes[0], facts.integers(match.input_of(node, 1))
    if source is None or count is None or len(count) != 1:
        return None
    axis = match.attribute(node, "axis", -1) % len(source)
    return [(*source[:axis], count[0], *source[axis + 1 :])] * 2


def _einsum(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    """Where each letter of the result is a letter of the inputs; a letter of several sizes is as the first that is
    not 1."""
    read, arrow, out = str(match.attribute(node, "equation", "")).replace(" ", "").partition("->")
    terms = read.split(",")
    if not arrow or "." in read or len(terms) != len(shapes):
        return None
    sizes: dict[str, Dim] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if shape is None or len(shape) != len(term):
            return None
        for letter, size in zip(term, shape, strict=True):
            if sizes.get(letter, 1) == 1:
                sizes[letter] = size
    return [tuple(sizes[letter] for letter in out)] if set(out) <= sizes.keys() else None


def _pad(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source, pads = shapes[0], match.attribute(node, "pads") or facts.numbers(match.input_of(node, 1))
    if source is None or pads is None:
        return None
    axes = list(range(len(source)))
    if match.input_of(node, 3) is not None:
        given = facts.numbers(match.input_of(node, 3))
        if given is None:
            return None
        axes = [axis % len(source) for axis in given]
    if len(pads) != 2 * len(axes):
        return None
    around = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
    return [tuple(dims.add(size, sum(around.get(axis, (0, 0)))) for axis, size in enumerate(source))]


def _tile(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source, times = shapes[0], facts.integers(match.input_of(node, 1))
    if source is None or times is None or len(times) != len(source):
        return None
    return [tuple(dims.multiply(size, by) for size, by in zip(source, times, strict=True))]


def _resize(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    """By sizes whose content is known, or constant scales; the size of an axis scaled by a fraction may be unknown."""
    source = shapes[0]
    if source is None or match.attribute(node, "axes") is not None:
        return None
    given = facts.integers(match.input_of(node, 3))
    if given is not None and match.attribute(node, "keep_aspect_ratio_policy", "stretch") == "stretch":
        return [tuple(given)] if len(given) == len(source) else None
    scales = weights.constant(match.input_of(node, 2 if facts.opset > 10 else 1), largest=16)
    if scales is None or scales.size != len(source):
        return None
    sizes: list[Dim] = []
    for axis, (size, scale) in enumerate(zip(source, scales.tolist(), strict=True)):
        if float(scale).is_integer():
            sizes.append(dims.multiply(size, int(scale)))
        else:
            known = isinstance(size, int)
            sizes.append(int(size * scale) if known else facts.unknown(node.outputs[0], axis))
    return [tuple(sizes)]


LAYER_RULES = {
    **dict.fromkeys(["Conv", "MaxPool", "AveragePool", "LpPool"], _window),
    **dict.fromkeys(["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"], _global_pool),
    **dict.fromkeys(["BatchNormalization", "Dropout"], _first_only),
    **dict.fromkeys(
        [f"Reduce{kind}" for kind in "Mean Sum Max Min Prod L1 L2 LogSum LogSumExp SumSquare".split()], _reduce
    ),
    **dict.fromkeys(["ArgMax", "ArgMin"], _arg),
    "MatMul": _matmul,
    "Einsum": _einsum,
    "TopK": _top,
    "DynamicQuantizeLinear": lambda facts, node, shapes: [shapes[0], (), ()],
    "MatMulInteger": _matmul,
    "QLinearMatMul": lambda facts, node, shapes: _matmul(facts, node, shapes[::3]),
    "ConvInteger": _window,
    "QLinearConv": lambda facts, node, shapes: _window(facts, node, shapes[::3]),
    "Gemm": _gemm,
    "Pad": _pad,
    "Tile": _tile,
    "Resize": _resize,
    "LayerNormalization": _layer_norm,
    "RotaryEmbedding": _first_only,
    "Attention": _attention,
}
"""By operator: the shapes of the outputs from those of the inputs, None when they are not known."""
