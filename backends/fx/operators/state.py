"""Operators that carry a state from call to call: caches, causal convolution, linear attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from burnish.backends.fx.operators.attention import join_heads, repeated, split_heads
from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, on_device, tensor


@operator("TensorScatter")
def tensor_scatter(past: Tensor, update: Tensor, indices: Value = None, axis: int = -2, mode: str = "linear") -> Tensor:
    """A cache with `update` written from a position on, one position a batch; a `circular` one begins anew at its end.

    Args:
        past: [batch, ..., most, ...] with the length at `axis`, as `update`.
        update: what is written.
        indices: [batch], where it is written; 0 by default.
        axis: the axis of positions.
        mode: `linear` or `circular`.
    """
    axis = axis % past.dim()
    first = past.new_zeros(past.shape[0]) if indices is None else on_device(tensor(indices), past)
    places = first.long()[:, None] + torch.arange(update.shape[axis], device=past.device)
    places = places % past.shape[axis] if mode == "circular" else places
    shape = [d if i in (0, axis) else 1 for i, d in enumerate(update.shape)]
    return past.scatter(axis, places.reshape(shape).expand(update.shape), update)


@operator("CausalConvWithState", several=True)
def causal_conv(
    x: Tensor, w: Tensor, b: Value = None, past: Value = None, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """The convolution of every channel of x [N, C, L] with its own taps over the past, and the last inputs."""
    taps = w.shape[2]
    past = x.new_zeros(x.shape[0], x.shape[1], taps - 1) if past is None else past
    whole = torch.cat((past, x), 2)
    y = F.conv1d(whole, w, b, groups=x.shape[1])
    y = y if activation == "none" else F.silu(y.float() if y.dtype != torch.float64 else y).to(x.dtype)
    return y, whole[:, :, whole.shape[2] - (taps - 1) :]


@operator("LinearAttention", several=True)
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, past: Value = None, decay: Value = None, beta: Value = None,
    q_num_heads: int = 0, kv_num_heads: int = 0, scale: float = 0.0, update_rule: str = "gated_delta",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by a state [N, heads, d_k, d_v] that every step decays, corrects and adds to; and the last state."""
    kind = q.dtype
    wide = torch.float64 if kind == torch.float64 else torch.float32
    query, key, value = (
        split_heads(x, heads).to(wide) for x, heads in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads))
    )
    state = key.new_zeros(*key.shape[:2], key.shape[3], value.shape[3]) if past is None else past.to(wide)
    factor = None if decay is None else split_heads(decay, kv_num_heads).to(wide).exp()
    share = None if beta is None else beta.to(wide).transpose(1, 2)
    rows = []
    for t in range(q.shape[1]):
        state = state if factor is None else state * factor[:, :, t, :, None]
        now, new = key[:, :, t, :, None], value[:, :, t]
        if share is not None:
            new = share[:, :, t, None] * (new - (state * now).sum(2))
        state = state + now * new[:, :, None, :]
        rows.append((query[:, :, t, :, None] * repeated(state, q_num_heads)).sum(2))
    y = torch.stack(rows, 2) * (scale or 1.0 / math.sqrt(query.shape[3]))
    return join_heads(y).to(kind), state.to(kind if past is None else past.dtype)
