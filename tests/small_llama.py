"""A small decoder: RMS norms, rotary embedding, grouped heads, gated MLPs."""

from __future__ import annotations

from functools import cache

import onnx_ir as oir
from block_networks import exported, torch
from torch import nn
from torch.nn import functional as F

from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline

WORDS, WIDTH, HEADS, KEY_HEADS, SIZE, INNER = 61, 32, 4, 2, 8, 48


class Norm(nn.Module):
    """An RMS norm with a gain."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(1 + 0.3 * torch.randn(WIDTH))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


def turned(x, angles):
    """Rotary embedding of halves."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat((-second, first), -1) * sin


class Layer(nn.Module):
    """Attention and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.before, self.between = Norm(), Norm()
        self.q, self.o = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, KEY_HEADS * SIZE), nn.Linear(WIDTH, KEY_HEADS * SIZE)
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        batch, length, _ = x.shape
        y = self.before(x)
        q, k, v = (layer(y).view(batch, length, -1, SIZE).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angles = torch.arange(length)[:, None] * 0.3 ** torch.arange(SIZE // 2)
        q, k = turned(q, angles), turned(k, angles)
        repeats = HEADS // KEY_HEADS
        k, v = (
            one[:, :, None].expand(batch, KEY_HEADS, repeats, length, SIZE).reshape(batch, HEADS, length, SIZE)
            for one in (k, v)
        )
        later = torch.arange(length)[None] > torch.arange(length)[:, None]
        scores = q @ k.transpose(2, 3) * SIZE**-0.5 + torch.where(later, -1e4, 0.0)
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, HEADS * SIZE))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Tokens in, two layers, logits out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.last = Norm()

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.last(x), self.table.weight)


@cache
def _made() -> oir.Model:
    torch.manual_seed(0)
    ids = torch.arange(10).reshape(2, 5) % WORDS
    model = exported(Decoder().eval(), (ids,), ["ids"], ["logits"], {"ids": {0: "batch", 1: "words"}})
    return Pipeline(recipes.named("normal-form", "onnx", None)).rewrite(model).model


def decoder() -> oir.Model:
    """A copy of the decoder in normal form, weights from seed 0; `ids` int64 [batch, words] to `logits`."""
    return _made().clone()
