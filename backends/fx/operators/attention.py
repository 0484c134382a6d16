"""Attention and rotary embedding of the standard's domain, and the parts that the fused operators share."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, on_device, tensor, together


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, sequence, heads * size] as [batch, heads, sequence, size]."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, sequence, size] as [batch, sequence, heads * size]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values of fewer heads, each repeated until there are `heads`."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def scores(q: Tensor, k: Tensor, scale: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scaled products of [batch, heads, s, d] queries with [batch, kv heads, t, d] keys, and the same soft-capped."""
    raw = torch.matmul(q * scale, repeated(k, q.shape[1]).transpose(2, 3))
    return raw, (softcap * torch.tanh(raw / softcap) if softcap else raw)


def probabilities(logits: Tensor, sink: Tensor | None = None) -> Tensor:
    """Softmax over the last axis; a row of only -inf gives zeros; `sink` joins the denominator as one more logit."""
    top = logits.detach().amax(-1, True) if logits.shape[-1] else logits.sum(-1, True)
    top = top if sink is None else torch.maximum(top, sink)
    powers = torch.exp(logits - torch.where(torch.isneginf(top), torch.zeros_like(top), top))
    total = powers.sum(-1, True)
    total = total if sink is None else total + torch.exp(sink - top)
    return powers / torch.where(total == 0.0, torch.ones_like(total), total)


def mix(weights: Tensor, v: Tensor) -> Tensor:
    """Probabilities [batch, heads, s, t] times values [batch, kv heads, t, d]."""
    return torch.matmul(weights, repeated(v, weights.shape[1]))


def bias_of(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `allowed`, -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -math.inf)


def append(past: Value, new: Tensor) -> Tensor:
    """`new` behind `past` along the sequence axis of [batch, heads, sequence, size]."""
    return new if past is None else torch.cat((past, new), 2)


@operator("Attention", several=True)
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Value = None, past_key: Value = None, past_value: Value = None,
    lengths: Value = None, is_causal: int = 0, kv_num_heads: int = 0, q_num_heads: int = 0,
    qk_matmul_output_mode: int = 0, scale: float | None = None, softcap: float = 0.0,
    softmax_precision: int | None = None, left_window_size: int = -1, right_window_size: int = -1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Scaled dot-product attention, keys and values with the past before them, and one of the stages of the scores."""
    flat = q.dim() == 3
    q, mask, lengths = together(q, mask, lengths)
    if flat:
        q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    k, v = append(past_key, k), append(past_value, v)
    s, t = q.shape[2], k.shape[2]
    bias = torch.zeros((1, 1), dtype=q.dtype, device=q.device)
    if mask is not None:
        bias = bias_of(mask, q.dtype) if mask.dtype == torch.bool else mask
        bias = F.pad(bias, (0, t - bias.shape[-1]), value=-math.inf)
    columns = torch.arange(t, device=q.device)
    offset: Any = 0 if past_key is None else past_key.shape[2]
    if lengths is not None:
        ends = lengths.reshape(-1, 1, 1, 1)
        bias = bias + bias_of(columns < ends, q.dtype)
        offset = offset if past_key is not None else ends - s
    ahead = columns - (torch.arange(s, device=q.device)[:, None] + offset)
    if is_causal:
        bias = bias + bias_of(ahead <= 0, q.dtype)
    if left_window_size >= 0:
        bias = bias + bias_of(-ahead <= left_window_size, q.dtype)
    if right_window_size >= 0:
        bias = bias + bias_of(ahead <= right_window_size, q.dtype)
    raw, capped = scores(q, k, scale or 1.0 / math.sqrt(q.shape[3]), softcap)
    logits = capped + bias
    weights = probabilities(logits)
    y = mix(weights, v)
    shown = (raw, capped, logits, weights)[qk_matmul_output_mode]
    return (join_heads(y) if flat else y), k, v, shown


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first 2 * r of each head's elements.

    Args:
        x: [batch, heads, sequence, size].
        cos: [batch or 1, sequence, r], likewise `sin`.
        sin: the sines.
        interleaved: pairs are neighbours, else they lie r apart.
    """
    r = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : 2 * r], x[..., 2 * r :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :r], turned[..., r:])
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    if interleaved:
        turned = torch.stack((real, imaginary), -1).reshape(turned.shape)
    else:
        turned = torch.cat((real, imaginary), -1)
    return torch.cat((turned, rest), -1)


@operator("RotaryEmbedding", fixed=(1, 2))
def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Value = None, interleaved: int = 0, num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:  # fmt: skip
    """Pairs of elements turned by the angles of their positions."""
    if positions is not None:
        positions = on_device(tensor(positions), cos)
        cos, sin = cos[positions], sin[positions]
    if x.dim() == 3:
        return join_heads(rotate(split_heads(x, num_heads), cos, sin, bool(interleaved)))
    return rotate(x, cos, sin, bool(interleaved))
