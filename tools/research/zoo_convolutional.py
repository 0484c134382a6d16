"""Convolutional families with seeded random weights, spelt as torchvision spells them.

`ResNet` (He et al., arXiv:1512.03385, stride in the 3x3 convolution), `MobileNetV2` (Sandler et al., arXiv:1801.04381)
and `EfficientNet` (Tan and Le, arXiv:1905.11946) are narrow: their plans of stages are at the head of each class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from burnish.tools.research.zoo_random import Network


def resnet(bottleneck: bool) -> Network:
    """Stages of 3, 3 and 2 bottlenecks, or of 2, 2 and 3 basic blocks: image [batch, 3, 64, 64] to 20 logits."""
    return _classifier(ResNet((3, 3, 2), 8, True) if bottleneck else ResNet((2, 2, 3), 16, False))


def mobilenet() -> Network:
    """MobileNetV2 of five stages: image [batch, 3, 64, 64] to 20 logits."""
    return _classifier(MobileNetV2())


def efficientnet() -> Network:
    """EfficientNet of four stages with squeeze-and-excitation: image [batch, 3, 64, 64] to 20 logits."""
    return _classifier(EfficientNet())


def _classifier(module: nn.Module) -> Network:
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    return Network(module, (torch.randn(2, 3, 64, 64),), ("image",), ("logits",), axes)


class _Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class _BasicBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Stem of stride 4, stages whose first block changes channels (and, from the second stage on, halves the image)."""

    def __init__(self, stages: tuple[int, ...], width: int, bottleneck: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        channels, expansion = width, 4 if bottleneck else 1
        for stage, count in enumerate(stages):
            inner, stride = width * 2**stage, 1 if stage == 0 else 2
            for index in range(count):
                downsample = None
                if index == 0 and (stride != 1 or channels != inner * expansion):
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, inner * expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(inner * expansion),
                    )
                kind = _Bottleneck if bottleneck else _BasicBlock
                blocks.append(kind(channels, inner, stride if index == 0 else 1, downsample))
                channels = inner * expansion
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, 20)

    def forward(self, image: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


class _ConvNormActivation(nn.Sequential):
    def __init__(
        self, before: int, after: int, kernel: int, stride: int, groups: int, activation: type[nn.Module] | None
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(after),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class _InvertedResidual(nn.Module):
    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and before == after
        hidden = before * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_ConvNormActivation(before, hidden, 1, 1, 1, nn.ReLU6))
        layers.append(_ConvNormActivation(hidden, hidden, 3, stride, hidden, nn.ReLU6))
        layers += [nn.Conv2d(hidden, after, 1, bias=False), nn.BatchNorm2d(after)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """Stages (expansion, channels, blocks, stride): the first block of each has no shortcut."""

    STAGES = ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 3, 2), (6, 24, 3, 2), (6, 32, 2, 1))

    def __init__(self) -> None:
        super().__init__()
        channels = 16
        features: list[nn.Module] = [_ConvNormActivation(3, channels, 3, 2, 1, nn.ReLU6)]
        for expansion, after, count, stride in self.STAGES:
            for index in range(count):
                features.append(_InvertedResidual(channels, after, stride if index == 0 else 1, expansion))
                channels = after
        features.append(_ConvNormActivation(channels, 96, 1, 1, 1, nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(96, 20))

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(image), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class _SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class _MBConv(nn.Module):
    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and before == after
        hidden = before * expansion
        layers: list[nn.Module] = []
        if hidden != before:
            layers.append(_ConvNormActivation(before, hidden, 1, 1, 1, nn.SiLU))
        layers.append(_ConvNormActivation(hidden, hidden, kernel, stride, hidden, nn.SiLU))
        layers.append(_SqueezeExcitation(hidden, max(1, before // 4)))
        layers.append(_ConvNormActivation(hidden, after, 1, 1, 1, None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class EfficientNet(nn.Module):
    """Stages (expansion, channels, blocks, stride, kernel): the first block of each has no shortcut."""

    STAGES = ((1, 8, 1, 1, 3), (6, 16, 3, 2, 3), (6, 24, 3, 2, 5), (6, 32, 2, 1, 3))

    def __init__(self) -> None:
        super().__init__()
        channels = 16
        features: list[nn.Module] = [_ConvNormActivation(3, channels, 3, 2, 1, nn.SiLU)]
        for expansion, after, count, stride, kernel in self.STAGES:
            for index in range(count):
                features.append(_MBConv(channels, after, kernel, stride if index == 0 else 1, expansion))
                channels = after
        features.append(_ConvNormActivation(channels, 96, 1, 1, 1, nn.SiLU))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(96, 20))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(image)), 1))
