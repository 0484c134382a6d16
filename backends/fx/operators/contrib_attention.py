"""The attention operators of ONNX Runtime's own domain `com.microsoft`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from burnish.backends.fx.operators.attention import (
    append,
    bias_of,
    join_heads,
    mix,
    probabilities,
    rotate,
    scores,
    split_heads,
)
from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, integer, tensor

DOMAIN = "com.microsoft"
LOWEST = torch.finfo(torch.float32).min


def _mask_bias(mask: Tensor, like: Tensor, s: int, t: int, fill: float) -> Tensor:
    """The additive bias [batch, 1, s or 1, t] of an integer mask in any of the forms the operators take."""
    batch = like.shape[0]
    if mask.dim() == 1:
        columns = torch.arange(t, device=mask.device)
        allowed = columns < mask[:batch, None]
        if mask.shape[0] == 2 * batch:
            allowed = allowed & (columns >= mask[batch:, None])
        allowed = allowed[:, None, None]
    elif mask.dim() == 2:
        allowed = (mask > 0)[:, None, None]
    elif mask.dim() == 3:
        allowed = (mask > 0)[:, None]
    else:
        allowed = mask[:, :, t - s : t, :t] > 0
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, fill)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Value, extra: Value, fill: float, causal: int, scale: float | None
) -> Tensor:
    """Attention of [batch, heads, sequence, size] tensors under an integer mask and an additive bias."""
    s, t = q.shape[2], k.shape[2]
    logits = scores(q, k, scale or 1.0 / math.sqrt(q.shape[3]))[0]
    bias = None if mask is None else _mask_bias(mask, q, s, t, fill)
    if causal:
        ahead = torch.arange(t, device=q.device) > torch.arange(s, device=q.device)[:, None] + (t - s)
        bias = torch.zeros_like(logits[:1, :1]) if bias is None else bias
        bias = torch.where(ahead, torch.full_like(bias, LOWEST), bias)
    logits = logits if bias is None else logits + bias
    return mix(probabilities(logits if extra is None else logits + extra), v)


@operator("MultiHeadAttention", domain=DOMAIN, several=True)
def multi_head_attention(
    q: Tensor, k: Value = None, v: Value = None, bias: Value = None, mask: Value = None, extra: Value = None,
    past_key: Value = None, past_value: Value = None, num_heads: int = 1, mask_filter_value: float = -10000.0,
    scale: float | None = None, unidirectional: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Attention of projected queries, keys and values, packed or not, and the keys and values with their past."""
    if q.dim() == 5:
        q, k, v = (part.flatten(2) for part in q.unbind(3))
    elif k is not None and k.dim() == 5:
        k, v = (part.flatten(2) for part in k.unbind(3))
    if bias is not None:
        width = q.shape[2]
        q = q + bias[:width]
        if k.dim() == 3:
            k, v = k + bias[width : 2 * width], v + bias[2 * width :]
    q = split_heads(q, num_heads)
    k, v = (split_heads(x, num_heads) if x.dim() == 3 else x for x in (k, v))
    k, v = append(past_key, k), append(past_value, v)
    return join_heads(_masked(q, k, v, mask, extra, mask_filter_value, unidirectional, scale)), k, v


@operator("Attention", domain=DOMAIN, several=True)
def attention_from_hidden(
    x: Tensor, w: Tensor, bias: Value = None, mask: Value = None, past: Value = None, extra: Value = None,
    num_heads: int = 1, qkv_hidden_sizes: list[int] | None = None, mask_filter_value: float = -10000.0,
    scale: float | None = None, unidirectional: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with its packed projection, and the keys and values with their past, stacked."""
    y = x @ w if bias is None else x @ w + bias
    parts = list(qkv_hidden_sizes or [y.shape[2] // 3] * 3)
    q, k, v = (split_heads(part, num_heads) for part in y.split(parts, 2))
    if past is not None:
        k, v = append(past[0], k), append(past[1], v)
    y = join_heads(_masked(q, k, v, mask, extra, mask_filter_value, unidirectional, scale))
    return y, torch.stack((k, v)) if k.shape == v.shape else k


def _packed_or_scaled(attributes: Mapping[str, Any]) -> str | None:
    packed = attributes.get("is_packed_batching") or attributes.get("scale", 1.0) != 1.0
    return "packed batches and scaled angles" if packed else None


@operator("RotaryEmbedding", domain=DOMAIN, fixed=(2, 3), refuses=_packed_or_scaled)
def rotary_embedding_from_positions(
    x: Tensor, positions: Value, cos: Tensor, sin: Tensor, interleaved: int = 0, num_heads: int = 0,
    rotary_embedding_dim: int = 0, is_packed_batching: int = 0, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Pairs of elements turned by the angles of their positions, or of consecutive ones from a first position."""
    positions = tensor(positions)
    heads = num_heads or (x.shape[2] // (2 * cos.shape[1]) if x.dim() == 3 else x.shape[1])
    whole = split_heads(x, heads) if x.dim() == 3 else x
    if positions.dim() <= 1 and positions.numel() == 1:
        positions = positions.reshape(1, 1) + torch.arange(whole.shape[2], device=x.device)
    y = rotate(whole, cos[positions], sin[positions], bool(interleaved))
    return join_heads(y) if x.dim() == 3 else y


def _placed(past: Value, new: Tensor, starts: Tensor, room: int) -> Tensor:
    """`new` written into a cache of length `room` at each row's start, the past before it, zeros behind."""
    places = torch.arange(room, device=new.device)
    since = places - starts[:, None]
    source = since.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    inside = ((since >= 0) & (since < new.shape[2]))[:, None, :, None]
    kept = new.new_zeros(new.shape[0], new.shape[1], room, new.shape[3])
    if past is not None and past.shape[2]:
        before = (places < starts[:, None])[:, None, :, None]
        longer = torch.nn.functional.pad(past, (0, 0, 0, room - past.shape[2]))
        kept = torch.where(before, longer, kept)
    return torch.where(inside, new.gather(2, source), kept)


@operator("GroupQueryAttention", domain=DOMAIN, fixed=(7, 8), several=True)
def group_query_attention(
    q: Tensor, k: Value, v: Value, past_key: Value, past_value: Value, last: Tensor, total: Value, cos: Value = None,
    sin: Value = None, positions: Value = None, extra: Value = None, sink: Value = None, num_heads: int = 1,
    kv_num_heads: int = 1, do_rotary: int = 0, rotary_interleaved: int = 0, local_window_size: int = -1,
    scale: float | None = None, softcap: float = 0.0, smooth_softmax: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Causal attention with fewer key and value heads, rotary embedding inside, and the caches it continues.

    `last` is each row's length less one, `total` the longest.
    """
    if k is None:
        size = q.shape[2] // (num_heads + 2 * kv_num_heads)
        q, k, v = q.split([num_heads * size, kv_num_heads * size, kv_num_heads * size], 2)
    q = split_heads(q, num_heads)
    k, v = (split_heads(x, kv_num_heads) if x.dim() == 3 else x for x in (k, v))
    s, whole = q.shape[2], integer(total)
    lengths = last.reshape(-1).long() + 1
    starts = torch.zeros_like(lengths) if s == whole else lengths - s
    if do_rotary:
        if positions is None:
            positions = (starts[:, None] + torch.arange(s, device=q.device)).clamp(min=0)
            positions = torch.where(positions < cos.shape[0], positions, torch.ones_like(positions))
        q, k = (rotate(x, cos[positions], sin[positions], bool(rotary_interleaved)) for x in (q, k))
    room = whole if past_key is None else max(whole, past_key.shape[2])
    present_key, present_value = _placed(past_key, k, starts, room), _placed(past_value, v, starts, room)
    place = starts[:, None, None, None] + torch.arange(s, device=q.device)[:, None]
    columns = torch.arange(whole, device=q.device)
    allowed = (columns <= place) & (columns < lengths[:, None, None, None])
    if local_window_size >= 0:
        allowed = allowed & (columns > place - local_window_size)
    logits = scores(q, present_key[:, :, :whole], scale or 1.0 / math.sqrt(q.shape[3]), softcap)[1]
    logits = logits if extra is None else logits + extra[..., :whole]
    if sink is None and smooth_softmax > 0:
        sink = q.new_zeros(num_heads)
    weights = probabilities(logits + bias_of(allowed, q.dtype), None if sink is None else sink.reshape(1, -1, 1, 1))
    return join_heads(mix(weights, present_value[:, :, :whole])), present_key, present_value
