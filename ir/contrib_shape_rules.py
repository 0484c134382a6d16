"""Shapes of the results of ONNX Runtime's own operators, domain com.microsoft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as oir

from burnish.ir import dims, match
from burnish.ir.dims import Dim

if TYPE_CHECKING:
    from burnish.ir.inference import Inference

Shape = tuple[Dim, ...]
Rule = Callable[["Inference", oir.Node, Shape], "Sequence[Shape | None] | None"]


def infer(facts: Inference, node: oir.Node) -> None:
    """Record the declared types of a node of another domain, and the shapes of ONNX Runtime's fused operators."""
    for value in node.outputs:
        facts.set(value, match.tensor_dtype(value), None)
    source = facts.shape(node.inputs[0]) if node.domain == "com.microsoft" and node.inputs else None
    rule = _RULES.get(node.op_type)
    found = rule(facts, node, source) if rule is not None and source is not None else None
    for value, shape in zip(node.outputs, found or (), strict=False):
        if shape is not None:
            facts.set(value, _dtype(facts, node), shape)


def _dtype(facts: Inference, node: oir.Node) -> oir.DataType | None:
    third = node.op_type in ("EmbedLayerNormalization", "GatherBlockQuantized")
    return facts.dtype(node.inputs[2 if third else 0])


def _same(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None]:
    return [source]


def _skip_norm(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None]:
    return [source, None, None, source]


def _embedded(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None] | None:
    words = facts.shape(match.input_of(node, 2))
    return [(*source, words[1])] if words is not None and len(source) == 2 else None


def _product(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None] | None:
    other = facts.shape(match.input_of(node, 1))
    if other is None or len(source) < 2 or len(other) < 2:
        return None
    if match.attribute(node, "transBatchA", 0) or match.attribute(node, "transBatchB", 0):
        return None
    rows = source[-1 if match.attribute(node, "transA", 0) else -2]
    columns = other[-2 if match.attribute(node, "transB", 0) else -1]
    return [(*dims.broadcast_shapes(source[:-2], other[:-2]), rows, columns)]


def _blocked(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None]:
    return [(*source[:-1], int(match.attribute(node, "N", 0)))]


def _picked_rows(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None] | None:
    ids = facts.shape(match.input_of(node, 1))
    if ids is None or len(source) != 2 or match.attribute(node, "gather_axis", 0) % 2:
        return None
    packed = facts.dtype(node.inputs[0]) == oir.DataType.UINT8
    return [(*ids, dims.multiply(source[1], 8 // int(match.attribute(node, "bits", 4)) if packed else 1))]


def _multi_head(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None] | None:
    if len(source) == 5:
        return [(*source[:2], dims.multiply(source[2], source[4]))]
    keys, values = (facts.shape(match.input_of(node, index)) for index in (1, 2))
    if values is None and keys is not None and len(keys) == 5:
        return [(*source[:2], dims.multiply(keys[2], keys[4]))]
    if values is None or len(source) != 3 or len(values) not in (3, 4):
        return None
    result: Shape = (*source[:2], values[2] if len(values) == 3 else dims.multiply(values[1], values[3]))
    return [result, *_presents(facts, node, keys, values)]


def _presents(facts: Inference, node: oir.Node, keys: Shape | None, values: Shape) -> list[Shape | None]:
    """Older keys and values with the new ones, unless they are written into a buffer of full length."""
    heads, found = int(match.attribute(node, "num_heads", 0)), list[Shape | None]()
    for new, past in ((keys, facts.shape(match.input_of(node, 6))), (values, facts.shape(match.input_of(node, 7)))):
        size = dims.divide_exactly(new[2], heads) if new is not None and len(new) == 3 and heads else None
        if new is None or size is None or match.input_of(node, 8) is not None or past is not None and len(past) != 4:
            return []
        found.append((new[0], heads, new[1] if past is None else dims.add(past[2], new[1]), size))
    return found


def _packed_attention(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None] | None:
    matrix, sizes = facts.shape(match.input_of(node, 1)), match.attribute(node, "qkv_hidden_sizes")
    width = sizes[2] if sizes else dims.divide(matrix[1], 3) if matrix is not None and len(matrix) == 2 else None
    return [(*source[:2], width)] if width is not None and len(source) == 3 else None


def _grouped(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None] | None:
    heads, fewer = int(match.attribute(node, "num_heads", 0)), int(match.attribute(node, "kv_num_heads", 0))
    packed = match.input_of(node, 1) is None
    width = source[2] if len(source) == 3 else None
    size = dims.divide_exactly(width, heads + 2 * fewer if packed else heads) if width is not None else None
    if size is None:
        return None
    present: Shape = (source[0], fewer, facts.unknown(node.outputs[0], 1), size)
    return [(*source[:2], dims.multiply(size, heads)), present, present]


def _joined(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None] | None:
    other = facts.shape(match.input_of(node, 3))
    return None if other is None else [dims.broadcast_shapes(source, other)]


def _averaged(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None] | None:
    if match.attribute(node, "channels_last", 0):
        return None
    return [(*source[:2], *[1] * (len(source) - 2))]


def _quantized_product(facts: Inference, node: oir.Node, source: Shape) -> Sequence[Shape | None] | None:
    other = facts.shape(match.input_of(node, 3))
    if other is None or len(source) != 2 or len(other) != 2:
        return None
    rows = source[1 if match.attribute(node, "transA", 0) else 0]
    return [(rows, other[0 if match.attribute(node, "transB", 0) else 1])]


_RULES: dict[str, Rule] = {
    **dict.fromkeys("QuickGelu Gelu FastGelu BiasGelu RotaryEmbedding MoE QMoE BiasSoftmax".split(), _same),
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "EmbedLayerNormalization": _embedded,
    **dict.fromkeys(["QLinearAdd", "QLinearMul"], _joined),
    "QLinearGlobalAveragePool": _averaged,
    "QGemm": _quantized_product,
    "FusedMatMul": _product,
    "FusedGemm": _product,
    "MatMulNBits": _blocked,
    "GatherBlockQuantized": _picked_rows,
    "MultiHeadAttention": _multi_head,
    "Attention": _packed_attention,
    "GroupQueryAttention": _grouped,
}
