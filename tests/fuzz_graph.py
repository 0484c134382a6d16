"""A random graph under construction, and the values in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx
from onnx import helper

T = TypeVar("T")


@dataclass(frozen=True)
class Value:
    """A float tensor of the graph and its shape, `N` being `SIZE`."""

    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)


class Graph:
    """A graph under construction.

    Args:
        random: decides everything.
        opset: of the standard operators.
        prefix: begins every name.
        outer: values of the graph around it.
    """

    def __init__(self, random: np.random.Generator, opset: int, prefix: str = "", outer: Sequence[Value] = ()) -> None:
        self.random = random
        self.opset = opset
        self.prefix = prefix
        self.values = list(outer)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.made: list[Value] = []
        self.count = 0

    def name(self) -> str:
        """A name not given before."""
        self.count += 1
        return f"{self.prefix}v{self.count}"

    def chance(self, probability: float) -> bool:
        """Whether something of this probability happens."""
        return bool(self.random.random() < probability)

    def one_of(self, items: Sequence[T]) -> T:
        """One of several, at random."""
        return items[int(self.random.integers(len(items)))]

    def value(self, rank: int | None = None, least: int = 0) -> Value | None:
        """A value of the rank asked for, recent ones more often; None when there is none."""
        fit = [v for v in self.values if v.rank >= least and rank in (None, v.rank)]
        return fit[-1 - min(int(self.random.exponential(2.0)), len(fit) - 1)] if fit else None

    def constant(self, array: np.ndarray) -> str:
        """A constant as a new or an equal initializer, or in a Constant node."""
        name = self.name()
        if self.chance(0.2):
            self.nodes.append(
                helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array, f"{name}.t"))
            )
        else:
            same = [t for t in self.weights if t.raw_data == np.ascontiguousarray(array).tobytes()]
            same = [t for t in same if list(t.dims) == list(array.shape)]
            if same and self.chance(0.5):
                return str(same[0].name)
            self.weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def floats(self, *shape: int) -> str:
        """Random weights; now and then zeros or ones, or those of before once more."""
        old = [t for t in self.weights if tuple(t.dims) == shape and t.data_type == onnx.TensorProto.FLOAT]
        if old and self.chance(0.3):
            return str(self.one_of(old).name)
        if self.chance(0.12):
            return self.constant(np.full(shape, float(self.random.integers(2)), np.float32))
        return self.constant((self.random.standard_normal(shape) * 0.7).astype(np.float32))

    def positive(self, *shape: int) -> str:
        """Random weights well above zero."""
        return self.constant(self.random.uniform(0.5, 1.5, shape).astype(np.float32))

    def integers(self, *numbers: int) -> str:
        """A vector of int64."""
        return self.constant(np.array(numbers, np.int64))

    def add(self, op: str, inputs: Sequence[str], shape: Sequence[int], **attributes: object) -> Value:
        """A node with one float output, which later nodes may read."""
        out = Value(self.name(), tuple(int(size) for size in shape))
        self.nodes.append(helper.make_node(op, list(inputs), [out.name], **attributes))
        self.values.append(out)
        self.made.append(out)
        return out

    def raw(self, op: str, inputs: Sequence[str], **attributes: object) -> str:
        """A node whose output is no float tensor; its name."""
        name = self.name()
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name
