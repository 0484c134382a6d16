"""Rotary embedding as a single operator."""

from __future__ import annotations

from typing import Any

from tvm import relax

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.attention import fixed, join_heads, split_heads
from burnish.backends.tvm.operators.movement import part
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


@lowers("RotaryEmbedding", since=23)
def rotary(
    make: Maker,
    x: Any,
    cos: Any,
    sin: Any,
    positions: Any = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Any:
    flat = make.rank(x) == 3
    if flat:
        x = split_heads(make, x, num_heads)
    if positions is not None:
        cos, sin = (make.emit(op.take(one, positions, 0, mode="clip")) for one in (cos, sin))
    found = turned(make, x, cos, sin, bool(interleaved), rotary_embedding_dim)
    return join_heads(make, found) if flat else found


@lowers("RotaryEmbedding", domain="com.microsoft")
def rotary_microsoft(
    make: Maker,
    x: Any,
    positions: Any,
    cos: Any,
    sin: Any,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
    is_packed_batching: int = 0,
) -> Any:
    if scale != 1.0 or is_packed_batching or make.rank(positions) > 2:
        raise Unsupported("a RotaryEmbedding of this form")
    flat = make.rank(x) == 3
    if flat:
        width = rotary_embedding_dim or 2 * fixed(make.shape(cos)[1], "the width of the angles")
        whole = fixed(make.shape(x)[2], "the width of the heads")
        if rotary_embedding_dim and not num_heads:
            raise Unsupported("the number of heads is not given")
        x = split_heads(make, x, num_heads or whole // width)
    batch, _, length, _ = make.shape(x)
    if make.rank(positions) < 2:
        steps = op.add(op.arange(0, length, 1, "int64"), op.reshape(positions, [1]))
        positions = make.emit(op.broadcast_to(op.expand_dims(steps, [0]), [batch, length]))
    cos, sin = (make.emit(op.take(one, positions, 0, mode="clip")) for one in (cos, sin))
    found = turned(make, x, cos, sin, bool(interleaved), rotary_embedding_dim)
    return join_heads(make, found) if flat else found


def turned(make: Maker, x: Any, cos: Any, sin: Any, interleaved: bool, width: int) -> Any:
    """Pairs of elements of [batch, heads, sequence, size] turned by angles of [batch, sequence, width / 2]."""
    size = fixed(make.shape(x)[3], "the size of a head")
    width = width or size
    cos, sin = (make.emit(op.expand_dims(one, [1])) for one in (cos, sin))
    whole = x if width == size else part(make, x, 3, 0, width)
    if interleaved:
        batch, heads, length, _ = make.shape(x)
        pairs = make.emit(op.reshape(whole, [batch, heads, length, width // 2, 2]))
        a, b = (make.emit(op.squeeze(part(make, pairs, 4, at, at + 1), [4])) for at in (0, 1))
    else:
        a, b = part(make, whole, 3, 0, width // 2), part(make, whole, 3, width // 2, width)
    real = make.emit(op.subtract(op.multiply(cos, a), op.multiply(sin, b)))
    imaginary = make.emit(op.add(op.multiply(sin, a), op.multiply(cos, b)))
    if interleaved:
        stacked = make.emit(op.concat([op.expand_dims(real, [4]), op.expand_dims(imaginary, [4])], 4))
        found = make.emit(op.reshape(stacked, [batch, heads, length, width]))
    else:
        found = make.emit(op.concat([real, imaginary], 3))
    return found if width == size else make.emit(op.concat([found, part(make, x, 3, width, size)], 3))
