"""Attention and rotary embedding as single operators."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.elementwise import number
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


@lowers("Attention", since=23)
def attention(
    make: Maker,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: int = 0,
    softcap: float = 0.0,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    softmax_precision: int | None = None,
) -> Any:
    if make.rank(q) != 4 or is_causal or any(out.name for out in make.node.outputs[1:]):
        raise Unsupported("an Attention of this form")
    batch, heads, length, width = make.shape(q)
    keys, groups = make.shape(k), make.shape(k)[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or not isinstance(width, int):
        raise Unsupported("an Attention with a dynamic number of heads")
    if heads != groups:
        k, v = (_repeated(make, one, heads // groups) for one in (k, v))
    factor = 1 / math.sqrt(width) if scale is None else scale
    scores = op.matmul(op.multiply(q, number(make, q, factor)), op.permute_dims(k, [0, 1, 3, 2]))
    if softcap:
        scores = op.multiply(op.tanh(op.divide(scores, number(make, q, softcap))), number(make, q, softcap))
    if mask is not None:
        if make.dtype(mask) == "bool":
            low = number(make, q, -65504.0 if make.dtype(q) == "float16" else -3.4028234663852886e38)
            scores = op.where(mask, make.emit(scores), low)
        else:
            scores = op.add(scores, mask)
    assert keys
    return op.matmul(op.nn.softmax(scores, -1), v)


def _repeated(make: Maker, x: Any, times: int) -> Any:
    batch, groups, length, width = make.shape(x)
    apart = make.emit(op.broadcast_to(op.expand_dims(x, [2]), [batch, groups, times, length, width]))
    return make.emit(op.reshape(apart, [batch, groups * times, length, width]))
