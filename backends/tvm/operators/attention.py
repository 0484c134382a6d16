"""Attention as a single operator, with caches, grouped heads and masks."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax, te, tirx

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.elementwise import number
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op

LOWEST = {"float16": -65504.0, "bfloat16": -3.3895313892515355e38, "float32": -3.4028234663852886e38}
"""The lowest finite number, by dtype. A query whose keys all have it, or -inf, in the mask gives zeros."""


@lowers("Attention", since=23, several=True)
def attention(
    make: Maker,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    *,
    scale: float | None = None,
    is_causal: int = 0,
    softcap: float = 0.0,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    softmax_precision: int | None = None,
) -> tuple[Any, ...]:
    outputs = make.node.outputs
    if len(outputs) > 3 and outputs[3].name:
        raise Unsupported("the scores of Attention as an output")
    if make.dtype(q) not in LOWEST:
        raise Unsupported(f"Attention of {make.dtype(q)}")
    flat = make.rank(q) == 3
    if flat:
        q = split_heads(make, q, q_num_heads)
        k, v = (split_heads(make, one, kv_num_heads) for one in (k, v))
    if past_key is not None:
        k, v = (make.emit(op.concat(list(pair), 2)) for pair in ((past_key, k), (past_value, v)))
    offset = 0 if past_key is None else make.shape(past_key)[2]
    width = fixed(make.shape(q)[3], "the size of a head")
    found = attend(
        make,
        q,
        k,
        v,
        mask=mask,
        offset=offset if is_causal else None,
        scale=1 / math.sqrt(width) if scale is None else scale,
        softcap=softcap,
    )
    return (join_heads(make, found) if flat else found), k, v


def fixed(size: Any, what: str) -> int:
    """A size that must be a number."""
    if not isinstance(size, int):
        raise Unsupported(f"{what} is not a number")
    return size


def split_heads(make: Maker, x: Any, heads: int | None) -> Any:
    """[batch, sequence, heads * size] as [batch, heads, sequence, size]."""
    batch, length, width = make.shape(x)
    if not heads:
        raise Unsupported("the number of heads is not given")
    apart = op.reshape(x, [batch, length, heads, fixed(width, "the width of the heads") // heads])
    return make.emit(op.permute_dims(apart, [0, 2, 1, 3]))


def join_heads(make: Maker, x: Any) -> Any:
    """[batch, heads, sequence, size] as [batch, sequence, heads * size]."""
    batch, heads, length, width = make.shape(x)
    return make.emit(op.reshape(op.permute_dims(x, [0, 2, 1, 3]), [batch, length, heads * width]))


def attend(
    make: Maker,
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    offset: Any = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Any:
    """softmax(softcap(scale * q k^T) + mask) v, rows without any key as zeros; scores and softmax in float32.

    Keys and values are neither copied for the heads that share them nor transposed.

    Args:
        q: [batch, heads, queries, size]; k and v: [batch, groups, keys, size], groups dividing heads.
        mask: to be added, or of bool: true where a key is seen; broadcast to [batch, heads, queries, keys].
        offset: query i sees keys up to i + offset; None for all.
    """
    heads, groups = (fixed(make.shape(one)[1], "the number of heads") for one in (q, k))
    if heads % groups:
        raise Unsupported(f"{heads} heads of queries over {groups} of keys")
    dtype, shape = make.dtype(q), make.shape(q)
    k = make.held(k, [shape[0], groups, make.shape(k)[2], shape[3]])
    v = make.held(v, [shape[0], groups, make.shape(k)[2], make.shape(v)[3]])
    rows = _grouped(make, make.emit(op.multiply(q, number(make, q, scale))), groups)
    scores = make.te(_scores, rows, k)
    scores = scores if heads == groups else op.reshape(scores, [*shape[:3], make.shape(k)[2]])
    if softcap:
        most = relax.const(softcap, "float32")
        scores = op.multiply(op.tanh(op.divide(scores, most)), most)
    scores = make.emit(scores)
    bias = None if mask is None else _bias(make, scores, mask, dtype)
    if bias is not None:
        scores = make.emit(op.add(scores, bias))
    if offset is not None:
        scores = make.te(_causal, scores, _first(make, offset))
    chances = make.emit(op.nn.softmax(scores, -1))
    if bias is not None:
        chances = _without_blind(make, chances, bias, LOWEST[dtype], offset)
    chances = make.emit(op.astype(chances, dtype)) if dtype != "float32" else chances
    chances, v = make.summed(chances, v)
    found = make.te(_values, _grouped(make, chances, groups), v)
    if heads != groups:
        found = make.emit(op.reshape(found, [*shape[:3], make.shape(v)[3]]))
    return found if dtype == "float32" else make.emit(op.astype(found, dtype))


def _first(make: Maker, offset: Any) -> Any:
    """The offset as a vector of one: FuseTIR fails on a symbol that is an argument and a size of the same function."""
    return relax.const([offset], "int64") if isinstance(offset, int) else make.sizes_as_tensor([offset])


def _grouped(make: Maker, x: Any, groups: int) -> Any:
    """[batch, heads, rows, size], where heads share keys as [batch, groups, heads, rows, size]."""
    batch, heads, *rest = make.shape(x)
    return x if heads == groups else make.emit(op.reshape(x, [batch, groups, heads // groups, *rest]))


def _scores(q: Any, k: Any) -> Any:
    """q times the transpose of k, which is read as it lies, in float32."""
    width = te.reduce_axis((0, q.shape[-1]), name="k")

    def element(*at: Any) -> Any:
        left, right = q(*at[:-1], width), k(*at[:2], at[-1], width)
        return te.sum(left.astype("float32") * right.astype("float32"), axis=width)

    return te.compute((*q.shape[:-1], k.shape[2]), element, name="matmul")


def _values(chances: Any, v: Any) -> Any:
    """Sums of v, in float32."""
    key = te.reduce_axis((0, v.shape[2]), name="k")

    def element(*at: Any) -> Any:
        left, right = chances(*at[:-1], key), v(*at[:2], key, at[-1])
        return te.sum(left.astype("float32") * right.astype("float32"), axis=key)

    return te.compute((*chances.shape[:-1], v.shape[3]), element, name="matmul")


def _bias(make: Maker, scores: Any, mask: Any, dtype: str) -> Any:
    """The mask as float32 to be added, with -inf for keys behind its end."""
    keys, columns = make.shape(scores)[-1], make.shape(mask)[-1]
    if make.dtype(mask) == "bool":
        low, none = relax.const(-math.inf, "float32"), relax.const(0.0, "float32")
        mask = make.emit(op.where(mask, none, low))
    elif make.dtype(mask) != "float32":
        mask = make.emit(op.astype(mask, "float32"))
    if isinstance(keys, int) and isinstance(columns, int) and 1 < columns < keys:
        around = [0] * (2 * make.rank(mask) - 1) + [keys - columns]
        mask = make.emit(op.nn.pad(mask, around, "constant", -math.inf))
    scores, mask = make.alike(scores, mask)
    return mask


def _causal(scores: Any, offset: Any) -> Any:
    def element(*at: Any) -> Any:
        seen = at[-1].astype("int64") <= at[-2].astype("int64") + offset[0]
        return tirx.Select(seen, scores(*at), tirx.const(-math.inf, "float32"))

    return te.compute(scores.shape, element, name="causal")


def _without_blind(make: Maker, chances: Any, bias: Any, lowest: float, offset: Any) -> Any:
    """The probabilities with zeros for queries that see no key at all."""
    if offset is not None:
        whole = make.emit(op.broadcast_to(bias, make.shape(chances)))
        bias = make.te(_causal, whole, _first(make, offset))
    most = make.emit(op.max(bias, -1, True))
    blind = op.less_equal(most, relax.const(lowest, "float32"))
    return make.emit(op.where(blind, relax.const(0.0, "float32"), chances))
