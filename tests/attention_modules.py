"""Small attention layers in torch, one for each way in which models lay out heads, with their weights head by head.

`export(name)` gives the ONNX model, the example inputs, and what the view has to read, taken from the module itself.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIZE = 24, 4, 6


@dataclass
class Truth:
    """What a view must find: weights head by head and the rest by the names of `AttentionLayer`'s attributes."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray
    query_bias: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Layer(nn.Module):
    """Separate linear layers, heads split by view and transpose, a causal mask chosen by `where`."""

    kv_heads = HEADS
    facts: dict[str, Any] = {"causal": True}
    bias = True

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * SIZE, bias=self.bias)
        self.k = nn.Linear(WIDTH, self.kv_heads * SIZE, bias=self.bias)
        self.v = nn.Linear(WIDTH, self.kv_heads * SIZE, bias=self.bias)
        self.o = nn.Linear(HEADS * SIZE, WIDTH, bias=self.bias)

    def split(self, x: Tensor, heads: int = HEADS) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, SIZE).transpose(1, 2)

    def join(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).reshape(y.shape[0], -1, HEADS * SIZE)

    def mask(self, scores: Tensor) -> Tensor:
        keep = torch.ones(scores.shape[-2], scores.shape[-1], dtype=torch.bool).tril()
        return scores.masked_fill(~keep, float("-inf"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x), self.kv_heads), self.split(self.v(x), self.kv_heads)
        scores = self.mask(q @ k.transpose(-1, -2) / SIZE**0.5)
        return x + self.o(self.join(scores.softmax(-1) @ v))

    def truth(self) -> Truth:
        def rows(layer: nn.Linear) -> np.ndarray:
            return layer.weight.detach().double().numpy().reshape(-1, SIZE, WIDTH)

        output = self.o.weight.detach().double().numpy().reshape(WIDTH, HEADS, SIZE)
        bias = self.q.bias.detach().double().numpy().reshape(HEADS, SIZE) if self.bias else None
        return Truth(rows(self.q), rows(self.k), rows(self.v), output, bias, self.facts)


class _Packed(Layer):
    """One matrix for queries, keys and values, [3, heads, size] along its rows."""

    facts = {"causal": False, "packed": True}
    order = "chd"

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)
        del self.q, self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        if self.order == "chd":
            q, k, v = self.qkv(x).reshape(b, s, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self.qkv(x).view(b, s, HEADS, 3 * SIZE).transpose(1, 2).split(SIZE, -1)
        y = (q * SIZE**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.o(self.join(y))

    def truth(self) -> Truth:
        shape = (3, HEADS, SIZE) if self.order == "chd" else (HEADS, 3, SIZE)
        axis = 0 if self.order == "chd" else 1
        weight = self.qkv.weight.detach().double().numpy().reshape(*shape, WIDTH)
        bias = self.qkv.bias.detach().double().numpy().reshape(shape)
        q, k, v = (weight.take(index, axis) for index in range(3))
        output = self.o.weight.detach().double().numpy().reshape(WIDTH, HEADS, SIZE)
        return Truth(q, k, v, output, bias.take(0, axis), self.facts)


class _ByHead(_Packed):
    """One matrix, [heads, 3, size] along its rows, as GPT-NeoX and BLOOM have it."""

    order = "hcd"


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _angles(length: int, size: int) -> Tensor:
    return torch.arange(length)[:, None] * 0.3 ** torch.arange(size // 2)


class _Grouped(Layer):
    """Grouped heads, packed unevenly, with rotary embedding and a sliding window, as Phi-3 and Mistral have it."""

    kv_heads = 2
    bias = False
    facts = {"causal": True, "window": 3, "packed": True, "turns": SIZE, "interleaved": False}

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 4) * SIZE, bias=False)
        del self.q, self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).split([HEADS * SIZE, 2 * SIZE, 2 * SIZE], -1)
        angles = _angles(s, SIZE).repeat(1, 2)
        q, k = (_turn(self.split(one, n), angles.cos(), angles.sin()) for one, n in ((q, HEADS), (k, 2)))
        k, v = (one[:, :, None].expand(b, 2, 2, s, SIZE).reshape(b, HEADS, s, SIZE) for one in (k, self.split(v, 2)))
        row, column = torch.arange(s)[:, None], torch.arange(s)[None]
        keep = (column <= row) & (row - column < 3)
        scores = q @ k.transpose(-1, -2) * SIZE**-0.5
        scores = scores + torch.where(keep, 0.0, torch.finfo(torch.float32).min)
        return x + self.o(self.join(scores.softmax(-1) @ v))

    def truth(self) -> Truth:
        weight = self.qkv.weight.detach().double().numpy().reshape(-1, SIZE, WIDTH)
        output = self.o.weight.detach().double().numpy().reshape(WIDTH, HEADS, SIZE)
        return Truth(weight[:HEADS], weight[HEADS : HEADS + 2], weight[HEADS + 2 :], output, None, self.facts)


class _SequenceFirst(Layer):
    """[sequence, batch, width] with heads merged into the batch, as torch's MultiheadAttention has it."""

    facts = {"causal": False}

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        y = x.transpose(0, 1)
        q, k, v = (layer(y).view(s, b * HEADS, SIZE).transpose(0, 1) for layer in (self.q, self.k, self.v))
        y = torch.bmm((torch.bmm(q * SIZE**-0.5, k.transpose(1, 2))).softmax(-1), v)
        return x + self.o(y.transpose(0, 1).reshape(s, b, WIDTH)).transpose(0, 1)


class _Merged(Layer):
    """Heads merged into the batch after they were transposed, as older diffusers have it."""

    facts = {"causal": False}
    bias = False

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (self.split(layer(x)).reshape(b * HEADS, s, SIZE) for layer in (self.q, self.k, self.v))
        y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SIZE**-0.5).softmax(-1), v)
        return x + self.o(self.join(y.reshape(b, HEADS, s, SIZE)))


class _Flat(_Packed):
    """Products of matrices, with [in, out] weights, on batch and positions joined, as GPT-2 has it."""

    facts = {"packed": True, "causal": True}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shift = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH)), nn.Parameter(torch.randn(3 * WIDTH))
        self.c, self.end = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        del self.qkv, self.o

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        packed = torch.addmm(self.shift, x.view(-1, WIDTH), self.a).view(b, s, 3 * WIDTH)
        q, k, v = (self.split(one) for one in packed.split(WIDTH, -1))
        y = self.join(self.mask(q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1) @ v)
        return x + torch.addmm(self.end, y.view(-1, WIDTH), self.c).view(b, s, WIDTH)

    def truth(self) -> Truth:
        weight = self.a.detach().double().numpy().T.reshape(3, HEADS, SIZE, WIDTH)
        output = self.c.detach().double().numpy().T.reshape(WIDTH, HEADS, SIZE)
        bias = self.shift.detach().double().numpy().reshape(3, HEADS, SIZE)
        return Truth(weight[0], weight[1], weight[2], output, bias[0], self.facts)


class _Normed(Layer):
    """Norms of each head, softcap, half of each head turned in pairs that lie side by side."""

    bias = False
    facts = {"causal": False, "per_head": True, "softcap": 20.0, "turns": 4, "interleaved": True}

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.Parameter(torch.rand(SIZE) + 0.5), nn.Parameter(torch.rand(SIZE) + 0.5)

    def turn(self, x: Tensor) -> Tensor:
        angles = _angles(x.shape[2], 4)[..., None].expand(-1, -1, 2).flatten(-2)
        part, rest = x[..., :4], x[..., 4:]
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
        return torch.cat((part * angles.cos() + turned * angles.sin(), rest), -1)

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain

    def forward(self, x: Tensor) -> Tensor:
        q = self.turn(self.norm(self.split(self.q(x)), self.q_norm))
        k = self.turn(self.norm(self.split(self.k(x)), self.k_norm))
        scores = 20.0 * torch.tanh(q @ k.transpose(-1, -2) * SIZE**-0.5 / 20.0)
        return x + self.o(self.join(scores.softmax(-1) @ self.split(self.v(x))))


class _Windows(_Packed):
    """Windows in the batch, a bias of relative positions and a mask by window, as Swin has it."""

    facts = {"packed": True, "masks": 2}

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Parameter(torch.randn(HEADS, 4, 4))
        self.register_buffer("hidden", torch.where(torch.rand(2, 4, 4) > 0.3, 0.0, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        y = x.view(b * 2, 4, WIDTH)
        q, k, v = self.qkv(y).reshape(b * 2, 4, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * SIZE**-0.5 @ k.transpose(-2, -1) + self.relative[None]
        scores = scores.view(b, 2, HEADS, 4, 4) + self.hidden[None, :, None]
        y = scores.view(b * 2, HEADS, 4, 4).softmax(-1) @ v
        return x + self.o(self.join(y)).view(b, s, WIDTH)


class _Single(Layer):
    """One head of keys and values for all queries."""

    kv_heads = 1
    facts = {"causal": True}


class _Cross(Layer):
    """Keys and values of another sequence."""

    facts = {"causal": False, "cross": True}

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(other)), self.split(self.v(other))
        return x + self.o(self.join((q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1) @ v))


class _Sdpa(Layer):
    """torch's own operator, which scales queries and keys by the fourth root."""

    facts = {"causal": True}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        return x + self.o(self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


LAYERS: dict[str, Callable[[], Layer]] = {
    "separate": Layer,
    "packed": _Packed,
    "packed by head": _ByHead,
    "grouped": _Grouped,
    "sequence first": _SequenceFirst,
    "merged into the batch": _Merged,
    "flat": _Flat,
    "normed": _Normed,
    "windows": _Windows,
    "one key head": _Single,
    "cross": _Cross,
    "sdpa": _Sdpa,
}


def export(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray], Truth]:
    """The TorchScript export of a layer of `LAYERS`, with batch and sequence dynamic."""
    torch.manual_seed(0)
    module = LAYERS[name]().eval()
    inputs = {"x": torch.randn(2, 8, WIDTH)}
    if name == "cross":
        inputs["other"] = torch.randn(2, 5, WIDTH)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, tuple(inputs.values()), file, input_names=list(inputs), output_names=["y"], dynamo=False,
            opset_version=17,
            dynamic_axes={one: {0: "batch"} | ({} if name == "windows" else {1: f"{one}_length"}) for one in inputs},
        )  # fmt: skip
    return (
        onnx.shape_inference.infer_shapes(onnx.load_from_string(file.getvalue())),
        {one: value.numpy() for one, value in inputs.items()},
        module.truth(),
    )
