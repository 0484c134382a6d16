"""Multiply-adds of the operators that have them, one formula each.

A multiply-add is one multiplication whose product is added to a sum. Formulas count what the operator's definition
asks for: padding, masks, causality and sparsity earn no discount, and the addition of a bias is an element operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod

from burnish.ir.sizes import Sizes, UnknownSizeError

Formula = Callable[[Sizes], int]
CONTRIB = "com.microsoft"


def _broadcast(*shapes: tuple[int, ...]) -> int:
    """Elements of the shapes broadcast against each other."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return prod(0 if 0 in sizes else max(sizes) for sizes in zip(*padded, strict=True))


def matrix_product(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Multiply-adds of `numpy.matmul` of two shapes.

    Raises:
        UnknownSizeError: the inner sizes differ.
    """
    rows, inner = (1, *left)[-2:]
    depth, columns = right[-2:] if len(right) > 1 else (right[0], 1)
    if inner != depth:
        raise UnknownSizeError(f"shapes {left} and {right} do not multiply")
    return _broadcast(left[:-2], right[:-2], ()) * rows * inner * columns


def _matmul(first: int = 0, second: int = 1) -> Formula:
    return lambda sizes: matrix_product(sizes.read(first), sizes.read(second))


def _gemm(second: int = 1) -> Formula:
    def formula(sizes: Sizes) -> int:
        left, right = sizes.read(0), sizes.read(second)
        left = left[::-1] if sizes.attribute("transA", 0) else left
        return matrix_product(left, right[::-1] if sizes.attribute("transB", 0) else right)

    return formula


def _fused_matmul(sizes: Sizes) -> int:
    return matrix_product(_turned(sizes, 0, "A"), _turned(sizes, 1, "B"))


def _turned(sizes: Sizes, index: int, letter: str) -> tuple[int, ...]:
    """The shape of an operand as FusedMatMul multiplies it."""
    shape = sizes.read(index)
    if sizes.attribute(f"transBatch{letter}", 0) and len(shape) > 2:
        shape = (*shape[1:-1], shape[0], shape[-1])
    return (*shape[:-2], shape[-1], shape[-2]) if sizes.attribute(f"trans{letter}", 0) and len(shape) > 1 else shape


def _conv(weight: int = 1) -> Formula:
    """Weight [M, C/group, ...]: each output element sums over one filter, whatever its dilation."""
    return lambda sizes: prod(sizes.written()) * prod(sizes.read(weight)[1:])


def _conv_transpose(sizes: Sizes) -> int:
    """Weight [C, M/group, ...]: each input element meets every weight of its channel, cropped borders included."""
    return prod(sizes.read(0)) * prod(sizes.read(1)[1:])


def _einsum(sizes: Sizes) -> int:
    """Operands multiplied one after another over all indices at once, as the definition says, without reordering."""
    left, arrow, right = sizes.attribute("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    extents: dict[str, int] = {}
    ellipsis: list[tuple[int, ...]] = [()]
    for index, term in enumerate(terms):
        shape = sizes.read(index)
        before, dots, after = term.partition("...")
        stop = len(shape) - len(after)
        if dots:
            ellipsis.append(shape[len(before) : stop])
        pairs = [*zip(before, shape, strict=False), *zip(after, shape[stop:], strict=True)]
        for letter, size in pairs:
            extents[letter] = max(size, extents.get(letter, 1)) if size else 0
    seen = Counter(left.replace(",", "").replace(".", ""))
    kept = set(right) if arrow else {letter for letter, times in seen.items() if times == 1}
    if len(terms) == 1 or set(extents) <= kept:
        return 0
    return _broadcast(*ellipsis) * prod(extents.values()) * (len(terms) - 1)


def _recurrent(sizes: Sizes) -> int:
    """X [sequence, batch, in] or its first two swapped, W [directions, gates * hidden, in], R [.., .., hidden]."""
    steps, batch, _ = sizes.read(0)
    return steps * batch * (prod(sizes.read(1)) + prod(sizes.read(2)))


def attention_scores(sizes: Sizes) -> tuple[int, int, int]:
    """(scores, size of a query head, size of a value head) of a standard Attention, past keys included."""
    query, key, value = sizes.read(0), sizes.read(1), sizes.read(2)
    past = sizes.read(4)[2] if sizes.has(4) else 0
    if len(query) == 4:
        return prod(query[:3]) * (key[2] + past), query[3], value[3]
    heads, kv_heads = sizes.attribute("q_num_heads"), sizes.attribute("kv_num_heads")
    if not heads or not kv_heads:
        raise UnknownSizeError("the numbers of heads are not given")
    return query[0] * heads * query[1] * (key[1] + past), query[2] // heads, value[2] // kv_heads


def _attention(sizes: Sizes) -> int:
    scores, query_head, value_head = attention_scores(sizes)
    return scores * (query_head + value_head)


def _contrib_attention(past: int, weight: int) -> Formula:
    """Input [batch, sequence, in] times weight [in, q + k + v], then the attention itself."""

    def formula(sizes: Sizes) -> int:
        (batch, queries, _), (depth, width) = sizes.read(0), sizes.read(weight)
        keys = queries + (sizes.read(past)[3] if sizes.has(past) else 0)
        widths = sizes.attribute("qkv_hidden_sizes") or (width // 3,) * 3
        return batch * queries * (depth * width + keys * (widths[0] + widths[2]))

    return formula


def multi_head_scores(sizes: Sizes) -> tuple[int, int, int]:
    """(batch * queries * keys, width of all query heads, width of all value heads) of contrib MultiHeadAttention."""
    query = sizes.read(0)
    past = sizes.read(6)[2] if sizes.has(6) else 0
    if len(query) == 5:
        width = query[2] * query[4]
        return query[0] * query[1] * (query[1] + past), width, width
    key = sizes.read(1)
    keys = key[2] if len(key) == 4 else key[1]
    if len(key) == 5:
        value_width = key[2] * key[4]
    else:
        value = sizes.read(2)
        value_width = value[1] * value[3] if len(value) == 4 else value[2]
    return query[0] * query[1] * (keys + past), query[2], value_width


def _multi_head(sizes: Sizes) -> int:
    pairs, query_width, value_width = multi_head_scores(sizes)
    return pairs * (query_width + value_width)


def grouped_query_scores(sizes: Sizes) -> tuple[int, int]:
    """(scores, size of a head) of contrib GroupQueryAttention over the whole of its cache."""
    batch, queries, width = sizes.read(0)
    heads, kv_heads = sizes.attribute("num_heads"), sizes.attribute("kv_num_heads")
    head = width // (heads if sizes.has(1) else heads + 2 * kv_heads)
    try:
        keys = sizes.written(1)[2]
    except UnknownSizeError:
        keys = queries + (sizes.read(3)[2] if sizes.has(3) else 0)
    return batch * heads * queries * keys, head


def _grouped_query(sizes: Sizes) -> int:
    scores, head = grouped_query_scores(sizes)
    return scores * 2 * head


def _matmul_n_bits(sizes: Sizes) -> int:
    return prod(sizes.read(0)[:-1]) * int(sizes.attribute("K")) * int(sizes.attribute("N"))


def _transform(count: int, length: int) -> int:
    """`count` Fourier transforms by halving: length/2 * log2(length) complex products of four multiply-adds."""
    if length <= 0 or length & (length - 1):
        raise UnknownSizeError(
            f"a Fourier transform of length {length}, which is no power of two, has no one closed form"
        )
    return count * 2 * length * (length.bit_length() - 1)


def _dft(sizes: Sizes) -> int:
    """The axis moved from an attribute with default 1 to an input with default -2; they agree at rank 3."""
    shape = sizes.read(0)
    axis = sizes.number(2, sizes.attribute("axis", -2 if len(shape) > 2 else 1))
    length = sizes.number(1, shape[axis])
    return _transform(prod(shape[:-1]) // max(shape[axis], 1), length)


def _stft(sizes: Sizes) -> int:
    """One transform for each frame; output [batch, frames, bins, 2]."""
    batch, frames = sizes.written()[:2]
    length = sizes.read(2)[0] if sizes.has(2) else sizes.number(3, 0)
    return _transform(batch * frames, length)


MULTIPLY_ADDS: dict[tuple[str, str], Formula] = {
    ("", "MatMul"): _matmul(),
    ("", "MatMulInteger"): _matmul(),
    ("", "QLinearMatMul"): _matmul(0, 3),
    ("", "Gemm"): _gemm(),
    ("", "Conv"): _conv(),
    ("", "ConvInteger"): _conv(),
    ("", "QLinearConv"): _conv(3),
    ("", "DeformConv"): _conv(),
    ("", "CausalConvWithState"): _conv(),
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Einsum"): _einsum,
    ("", "LSTM"): _recurrent,
    ("", "GRU"): _recurrent,
    ("", "RNN"): _recurrent,
    ("", "Attention"): _attention,
    ("", "DFT"): _dft,
    ("", "STFT"): _stft,
    (CONTRIB, "FusedMatMul"): _fused_matmul,
    (CONTRIB, "FusedMatMulActivation"): _fused_matmul,
    (CONTRIB, "TransposeMatMul"): _fused_matmul,
    (CONTRIB, "FusedGemm"): _gemm(),
    (CONTRIB, "QGemm"): _gemm(3),
    (CONTRIB, "GemmFastGelu"): _matmul(),
    (CONTRIB, "MatMulNBits"): _matmul_n_bits,
    (CONTRIB, "MatMulIntegerToFloat"): _matmul(),
    (CONTRIB, "MatMulInteger16"): _matmul(),
    (CONTRIB, "DynamicQuantizeMatMul"): _matmul(),
    (CONTRIB, "FusedConv"): _conv(),
    (CONTRIB, "Attention"): _contrib_attention(4, 1),
    (CONTRIB, "QAttention"): _contrib_attention(8, 1),
    (CONTRIB, "MultiHeadAttention"): _multi_head,
    (CONTRIB, "GroupQueryAttention"): _grouped_query,
}
"""A formula for each (domain, operator) that multiplies and adds."""
