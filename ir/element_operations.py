"""Operations on single elements that operators do beside their multiply-adds.

One operation is one step on one element in the textbook spelling of the operator (an addition, a comparison, an
exponential); moving data is none. The numbers order nodes by their work; they are no cycles.
"""

from __future__ import annotations

from math import prod

from burnish.ir.multiply_adds import (
    CONTRIB,
    Formula,
    attention_scores,
    grouped_query_scores,
    multi_head_scores,
)
from burnish.ir.sizes import Sizes, UnknownSizeError

_SOFTMAX = 5  # greatest, difference, exponential, sum, quotient
_SCORES = _SOFTMAX + 1  # and the scale


def _each_written(steps: int = 1) -> Formula:
    return lambda sizes: steps * prod(sizes.written())


def _each_read(steps: int = 1) -> Formula:
    return lambda sizes: steps * prod(sizes.read(0))


def _none(_: Sizes) -> int:
    return 0


def _bias(index: int) -> Formula:
    """One addition for each output element when input `index` is given."""
    return lambda sizes: prod(sizes.written()) if sizes.has(index) else 0


def _variadic(sizes: Sizes) -> int:
    return prod(sizes.written()) * max(len(sizes.node.inputs) - 1, 0)


def _mean(sizes: Sizes) -> int:
    return prod(sizes.written()) * len(sizes.node.inputs)


def _pool(sizes: Sizes) -> int:
    return prod((*sizes.written(), *sizes.attribute("kernel_shape")))


def _clip(sizes: Sizes) -> int:
    """A comparison for each bound; before opset 11 the bounds are attributes."""
    bounds = sizes.has(1) + sizes.has(2) + ("min" in sizes.node.attributes) + ("max" in sizes.node.attributes)
    return bounds * prod(sizes.written())


def _resize(sizes: Sizes) -> int:
    """Neighbours weighed for each output element: 2 (linear) or 4 (cubic) along each axis that changes its size."""
    source, target = sizes.read(0), sizes.written()
    taps = {"linear": 2, "cubic": 4}.get(sizes.attribute("mode", "nearest"))
    changed = sum(a != b for a, b in zip(source, target, strict=True))
    return prod(target) * int(taps**changed) if taps and changed else 0


def _grid_sample(sizes: Sizes) -> int:
    taps = {"linear": 2, "bilinear": 2, "cubic": 4, "bicubic": 4}.get(sizes.attribute("mode", "linear"), 1)
    return prod(sizes.written()) * int(taps ** (len(sizes.read(0)) - 2))


def _local_response(sizes: Sizes) -> int:
    return prod(sizes.read(0)) * (2 * int(sizes.attribute("size")) + 2)


def _gates(gates: int, extra: int) -> Formula:
    """Bias and activation of each gate, and what joins the gates, for each element of the state."""

    def formula(sizes: Sizes) -> int:
        steps, batch, _ = sizes.read(0)
        directions, _, hidden = sizes.read(2)
        return steps * batch * directions * hidden * (2 * gates + extra + (3 if sizes.has(7) else 0))

    return formula


def _einsum(sizes: Sizes) -> int:
    """Products without a sum, or sums without a product."""
    inputs = [prod(sizes.read(index)) for index in range(len(sizes.node.inputs))]
    left, arrow, right = sizes.attribute("equation").replace(" ", "").partition("->")
    if len(inputs) == 1:
        return inputs[0] if arrow and set(left) - set(right) else 0
    return prod(sizes.written()) * (len(inputs) - 1) if arrow and set(left) <= set(right) | {",", "."} else 0


def _attention(sizes: Sizes) -> int:
    return attention_scores(sizes)[0] * (_SCORES + sizes.has(3))


def _multi_head(sizes: Sizes) -> int:
    return multi_head_scores(sizes)[0] * int(sizes.attribute("num_heads")) * (_SCORES + sizes.has(5))


def _grouped_query(sizes: Sizes) -> int:
    return grouped_query_scores(sizes)[0] * _SCORES


def _contrib_attention(past: int) -> Formula:
    def formula(sizes: Sizes) -> int:
        batch, queries, _ = sizes.read(0)
        keys = queries + (sizes.read(past)[3] if sizes.has(past) else 0)
        bias = prod(sizes.read(1)[1:]) * batch * queries if sizes.has(2) else 0
        return batch * int(sizes.attribute("num_heads")) * queries * keys * _SCORES + bias

    return formula


def _determinant(sizes: Sizes) -> int:
    """By elimination: a third of the cube of the side, for each matrix."""
    shape = sizes.read(0)
    if shape[-1] != shape[-2]:
        raise UnknownSizeError("the matrices are not square")
    return prod(shape[:-2]) * shape[-1] ** 3 // 3


_FORMULAS: list[tuple[str, Formula]] = [
    # moving data
    (
        "Identity Reshape Flatten Squeeze Unsqueeze Transpose Concat Split Slice Gather GatherElements GatherND "
        "Expand Tile Pad Shape Size Constant ConstantOfShape DepthToSpace SpaceToDepth ReverseSequence Compress "
        "CenterCropPad Dropout EyeLike OneHot Scatter ScatterElements ScatterND TensorScatter Trilu Upsample Loop Scan "
        "If SequenceMap SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength "
        "ConcatFromSequence SplitToSequence Optional OptionalGetElement OptionalHasElement MaxUnpool BitCast",
        _none,
    ),
    # one step for each output element
    (
        "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast "
        "CastLike Ceil Cos Cosh Div Equal Erf Exp Floor Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Log Mod "
        "Mul Neg Not Or Pow Range Reciprocal Relu Round Sign Sin Sinh Sqrt Sub Tan Tanh Where Xor Bernoulli "
        "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial BlackmanWindow HammingWindow "
        "HannWindow MelWeightMatrix AffineGrid",
        _each_written(),
    ),
    ("LeakyRelu PRelu ThresholdedRelu HardSigmoid Sigmoid Softsign Softplus Elu Shrink", _each_written(2)),
    ("DequantizeLinear QuantizeLinear", _each_written(2)),
    ("Celu Selu Swish SwiGLU HardSwish RotaryEmbedding", _each_written(3)),
    ("Gelu Mish", _each_written(5)),
    ("Clip", _clip),
    ("Max Min Sum", _variadic),
    ("Mean", _mean),
    # each element read
    (
        "ReduceMax ReduceMin ReduceSum ReduceProd ReduceMean ReduceL1 ReduceLogSum ArgMax ArgMin CumSum CumProd "
        "GlobalAveragePool GlobalMaxPool NonZero Hardmax",
        _each_read(),
    ),
    ("ReduceL2 ReduceSumSquare ReduceLogSumExp GlobalLpPool", _each_read(2)),
    ("LpNormalization", _each_read(3)),
    ("DynamicQuantizeLinear", _each_read(4)),
    ("Softmax LogSoftmax", _each_read(_SOFTMAX)),
    ("BatchNormalization", _each_read(2)),
    ("RMSNormalization SimplifiedLayerNormalization", _each_read(4)),
    ("MeanVarianceNormalization", _each_read(5)),
    ("LayerNormalization GroupNormalization InstanceNormalization", _each_read(7)),
    ("LRN", _local_response),
    ("MaxPool AveragePool LpPool", _pool),
    ("Resize", _resize),
    ("GridSample", _grid_sample),
    ("Det", _determinant),
    # beside multiply-adds
    ("MatMul MatMulInteger ConvInteger DFT STFT", _none),
    ("Gemm Conv ConvTranspose CausalConvWithState", _bias(2)),
    ("DeformConv", _bias(3)),
    ("QLinearMatMul QLinearConv", _each_written(2)),
    ("Einsum", _einsum),
    ("LSTM", _gates(4, 5)),
    ("GRU", _gates(3, 5)),
    ("RNN", _gates(1, 0)),
    ("Attention", _attention),
]

_CONTRIB_FORMULAS: list[tuple[str, Formula]] = [
    ("FusedMatMul TransposeMatMul", _none),
    ("MatMulIntegerToFloat MatMulInteger16 DynamicQuantizeMatMul", _each_written(2)),
    ("FusedGemm FusedConv FusedMatMulActivation", _each_written(2)),
    ("QGemm", _each_written(2)),
    ("GemmFastGelu", _each_written(6)),
    ("MatMulNBits", _bias(5)),
    ("Attention", _contrib_attention(4)),
    ("QAttention", _contrib_attention(8)),
    ("MultiHeadAttention", _multi_head),
    ("GroupQueryAttention", _grouped_query),
    ("QLinearConcat GatherBlockQuantized ExpandDims Pad UnfoldTensor", _none),
    ("QuantizeLinear DequantizeLinear QuickGelu", _each_written(2)),
    ("QLinearAdd QLinearMul QLinearSigmoid QLinearLeakyRelu QLinearWhere RotaryEmbedding", _each_written(3)),
    ("Gelu FastGelu", _each_written(5)),
    ("BiasGelu BiasSplitGelu", _each_written(6)),
    ("BiasAdd BiasDropout", _each_written(2)),
    ("QLinearGlobalAveragePool QLinearReduceMean", _each_read()),
    ("QLinearAveragePool", _pool),
    ("QLinearSoftmax", _each_read(_SOFTMAX)),
    ("BiasSoftmax", _each_read(_SOFTMAX + 1)),
    ("SkipSimplifiedLayerNormalization", _each_read(5)),
    ("SkipLayerNormalization EmbedLayerNormalization SkipGroupNorm", _each_written(8)),
    ("GroupNorm", _each_read(7)),
]

ELEMENT_OPERATIONS: dict[tuple[str, str], Formula] = {
    **{("", name): formula for names, formula in _FORMULAS for name in names.split()},
    **{(CONTRIB, name): formula for names, formula in _CONTRIB_FORMULAS for name in names.split()},
}
"""A formula for each (domain, operator) whose work has a closed form; a control-flow node itself does none."""

NO_MULTIPLY_ADDS = frozenset(
    ("", name)
    for name in (
        "ImageDecoder MaxRoiPool NonMaxSuppression RegexFullMatch StringConcat StringNormalizer StringSplit "
        "TfIdfVectorizer TopK Unique"
    ).split()
)
"""Operators whose work depends on their data, none of it multiply-adds: they sort, compare, or handle text."""
