"""Types and shapes of operators' results: one rule an operator, ONNX's own inference for the operators not listed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as oir

from burnish.ir import dims, match
from burnish.ir.content_rules import slices
from burnish.ir.dims import Dim
from burnish.ir.layer_shape_rules import LAYER_RULES, axes_of
from burnish.ir.opsets import MISJUDGED

if TYPE_CHECKING:
    from burnish.ir.inference import Inference

Shape = tuple[Dim, ...]
Rule = Callable[["Inference", oir.Node, list["Shape | None"]], "Sequence[Shape | None] | None"]

_FLOAT, _INT64, _BOOL = oir.DataType.FLOAT, oir.DataType.INT64, oir.DataType.BOOL

_UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh CumSum Elu Erf
Exp Floor Gelu HardSigmoid HardSwish Hardmax Identity IsInf IsNaN LeakyRelu Log LogSoftmax Mish Neg Not
Reciprocal Relu Round Selu
Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Trilu InstanceNormalization
GroupNormalization LpNormalization LRN MeanVarianceNormalization RotaryEmbedding QuantizeLinear DequantizeLinear
RMSNormalization SimplifiedLayerNormalization
ScatterElements ScatterND Scatter TensorScatter ReverseSequence EyeLike
RandomNormalLike RandomUniformLike Bernoulli"""
_BROADCAST = """Add Sub Mul Div Pow Mod And Or Xor Equal Less LessOrEqual Greater GreaterOrEqual BitShift BitwiseAnd
BitwiseOr BitwiseXor PRelu Where Sum Max Min Mean"""
_TO_BOOL = {"And", "Or", "Xor", "Not", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsInf", "IsNaN"}
_TO_INT64 = {"Shape", "Size", "ArgMax", "ArgMin", "NonZero"}


def infer(facts: Inference, node: oir.Node) -> None:
    """Record the type and shape of each output of a standard operator."""
    shapes = [facts.shape(value) for value in node.inputs]
    rule = _RULES.get(node.op_type)
    found = None
    if rule is not None and (shapes and shapes[0] is not None or not node.inputs):
        found = rule(facts, node, shapes)
    types = _types(facts, node) if rule is not None else None
    if found is None or types is None:
        _from_schema(facts, node, found, types)
        return
    for index, value in enumerate(node.outputs):
        facts.set(value, types[index] if index < len(types) else types[0], found[index] if index < len(found) else None)


def _types(facts: Inference, node: oir.Node) -> list[oir.DataType | None] | None:
    op = node.op_type
    first = facts.dtype(node.inputs[0]) if node.inputs else None
    if op in _TO_BOOL:
        return [_BOOL]
    if op in _TO_INT64:
        return [_INT64]
    if op in ("Cast", "EyeLike", "RandomNormalLike", "RandomUniformLike", "Bernoulli"):
        to = match.attribute(node, "to" if op == "Cast" else "dtype")
        return [oir.DataType(to) if to is not None else first]
    if op == "Constant":
        return [facts.dtype(node.outputs[0]) or _constant_type(node)]
    if op == "ConstantOfShape":
        value = match.attribute(node, "value")
        return [value.dtype if value is not None else _FLOAT]
    if op in ("CastLike", "Where", "DequantizeLinear", "OneHot"):
        index = 2 if op == "OneHot" else 1
        out = match.attribute(node, "output_dtype", 0) if op == "DequantizeLinear" else 0
        return [oir.DataType(out) if out else facts.dtype(node.inputs[index])]
    if op == "QuantizeLinear":
        out, zero = match.attribute(node, "output_dtype", 0), match.input_of(node, 2)
        return [oir.DataType(out) if out else facts.dtype(zero) if zero is not None else oir.DataType.UINT8]
    second = {"TopK": _INT64, "MaxPool": _INT64, "Dropout": _BOOL if facts.opset >= 10 else first}.get(op, first)
    if op in ("MatMulInteger", "ConvInteger"):
        return [oir.DataType.INT32]
    if op in ("QLinearMatMul", "QLinearConv"):
        return [facts.dtype(match.input_of(node, 7))]
    if op == "DynamicQuantizeLinear":
        return [oir.DataType.UINT8, _FLOAT, oir.DataType.UINT8]
    if op in ("LayerNormalization",):
        return [first, _FLOAT, _FLOAT]
    return None if first is None else [first, second] + [first] * max(0, len(node.outputs) - 2)


def _constant_type(node: oir.Node) -> oir.DataType | None:
    from burnish.ir import weights

    tensor = weights.tensor_of(node.outputs[0])
    return tensor.dtype if tensor is not None else None


def _from_schema(
    facts: Inference, node: oir.Node, found: Sequence[Shape | None] | None, types: list[oir.DataType | None] | None
) -> None:
    """Ask ONNX's C++ inference about one node; axes it leaves open and names it makes up become fresh symbols."""
    answers = _ask_onnx(facts, node) if found is None or types is None else {}
    for index, value in enumerate(node.outputs):
        dtype, shape = answers.get(value.name, (None, None))
        if found is not None and index < len(found) and found[index] is not None:
            shape = found[index]
        elif shape is not None:
            shape = tuple(size if isinstance(size, int) else facts.unknown(value, i) for i, size in enumerate(shape))
        kind = (
            (types[index] if types is not None and index < len(types) else None) or dtype or match.tensor_dtype(value)
        )
        facts.set(value, kind, shape)


def _ask_onnx(facts: Inference, node: oir.Node) -> dict[str | None, tuple[oir.DataType | None, Any]]:
    import onnx

    if node.op_type in MISJUDGED or any(
        a.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS) or a.is_ref() for a in node.attributes.values()
    ):
        return {}
    given, data = {}, {}
    sizes: list[Any] | None
    for value in node.inputs:
        dtype = facts.dtype(value)
        if value is None or value.name is None or dtype is None:
            continue
        shape = facts.shape(value)
        sizes = None if shape is None else [size if isinstance(size, int) else repr(size) for size in shape]
        given[value.name] = onnx.helper.make_tensor_type_proto(int(dtype), sizes)
        numbers, content = facts.numbers(value), facts.content(value)
        if numbers is not None and content is not None and dtype != _BOOL:
            data[value.name] = onnx.helper.make_tensor(value.name, int(dtype), content.shape, numbers)
    try:
        schema = onnx.defs.get_schema(node.op_type, facts.opset, "")
        proto = oir.serde.serialize_node(node)
        result = onnx.shape_inference.infer_node_outputs(
            schema, proto, given, data, opset_imports=[onnx.helper.make_opsetid("", facts.opset)]
        )
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        onnx.defs.SchemaError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
    ):
        return {}
    answers: dict[str | None, tuple[oir.DataType | None, Any]] = {}
    for name, proto_type in result.items():
        if not proto_type.HasField("tensor_type"):
            continue
        tensor = proto_type.tensor_type
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        answers[name] = (
            oir.DataType(tensor.elem_type) if tensor.elem_type else None,
            sizes if tensor.HasField("shape") else None,
        )
    return answers


def _same(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    return [shapes[0]]


def _broadcast(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    return None if any(s is None for s in shapes) else [dims.broadcast_shapes(*(s for s in shapes if s is not None))]


def _shape(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    return [(len(range(len(shapes[0] or ()))[match.attribute(node, "start", 0) : match.attribute(node, "end")]),)]


def _scalar(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    return [()]


def _constant(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    from burnish.ir import weights

    tensor = weights.tensor_of(node.outputs[0])
    return None if tensor is None else [tuple(int(d) for d in tensor.shape)]  # type: ignore[arg-type]


def _reshape(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source = shapes[0] or ()
    target = facts.content(match.input_of(node, 1))
    if target is None:
        length = facts.shape(match.input_of(node, 1))
        if length is None or len(length) != 1 or not isinstance(length[0], int):
            return None
        return [tuple(facts.unknown(node.outputs[0], i) for i in range(length[0]))]
    result: list[Dim | None] = list(target.reshape(-1))
    if not match.attribute(node, "allowzero", 0):
        result = [source[i] if size == 0 and i < len(source) else size for i, size in enumerate(result)]
    # A symbol may be zero at run time, and zero copies; but then the axis it copies has to be zero as well.
    open_axes = [i for i, size in enumerate(result) if size is None or size == -1]
    if len(open_axes) == 1:
        left, others = list(source), list[Dim]()
        for size in (size for i, size in enumerate(result) if i != open_axes[0] and size is not None):
            if size in left and size != 0:  # a sum of sizes divides no product, but cancels against itself
                left.remove(size)
            else:
                others.append(size)
        whole, rest = dims.product(left), dims.product(others)
        result[open_axes[0]] = dims.divide_exactly(whole, rest)
        if result[open_axes[0]] is None and isinstance(rest, int) and rest > 0:
            result[open_axes[0]] = dims.divide(whole, rest)
    return [
        tuple(
            facts.unknown(node.outputs[0], i) if size is None or size == -1 else size for i, size in enumerate(result)
        )
    ]


def _transpose(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    source = shapes[0] or ()
    order = match.attribute(node, "perm") or range(len(source) - 1, -1, -1)
    return [tuple(source[axis] for axis in order)]


def _unsqueeze(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    axes, source = axes_of(facts, node), iter(shapes[0] or ())
    if axes is None:
        return None
    rank = len(shapes[0] or ()) + len(axes)
    ones = {axis % rank for axis in axes}
    return [tuple(1 if i in ones else next(source) for i in range(rank))]


def _squeeze(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source = shapes[0] or ()
    axes = axes_of(facts, node)
    if axes is None:
        if match.input_of(node, 1) is not None or not all(isinstance(size, int) for size in source):
            return None
        axes = [i for i, size in enumerate(source) if size == 1]
    dropped = {axis % len(source) for axis in axes} if source else set()
    return [tuple(size for i, size in enumerate(source) if i not in dropped)]


def _flatten(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    source, axis = shapes[0] or (), match.attribute(node, "axis", 1)
    axis = axis + len(source) if axis < 0 else axis
    return [(dims.product(source[:axis]), dims.product(source[axis:]))]


def _concat(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    if any(s is None for s in shapes):
        return None
    known = [s for s in shapes if s is not None]
    axis = match.attribute(node, "axis", 0) % len(known[0])
    total: Dim = 0
    for shape in known:
        total = dims.add(total, shape[axis])
    best = [next((s[i] for s in known if isinstance(s[i], int)), known[0][i]) for i in range(len(known[0]))]
    return [tuple(total if i == axis else size for i, size in enumerate(best))]


def _split(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source = shapes[0] or ()
    axis = match.attribute(node, "axis", 0) % len(source)
    parts: Sequence[Dim] | None = match.attribute(node, "split") or facts.integers(match.input_of(node, 1))
    if parts is None:
        size, count = source[axis], len(node.outputs)
        if match.input_of(node, 1) is not None or not isinstance(size, int):
            return None
        chunk = -(-size // count)
        parts = [chunk] * (count - 1) + [size - chunk * (count - 1)]
    return [tuple(part if i == axis else size for i, size in enumerate(source)) for part in parts]


def _slice(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source = shapes[0] or ()
    spans = slices(facts, node, len(source))
    if spans is None:
        axes = (
            facts.numbers(match.input_of(node, 3)) if match.input_of(node, 3) is not None else list(range(len(source)))
        )
        cut = set(range(len(source))) if axes is None else {axis % len(source) for axis in axes}
        return [tuple(facts.unknown(node.outputs[0], i) if i in cut else size for i, size in enumerate(source))]
    result = list(source)
    for axis, (start, end, step) in spans.items():
        size = sliced(source[axis], start, end, step)
        result[axis] = facts.unknown(node.outputs[0], axis) if size is None else size
    return [tuple(result)]


def sliced(size: Dim, start: Dim, end: Dim, step: int) -> Dim | None:
    """The length of `range(size)[start:end:step]`, None when it cannot be named."""
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(size)[slice(start, None if step < 0 and end < -size else end, step)])
    if step == -1 and isinstance(start, int) and start == -1 and isinstance(end, int) and end < -(2**31) + 1:
        return size
    if step != 1:
        return None
    if start == 0 and isinstance(size, int) and isinstance(end, dims.Expr) and dims.at_least(end, 0):
        return dims.least(size, end)
    first, last = _bound(size, start), _bound(size, end)
    if first is None or last is None or not dims.at_least(dims.subtract(last, first), 0):
        return None
    return dims.subtract(last, first)


def _bound(size: Dim, position: Dim) -> Dim | None:
    """`position` counted from the front and clamped to [0, size], None when that depends on the size."""
    if position == size or (isinstance(position, int) and position >= 2**31 - 1):
        return size
    if isinstance(position, int) and position < 0:
        counted = dims.add(size, position)
        return counted if dims.at_least(counted, 0) else None
    if not dims.at_least(position, 0):
        return None
    if dims.at_least(dims.subtract(size, position), 0):
        return position
    return size if dims.compare(size, position) == -1 else None


def _gather(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source, indices = shapes[0] or (), shapes[1]
    if indices is None:
        return None
    axis = match.attribute(node, "axis", 0) % len(source)
    return [source[:axis] + indices + source[axis + 1 :]]


def _second(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    return [shapes[1]]


def _gather_nd(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    source, indices, batch = shapes[0] or (), shapes[1], match.attribute(node, "batch_dims", 0)
    if indices is None or not isinstance(indices[-1], int):
        return None
    return [indices[:-1] + source[batch + indices[-1] :]]


def _content_shape(facts: Inference, node: oir.Node, value: oir.Value | None) -> Shape | None:
    sizes, shape = facts.content(value), facts.shape(value)
    if sizes is None:
        if shape is None or len(shape) != 1 or not isinstance(shape[0], int):
            return None
        return tuple(facts.unknown(node.outputs[0], i) for i in range(shape[0]))
    return tuple(
        facts.unknown(node.outputs[0], i) if size is None else size for i, size in enumerate(sizes.reshape(-1).tolist())
    )


def _expand(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    target = _content_shape(facts, node, node.inputs[1])
    return None if target is None else [dims.broadcast_shapes(shapes[0] or (), target)]


def _constant_of_shape(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None] | None:
    return [_content_shape(facts, node, node.inputs[0])]


def _range(facts: Inference, node: oir.Node, shapes: list[Shape | None]) -> Sequence[Shape | None]:
    start, limit, delta = (facts.integers(value) for value in node.inputs)
    unknown = facts.unknown(node.outputs[0], 0)
    if not start or not limit or not delta or delta[0] != 1:
        return [(len(range(start[0], limit[0], delta[0])),)] if _plain(start, limit, delta) else [(unknown,)]  # type: ignore[index,arg-type]
    length = dims.subtract(limit[0], start[0])
    return [(length if dims.at_least(length, 0) else unknown,)]


def _plain(*parts: list[Dim] | None) -> bool:
    return all(part is not None and isinstance(part[0], int) for part in parts) and parts[-1] != [0]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _same),
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    **LAYER_RULES,
    "Shape": _shape,
    "Size": _scalar,
    "Constant": _constant,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _second,
    "GatherND": _gather_nd,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
}
