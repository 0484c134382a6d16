"""Small convolutional networks for what is measured: random weights from a seed, a dynamic batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper


class _Builder:
    def __init__(self, channels: int, side: int) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last, self.channels, self.side = "image", channels, side
        self.input = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", channels, side, side])
        self.macs = 0

    def add(self, operator: str, *weights: np.ndarray, **attributes: object) -> None:
        name = f"{operator.lower()}{len(self.nodes)}"
        names = [f"{name}.{index}" for index in range(len(weights))]
        self.weights += [onnx.numpy_helper.from_array(w, n) for w, n in zip(weights, names, strict=True)]
        self.nodes.append(helper.make_node(operator, [self.last, *names], [name], name=name, **attributes))
        self.last = name

    def conv(self, channels: int, kernel: int = 3, group: int = 1) -> None:
        shape = (channels, self.channels // group, kernel, kernel)
        weight = self.rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        self.add("Conv", weight, kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4, group=group)
        self.macs += int(np.prod(shape)) * self.side**2
        self.channels = channels

    def norm(self) -> None:
        size = self.channels
        self.add("BatchNormalization", *(np.abs(self.rng.normal(1, 0.1, (4, size))).astype(np.float32)))

    def pool(self) -> None:
        self.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
        self.side //= 2

    def save(self, path: Path, shape: list[str | int]) -> int:
        """Write the file; returns the multiply-adds of one image."""
        output = helper.make_tensor_value_info(self.last, onnx.TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "network", [self.input], [output], self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return self.macs


def simple_net(path: Path) -> int:
    """Convolutions, norms and activations as in SimpleNet, with pools between, on images of 16 x 16."""
    net = _Builder(3, 16)
    for width in (16, 32, None, 32, 64, None, 64, 64, None, 64):
        if width is None:
            net.pool()
        else:
            net.conv(width)
            net.norm()
            net.add("Relu")
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.add("Gemm", net.rng.normal(0, 0.1, (64, 10)).astype(np.float32), np.zeros(10, np.float32))
    net.macs += 640
    return net.save(path, ["batch", 10])


def dense_and_depthwise(path: Path) -> int:
    """A dense 3 x 3 convolution, `conv0`, and a depthwise one, `conv1`."""
    net = _Builder(64, 14)  # short enough to run between two interruptions of a busy machine
    net.conv(64)
    net.conv(64, group=64)
    return net.save(path, ["batch", 64, 14, 14])
