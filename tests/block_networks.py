"""Small torch modules made of residual blocks in a list `blocks`, so that one can be taken out of module and graph."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import onnx_ir as oir
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

WIDTH, HEADS, WORDS = 16, 2, 11


class Attention(nn.Module):
    """Softmax attention with separate projections; `memory` makes it cross-attention, `past` is (keys, values)."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, mask=None, memory=None, past=None):
        batch, tokens, _ = x.shape
        source = x if memory is None else memory
        q, k, v = (
            t.reshape(batch, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for t in (self.q(x), self.k(source), self.v(source))
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        scores = q @ k.transpose(2, 3) * (WIDTH // HEADS) ** -0.5
        if mask is not None:
            scores = scores + mask
        y = self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, WIDTH))
        return y if past is None else (y, k, v)


class Mlp(nn.Sequential):
    """Two linear layers."""

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class Layer(nn.Module):
    """A transformer layer: `form` is pre, post, parallel or sandwich."""

    def __init__(self, form="pre", cross=False):
        super().__init__()
        self.form = form
        self.attention, self.mlp = Attention(), Mlp()
        self.cross = Attention() if cross else None
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))

    def forward(self, x, mask=None, memory=None):
        one, two, three, four, five = self.norms
        if self.form == "post":
            x = one(x + self.attention(x, mask))
            return two(x + self.mlp(x))
        if self.form == "parallel":
            normed = one(x)
            return x + self.attention(normed, mask) + self.mlp(normed)
        if self.form == "sandwich":
            x = x + two(self.attention(one(x), mask))
            return x + four(self.mlp(three(x)))
        x = x + self.attention(one(x), mask)
        if self.cross is not None:
            x = x + self.cross(five(x), memory=memory)
        return x + self.mlp(two(x))


class Encoder(nn.Module):
    """Words in, `layers` layers of one form, a norm unless they end with one, and a head."""

    def __init__(self, form="pre", layers=3):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.first = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Layer(form) for _ in range(layers))
        self.last = nn.Identity() if form == "post" else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids, mask):
        hidden = (1.0 - mask[:, None, None, :].float()) * -1e4
        x = self.first(self.words(ids))
        for block in self.blocks:
            x = block(x, hidden)
        return self.head(self.last(x))


class Translator(nn.Module):
    """Two encoder layers and three decoder layers with cross-attention; `blocks` has all of them."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([*(Layer() for _ in range(2)), *(Layer(cross=True) for _ in range(3))])
        self.between, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, ids, target):
        x, y = self.words(ids), self.words(target)
        for block in self.blocks:
            if block.cross is None:
                x = block(x)
        memory = self.between(x)
        for block in self.blocks:
            if block.cross is not None:
                y = block(y, memory=memory)
        return self.last(y)


class Cached(nn.Module):
    """A decoder with a cache for each layer, whose causal mask is made from the length of the first."""

    def __init__(self, layers=3):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Layer() for _ in range(layers))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, ids, *past):
        x = self.words(ids)
        old = past[0].shape[2]
        total = old + ids.shape[1]
        rows = torch.arange(old, total)[:, None]
        mask = torch.where(torch.arange(total)[None, :] <= rows, 0.0, -1e4)
        present = []
        for index, block in enumerate(self.blocks):
            one, two = block.norms[:2]
            y, k, v = block.attention(one(x), mask, past=past[2 * index : 2 * index + 2])
            x = x + y
            x = x + block.mlp(two(x))
            present += [k, v]
        return (self.last(x), *present)


class Bottleneck(nn.Module):
    """Two convolutions, a shortcut that is a convolution where the shape changes, and a ReLU behind the sum."""

    def __init__(self, before, after, stride=1):
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1)
        self.second = nn.Conv2d(after, after, 3, 1, 1)
        self.shortcut = nn.Conv2d(before, after, 1, stride) if (before, stride) != (after, 1) else nn.Identity()

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ConvNet(nn.Module):
    """Six residual blocks in two widths."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        plan = [(8, 8, 1), (8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1)]
        self.blocks = nn.ModuleList(Bottleneck(*one) for one in plan)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Two blocks down, one in the middle, two up; each on the way up reads a skip."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        plan = [(8, 8), (8, 8), (8, 8), (16, 8), (16, 8)]
        self.blocks = nn.ModuleList(Bottleneck(*one) for one in plan)
        self.pool, self.grow = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x):
        x = self.stem(x)
        skips = []
        for block in self.blocks[:2]:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.blocks[2](x)
        for block in self.blocks[3:]:
            x = block(torch.cat([self.grow(x), skips.pop()], 1))
        return x


class GridLayer(nn.Module):
    """A transformer layer on a picture [batch, rows, columns, channels], whose mlp works on its flattened form."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x):
        batch, rows, columns, channels = x.shape
        x = x + self.attention(self.norms[0](x).reshape(batch, -1, channels)).reshape(x.shape)
        x = x.reshape(batch, -1, channels)
        return (x + self.mlp(self.norms[1](x))).reshape(batch, rows, columns, channels)


class Grid(nn.Module):
    """Layers between which a picture is reshaped, and behind the last of them the merging of its pixels by fours."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(GridLayer() for _ in range(3))
        self.merge = nn.Linear(4 * WIDTH, 5)

    def forward(self, x):
        x = self.first(x.permute(0, 2, 3, 1))
        for block in self.blocks:
            x = block(x)
        batch, rows, columns, channels = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        return self.merge(x.flatten(3))


def built(module: nn.Module) -> nn.Module:
    """The module in evaluation mode with parameters drawn from seed 0, no two of them equal."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter.ndim < 2))
    return module.eval()


def exported(
    module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    names: Sequence[str],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    opset: int = 17,
) -> oir.Model:
    """What the TorchScript exporter makes of the module."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            inputs,
            file,
            input_names=list(names),
            output_names=list(outputs),
            dynamic_axes={name: dict(one) for name, one in axes.items()},
            opset_version=opset,
            dynamo=False,
        )
    import onnx

    return oir.from_proto(onnx.load_from_string(file.getvalue()))
