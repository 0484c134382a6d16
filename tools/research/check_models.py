"""Small networks whose exports `check_cases` compares: each can be built with one thing changed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.tools.research.zoo_random import Network

WORDS = 60


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale, self.causal, self.axis = heads, (width // heads) ** -0.5, False, -1
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part(x).reshape(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(2, 3) * self.scale
        if self.causal:
            seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
            scores = scores.masked_fill(~seen, -1e4)
        scores = scores if mask is None else scores + mask
        return self.o((scores.softmax(self.axis) @ v).transpose(1, 2).reshape(batch, tokens, width))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.activation: Callable[[Tensor], Tensor] = F.gelu
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.dropout(self.down(self.activation(self.up(self.norm2(x)))))


class Text(nn.Module):
    """A BERT-like encoder: `ids` int64 [batch, length], `mask` int64 [batch, length] to `logits` [batch, labels]."""

    def __init__(self, layers: int = 4, width: int = 32, labels: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(64, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, 4, dropout) for _ in range(layers))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, labels)
        self.hidden = False

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        added = (1.0 - mask[:, None, None, :].to(torch.float32)) * -1e4
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x, added)
        logits = self.head(self.last(x)[:, 0])
        return (logits, x) if self.hidden else logits


class Image(nn.Module):
    """A vision transformer: `image` float32 [batch, 1, 8, 8] to `logits` float32 [batch, 10]."""

    def __init__(self, layers: int = 3, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.layers = nn.ModuleList(_Layer(width, 4, 0.0) for _ in range(layers))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            x = layer(x, None)
        return self.head(self.last(x).mean(1))


@dataclass(frozen=True)
class Kind:
    """How to build a network of a kind, and what its export is told.

    Attributes:
        build: the module, with the given options; weights are drawn anew from a seed.
        names: of inputs and outputs.
        feeds: examples for tracing.
        axes: dynamic ones by input and output.
    """

    build: Callable[..., nn.Module]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    feeds: Callable[[], tuple[Tensor, ...]]
    axes: dict[str, dict[int, str]]


def _resnet() -> nn.Module:
    from burnish.tools.research.train_digits import DigitsResNet

    return DigitsResNet()


KINDS = {
    "text": Kind(
        Text,
        (("ids", "mask"), ("logits",)),
        lambda: (torch.randint(0, WORDS, (2, 9)), torch.tensor([[1] * 9, [1] * 6 + [0] * 3])),
        {"ids": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}, "logits": {0: "batch"}},
    ),
    "image": Kind(
        Image,
        (("image",), ("logits",)),
        lambda: (torch.rand(2, 1, 8, 8),),
        {"image": {0: "batch"}, "logits": {0: "batch"}},
    ),
    "resnet": Kind(
        _resnet,
        (("image",), ("logits",)),
        lambda: (torch.rand(2, 1, 8, 8),),
        {"image": {0: "batch"}, "logits": {0: "batch"}},
    ),
}


def network(kind: str, edit: Callable[[Any], object] | None = None, **options: Any) -> Network:
    """A network of a kind in evaluation mode, and its edit; a layer more has the other weights where they were.

    Args:
        kind: of `KINDS`.
        edit: changes the module in place.
        options: of its constructor.
    """
    how = KINDS[kind]
    torch.manual_seed(0)
    module = how.build(**options)
    _weigh(module)
    torch.manual_seed(1)
    feeds = how.feeds()
    module.eval()
    if edit is not None:
        edit(module)
    return Network(module, feeds, how.names[0], how.names[1], dict(how.axes))


def _weigh(module: nn.Module) -> None:
    """Weights that depend on the parameter's name and size only, so that one more layer does not change the others."""
    for name, one in [*module.named_parameters(), *module.named_buffers()]:
        if not one.is_floating_point():
            continue
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(one.shape, generator=draw)
        with torch.no_grad():
            positive = name.endswith("running_var") or (one.ndim == 1 and name.endswith("weight"))
            small = noise * (0.1 if one.ndim < 2 else one[0].numel() ** -0.5)
            one.copy_(1 + 0.1 * noise.clamp(-2, 2) if positive else small)
