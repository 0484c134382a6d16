"""The operators of ONNX Runtime's own domain `com.microsoft` that fusions write.

Source of the semantics: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, and for what it
leaves open (masks over whole rows, positions of padded prompts) the CPU kernels.
"""

from __future__ import annotations

import numpy as np

from burnish.backends.reference.attention import (
    allowed_to_bias,
    append,
    join_heads,
    mix,
    probabilities,
    rotate,
    scores,
    split_heads,
)
from burnish.backends.reference.elementwise import gelu, gelu_tanh, sigmoid
from burnish.backends.reference.network import convolve, per_channel, standardize
from burnish.backends.reference.recurrent import activation
from burnish.backends.reference.registry import Array, Call, operator

DOMAIN = "com.microsoft"
LOWEST = float(np.finfo(np.float32).min)


@operator("Gelu", "BiasGelu", domain=DOMAIN)
def _gelu(call: Call, x: Array, bias: Array | None = None) -> Array:
    return gelu(x if bias is None else x + bias)


@operator("FastGelu", domain=DOMAIN)
def _fast_gelu(call: Call, x: Array, bias: Array | None = None) -> Array:
    return gelu_tanh(x if bias is None else x + bias)


@operator("QuickGelu", domain=DOMAIN)
def _quick_gelu(call: Call, x: Array) -> Array:
    return np.asarray(x * sigmoid(call.get("alpha", 1.702) * x))


@operator("BiasAdd", domain=DOMAIN)
def _bias_add(call: Call, x: Array, bias: Array, skip: Array) -> Array:
    return np.asarray(x + bias + skip)


def _transposed(x: Array, last: bool, batch: bool) -> Array:
    if x.ndim < 2:
        return x
    x = np.moveaxis(x, 0, -2) if batch else x
    return x.swapaxes(-1, -2) if last else x


@operator("FusedMatMul", domain=DOMAIN)
def _fused_matmul(call: Call, a: Array, b: Array) -> Array:
    a = _transposed(a, call.get("transA", 0), call.get("transBatchA", 0))
    b = _transposed(b, call.get("transB", 0), call.get("transBatchB", 0))
    return np.asarray(np.matmul(a, b) * call.get("alpha", 1.0))


@operator("FusedGemm", domain=DOMAIN)
def _fused_gemm(call: Call, a: Array, b: Array, c: Array | None = None) -> Array:
    a, b = _transposed(a, call.get("transA", 0), False), _transposed(b, call.get("transB", 0), False)
    y = call.get("alpha", 1.0) * (a @ b)
    y = y if c is None else y + call.get("beta", 1.0) * c
    return activation(call.get("activation"), call.get("activation_alpha"), call.get("activation_beta"))(y)


@operator("FusedConv", domain=DOMAIN)
def _fused_conv(call: Call, x: Array, w: Array, b: Array | None = None, z: Array | None = None) -> Array:
    y = convolve(call, x, w)
    y = y if b is None else y + per_channel(b, y)
    y = y if z is None else y + z
    alpha, beta, *_ = list(call.get("activation_params", [])) + [None, None]
    return activation(call.get("activation"), alpha, beta)(y) if call.get("activation") else y


@operator("SkipLayerNormalization", domain=DOMAIN)
def _skip_layer_norm(
    call: Call, x: Array, skip: Array, gamma: Array, beta: Array | None = None, bias: Array | None = None
) -> tuple[Array, ...]:
    total = x + skip if bias is None else x + skip + bias
    y, mean, inverse = standardize(total, (-1,), call.get("epsilon", 1e-12))
    y = y * gamma
    return (y if beta is None else y + beta), mean, inverse, total


@operator("SkipSimplifiedLayerNormalization", domain=DOMAIN)
def _skip_rms_norm(call: Call, x: Array, skip: Array, gamma: Array, bias: Array | None = None) -> tuple[Array, ...]:
    total = x + skip if bias is None else x + skip + bias
    inverse = 1.0 / np.sqrt((total * total).mean(-1, keepdims=True) + call.get("epsilon", 1e-12))
    return total * inverse * gamma, np.zeros_like(inverse), inverse, total


def _mask_bias(mask: Array | None, batch: int, s: int, t: int, fill: float) -> Array | float:
    """The additive bias [batch, 1, s or 1, t] of an integer mask in any of the forms the operators take."""
    if mask is None:
        return 0.0
    if mask.ndim == 1:
        columns = np.arange(t)
        allowed = columns < mask[:batch, None]
        if mask.size == 2 * batch:
            allowed &= columns >= mask[batch:, None]
        return np.where(allowed, 0.0, fill)[:, None, None]
    if mask.ndim == 2:
        return np.where(mask > 0, 0.0, fill)[:, None, None]
    if mask.ndim == 3:
        return np.where(mask > 0, 0.0, fill)[:, None]
    past = t - s
    return np.where(mask[:, :, past : past + s, :t] > 0, 0.0, fill)


def _masked(call: Call, q: Array, k: Array, v: Array, mask: Array | None, extra: Array | None) -> Array:
    """Attention of [batch, heads, sequence, size] arrays under an integer mask and an additive bias."""
    s, t = q.shape[2], k.shape[2]
    bias = _mask_bias(mask, q.shape[0], s, t, call.get("mask_filter_value", -10000.0))
    if call.get("unidirectional", 0):
        ahead = np.arange(t) > np.arange(s)[:, None] + (t - s)
        bias = np.where(ahead, LOWEST, bias)
    scale = call.get("scale") or 1.0 / np.sqrt(q.shape[3])
    logits = scores(q, k, scale)[0] + bias
    return mix(probabilities(logits if extra is None else logits + extra), v)


@operator("MultiHeadAttention", domain=DOMAIN)
def _multi_head_attention(
    call: Call, q: Array, k: Array | None = None, v: Array | None = None, bias: Array | None = None,
    mask: Array | None = None, extra: Array | None = None, past_k: Array | None = None, past_v: Array | None = None,
    *_: Array | None,
) -> tuple[Array, ...]:  # fmt: skip
    heads = call.get("num_heads")
    if q.ndim == 5:
        q, k, v = (np.moveaxis(q, 3, 0)[i].reshape(*q.shape[:2], -1) for i in range(3))
    elif k is not None and k.ndim == 5:
        k, v = (np.moveaxis(k, 3, 0)[i].reshape(*k.shape[:2], -1) for i in range(2))
    assert k is not None and v is not None
    if bias is not None:
        width = q.shape[2]
        q = q + bias[:width]
        if k.ndim == 3:
            k, v = k + bias[width : 2 * width], v + bias[2 * width :]
    q4 = split_heads(q, heads)
    k4, v4 = (split_heads(x, heads) if x.ndim == 3 else x for x in (k, v))
    k4, v4 = append(past_k, k4), append(past_v, v4)
    return join_heads(_masked(call, q4, k4, v4, mask, extra)), k4, v4


@operator("Attention", domain=DOMAIN)
def _attention(
    call: Call, x: Array, w: Array, bias: Array | None = None, mask: Array | None = None,
    past: Array | None = None, extra: Array | None = None, *_: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    heads = call.get("num_heads")
    y = x @ w if bias is None else x @ w + bias
    sizes = call.get("qkv_hidden_sizes") or [y.shape[2] // 3] * 3
    q, k, v = (split_heads(part, heads) for part in np.split(y, np.cumsum(sizes)[:2], 2))
    if past is not None:
        k, v = append(past[0], k), append(past[1], v)
    y = join_heads(_masked(call, q, k, v, mask, extra))
    return y, np.stack((k, v)) if k.shape == v.shape else k


@operator("RotaryEmbedding", domain=DOMAIN)
def _rotary(call: Call, x: Array, positions: Array, cos: Array, sin: Array) -> Array:
    heads = call.get("num_heads", 0) or (x.shape[2] // (2 * cos.shape[1]) if x.ndim == 3 else x.shape[1])
    x4 = split_heads(x, heads) if x.ndim == 3 else x
    if positions.size == 1 and positions.ndim <= 1:
        positions = positions.reshape(1, 1) + np.arange(x4.shape[2])
    y = rotate(x4, cos[positions], sin[positions], bool(call.get("interleaved", 0)))
    return join_heads(y) if x.ndim == 3 else y


@operator("GroupQueryAttention", domain=DOMAIN)
def _group_query_attention(
    call: Call, q: Array, k: Array | None, v: Array | None, past_k: Array | None, past_v: Array | None,
    last: Array, total: Array, cos: Array | None = None, sin: Array | None = None, positions: Array | None = None,
    extra: Array | None = None, sink: Array | None = None, *_: Array | None,
) -> tuple[Array, ...]:  # fmt: skip
    heads, groups = call.get("num_heads"), call.get("kv_num_heads")
    if k is None or v is None:
        size = q.shape[2] // (heads + 2 * groups)
        q, k, v = np.split(q, [heads * size, (heads + groups) * size], 2)
    q, k, v = split_heads(q, heads), *(split_heads(x, groups) if x.ndim == 3 else x for x in (k, v))
    batch, s = q.shape[0], q.shape[2]
    whole = int(total.reshape(()))
    lengths = last.reshape(-1).astype(np.int64) + 1
    starts = np.zeros(batch, np.int64) if s == whole else lengths - s
    if call.get("do_rotary", 0):
        assert cos is not None and sin is not None
        if positions is None:
            positions = np.maximum(starts[:, None] + np.arange(s), 0)
            positions = np.where(positions < len(cos), positions, 1)
        interleaved = bool(call.get("rotary_interleaved", 0))
        q, k = (rotate(x, cos[positions], sin[positions], interleaved) for x in (q, k))
    room = max(whole, 0 if past_k is None else past_k.shape[2])
    present_k, present_v = np.zeros((batch, groups, room, k.shape[3])), np.zeros((batch, groups, room, v.shape[3]))
    for b, start in enumerate(starts):
        for present, past, new in ((present_k, past_k, k), (present_v, past_v, v)):
            if past is not None and start > 0:
                present[b, :, :start] = past[b, :, :start]
            present[b, :, start : start + s] = new[b]
    place = starts[:, None, None, None] + np.arange(s)[:, None]
    columns = np.arange(whole)
    allowed = (columns <= place) & (columns < lengths[:, None, None, None])
    window = call.get("local_window_size", -1)
    if window >= 0:
        allowed &= columns > place - window
    scale = call.get("scale") or 1.0 / np.sqrt(q.shape[3])
    logits = scores(q, present_k[:, :, :whole], scale, call.get("softcap", 0.0))[1]
    if extra is not None:
        logits = logits + extra[..., :whole]
    if sink is None and call.get("smooth_softmax", 0) > 0:
        sink = np.zeros(heads)
    weights = probabilities(logits + allowed_to_bias(allowed), None if sink is None else sink.reshape(1, -1, 1, 1))
    return join_heads(mix(weights, present_v[:, :, :whole])), present_k, present_v
