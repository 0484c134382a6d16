"""Networks of inverted bottlenecks whose widths grow along a line (ReXNet) or in steps: ONNX files with random weights.

`python -m burnish.tools.research.rexnet_networks OUT.onnx [MULTIPLIER]` writes ReXNet (Han et al., "Rethinking channel
dimensions for efficient model design", CVPR 2021, arXiv:2007.00992) for images [batch, 3, 224, 224] and 1000 classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from burnish.tools.research import zoo_export
from burnish.tools.research.zoo_random import Network


@dataclass(frozen=True)
class Design:
    """A network.

    Attributes:
        stem: channels behind the first convolution.
        widths: channels behind each block.
        strides: of each block.
        expansions: how many times as wide each block is inside.
        squeezed: whether each block scales its channels by what all positions say of them.
        last: channels of the last convolution.
        classes: scores.
        inputs: channels of the image.
        stem_stride: of the first convolution.
        partial: whether a block adds its input also where it puts out more channels, to the first of them.
    """

    stem: int
    widths: Sequence[int]
    strides: Sequence[int]
    expansions: Sequence[int]
    squeezed: Sequence[bool]
    last: int
    classes: int
    inputs: int = 3
    stem_stride: int = 2
    partial: bool = True


def along_a_line(first: float, rise: float, blocks: int, multiplier: float = 1.0) -> list[int]:
    """Widths of blocks: `multiplier * (first + i * rise / blocks)`, rounded to whole channels."""
    return [round(multiplier * (first + index * rise / blocks)) for index in range(blocks)]


def in_steps(stages: Sequence[tuple[int, int]], multiplier: float = 1.0) -> list[int]:
    """Widths of blocks that are equal within a stage, of (blocks, width)."""
    return [round(multiplier * width) for count, width in stages for _ in range(count)]


def rexnet(multiplier: float = 1.0) -> Design:
    """The network of the paper, with 16 blocks in six stages; `multiplier` of at least 1 scales its widths."""
    layers, strides = (1, 2, 2, 3, 3, 5), (1, 2, 2, 2, 1, 2)
    count = sum(layers)
    squeezed = [stage > 1 for stage, number in enumerate(layers) for _ in range(number)]
    steps = [
        step if first else 1 for step, n in zip(strides, layers, strict=True) for first in [True] + [False] * (n - 1)
    ]
    widths = along_a_line(16, 180, count, multiplier)
    return Design(
        round(32 * multiplier), widths, steps, [1] + [6] * (count - 1), squeezed, int(1280 * multiplier), 1000
    )


class _ConvNorm(nn.Sequential):
    def __init__(self, before: int, after: int, size: int = 1, stride: int = 1, groups: int = 1) -> None:
        convolution = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(after))


class _Squeeze(nn.Module):
    def __init__(self, width: int, ratio: int = 12) -> None:
        super().__init__()
        inside = max(width // ratio, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(
            nn.Conv2d(width, inside, 1), nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layers(self.pool(x))


class _Bottleneck(nn.Module):
    """Wider, depthwise, narrower; the input is added to the first channels where no position is left out.

    Attributes:
        spelling: how it is added: `scatter` in place, or `concat`.
    """

    def __init__(
        self,
        before: int,
        after: int,
        stride: int,
        expansion: int,
        squeezed: bool,
        partial: bool,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        inside = before * expansion
        self.spelling = "scatter"
        self.shortcut = before if stride == 1 and (before == after or partial and before < after) else 0
        self.wider = nn.Sequential(_ConvNorm(before, inside), activation()) if expansion > 1 else nn.Identity()
        self.depthwise = _ConvNorm(inside, inside, 3, stride, inside)
        self.squeeze = _Squeeze(inside) if squeezed else nn.Identity()
        self.relu = nn.ReLU6()
        self.narrower = _ConvNorm(inside, after)

    def forward(self, x: Tensor) -> Tensor:
        out = self.narrower(self.relu(self.squeeze(self.depthwise(self.wider(x)))))
        if self.shortcut and self.spelling == "concat":
            return torch.cat([out[:, : self.shortcut] + x, out[:, self.shortcut :]], 1)
        if self.shortcut:
            out[:, : self.shortcut] += x
        return out


class Bottlenecks(nn.Module):
    """Stem, blocks, one more convolution, mean over the positions, linear head.

    Args:
        design: the widths and the rest.
        activation: behind the layers that make a block wider.
    """

    def __init__(self, design: Design, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(_ConvNorm(design.inputs, design.stem, 3, design.stem_stride), activation())
        before, blocks = design.stem, []
        parts = zip(design.widths, design.strides, design.expansions, design.squeezed, strict=True)
        for after, stride, expansion, squeezed in parts:
            blocks.append(_Bottleneck(before, after, stride, expansion, squeezed, design.partial, activation))
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(_ConvNorm(before, design.last), activation())
        self.head = nn.Linear(design.last, design.classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(image))).mean((2, 3)))


def network(design: Design, side: int, activation: type[nn.Module] = nn.SiLU, seed: int = 0) -> Network:
    """A network with random weights that keep the size of what passes through, for square images of `side` pixels."""
    torch.manual_seed(seed)
    module = Bottlenecks(design, activation).eval()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in")
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    return Network(module, (torch.randn(2, design.inputs, side, side),), ("image",), ("logits",), axes)


def main(file: Path, multiplier: float = 1.0) -> int:
    """Write ReXNet."""
    zoo_export.torchscript(network(rexnet(multiplier), 224), file, opset=17)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(float, sys.argv[2:])))
