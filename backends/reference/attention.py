"""Attention and rotary embedding of the standard's domain, and the parts that the fused operators share."""

# mypy: disable-error-code="no-any-return"
# NumPy types the results of arithmetic on its arrays as Any.

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.reference.registry import REAL, Array, Call, operator


def split_heads(x: Array, heads: int) -> Array:
    """[batch, sequence, heads * size] as [batch, heads, sequence, size]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1 if x.size else x.shape[2] // heads).transpose(0, 2, 1, 3)


def join_heads(x: Array) -> Array:
    """[batch, heads, sequence, size] as [batch, sequence, heads * size]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def scores(q: Array, k: Array, scale: float, softcap: float = 0.0) -> tuple[Array, Array]:
    """Scaled products of [batch, heads, s, d] queries with [batch, kv heads, t, d] keys, and the same soft-capped."""
    raw = np.matmul(q, np.repeat(k, q.shape[1] // k.shape[1], 1).swapaxes(2, 3)) * scale
    return raw, (softcap * np.tanh(raw / softcap) if softcap else raw)


def probabilities(logits: Array, sink: Array | None = None) -> Array:
    """Softmax over the last axis; a row of only -inf gives zeros; `sink` joins the denominator as one more logit."""
    if not logits.shape[-1]:
        return logits
    top = logits.max(-1, keepdims=True)
    top = top if sink is None else np.maximum(top, sink)
    powers = np.exp(logits - np.where(np.isneginf(top), 0.0, top))
    total = powers.sum(-1, keepdims=True)
    total = total if sink is None else total + np.exp(sink - top)
    return powers / np.where(total == 0.0, 1.0, total)


def mix(weights: Array, v: Array) -> Array:
    """Probabilities [batch, heads, s, t] times values [batch, kv heads, t, d]."""
    return np.asarray(np.matmul(weights, np.repeat(v, weights.shape[1] // v.shape[1], 1)))


def allowed_to_bias(allowed: Array) -> Array:
    """0 where `allowed`, -inf elsewhere."""
    return np.where(allowed, 0.0, -np.inf)


def append(past: Array | None, new: Array) -> Array:
    """`new` behind `past` along the sequence axis of [batch, heads, sequence, size]."""
    return new if past is None else np.concatenate((past, new), 2)


@operator("Attention")
def _attention(
    call: Call, q: Array, k: Array, v: Array, mask: Array | None = None, past_k: Array | None = None,
    past_v: Array | None = None, lengths: Array | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    flat = q.ndim == 3
    if flat:
        q, k, v = (split_heads(x, call.get(f"{h}_num_heads")) for x, h in ((q, "q"), (k, "kv"), (v, "kv")))
    k, v = append(past_k, k), append(past_v, v)
    s, t = q.shape[2], k.shape[2]
    bias = np.zeros((s, t))
    if mask is not None:
        bias = allowed_to_bias(mask) if mask.dtype == bool else mask
        if bias.shape[-1] < t:
            bias = np.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, t - bias.shape[-1])], constant_values=-np.inf)
    columns = np.arange(t)
    offset: Any = 0 if past_k is None else past_k.shape[2]
    if lengths is not None:
        bias = bias + allowed_to_bias(columns < lengths.reshape(-1, 1, 1, 1))
        offset = offset if past_k is not None else (lengths.reshape(-1, 1, 1, 1) - s)
    ahead = columns - (np.arange(s)[:, None] + offset)
    if call.get("is_causal", 0):
        bias = bias + allowed_to_bias(ahead <= 0)
    if call.get("left_window_size", -1) >= 0:
        bias = bias + allowed_to_bias(-ahead <= call.get("left_window_size"))
    if call.get("right_window_size", -1) >= 0:
        bias = bias + allowed_to_bias(ahead <= call.get("right_window_size"))
    scale = call.get("scale") or 1.0 / np.sqrt(q.shape[3])
    raw, capped = scores(q, k, scale, call.get("softcap", 0.0))
    logits = capped + bias
    weights = probabilities(np.where(np.isneginf(bias), -np.inf, logits))
    y = mix(weights, v)
    shown = (raw, capped, logits, weights)[call.get("qk_matmul_output_mode", 0)]
    return (join_heads(y) if flat else y), k, v, shown


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Turn the first 2 * r of each head's elements.

    Args:
        x: [batch, heads, sequence, size].
        cos: [batch or 1, sequence, r], likewise `sin`.
        sin: the sines.
        interleaved: pairs are neighbours, else they lie r apart.
    """
    r = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : 2 * r], x[..., 2 * r :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :r], turned[..., r:])
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    if interleaved:
        turned = np.stack((real, imaginary), -1).reshape(turned.shape)
    else:
        turned = np.concatenate((real, imaginary), -1)
    return np.concatenate((turned, rest), -1)


@operator("RotaryEmbedding")
def _rotary(call: Call, x: Array, cos: Array, sin: Array, positions: Array | None = None) -> Array:
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    interleaved = bool(call.get("interleaved", 0))
    if x.ndim == 3:
        return join_heads(rotate(split_heads(x, call.get("num_heads")), cos, sin, interleaved))
    return rotate(x, cos, sin, interleaved)


def _spread(x: Array, like: Array, axis: int, block: int) -> Array:
    """A scale or zero point broadcast against `like`: one for all, one per slice of `axis`, or one per block."""
    if x.size == 1 and x.ndim <= 1:
        return x.reshape(())
    if block and x.ndim == like.ndim:
        whole = np.repeat(x, block, axis)
        return np.take(whole, np.arange(like.shape[axis]), axis)
    return x.reshape([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])


@operator("DequantizeLinear")
@operator("DequantizeLinear", domain="com.microsoft")
def _dequantize(call: Call, x: Array, scale: Array, zero: Array | None = None) -> Array:
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    y = x.astype(np.float64)
    if zero is not None:
        y = y - _spread(zero.astype(np.float64), x, axis, block)
    return y * _spread(scale, x, axis, block)


@operator("QuantizeLinear")
@operator("QuantizeLinear", domain="com.microsoft")
def _quantize(call: Call, x: Array, scale: Array, zero: Array | None = None) -> Array:
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    code = call.get("output_dtype", 0)
    dtype = oir.DataType(code) if code else oir.DataType.UINT8 if zero is None else oir.DataType.from_numpy(zero.dtype)
    y = x / _spread(scale, x, axis, block)
    if dtype in REAL:
        return y
    target = dtype.numpy()
    if dtype.is_floating_point():
        return _to_narrow_float(y, dtype, bool(call.get("saturate", 1)))
    y = np.rint(y)
    if zero is not None:
        y = y + _spread(zero.astype(np.float64), x, axis, block)
    bits = dtype.bitwidth
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.is_signed() else (0, 2**bits - 1)
    return np.clip(y, low, high).astype(np.int32).astype(target)


def _to_narrow_float(y: Array, dtype: oir.DataType, saturate: bool) -> Array:
    import ml_dtypes

    target = dtype.numpy()
    if saturate:
        limit = float(ml_dtypes.finfo(target).max)  # type: ignore[no-untyped-call]
        y = np.clip(y, -limit, limit)
    return y.astype(np.float32).astype(target)


@operator("DynamicQuantizeLinear")
def _dynamic_quantize(call: Call, x: Array) -> tuple[Array, Array, Array]:
    low, high = min(float(x.min(initial=0.0)), 0.0), max(float(x.max(initial=0.0)), 0.0)
    scale = (high - low) / 255.0 or 1.0
    zero = float(np.rint(np.clip(-low / scale, 0, 255)))
    y = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.uint8)
    return y, np.asarray(scale), np.asarray(zero, np.uint8)
