"""The residual stream as one space: every value that carries it, what writes it, and what reads it.

A rotation of the features of a stream passes through sums, products with numbers that all features share, means over
other axes, everything that moves elements, and RMS norms; through layer norms when it keeps the row of ones. It is
taken in by the constants of linear layers, convolutions and tables at the ends. A norm whose result is added to the
stream, gain and all, is an end too, but takes nothing in. A stream is found by following all of these from one of its
values; a node that is none of them, and that some value of the stream reaches, gives a `Miss`.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Miss
from burnish.ir.views.blocks import stacks
from burnish.ir.views.convolution import Convolution, find_convolution
from burnish.ir.views.features import features_below
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.norm import Norm, norms
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.ir.walk import is_op, walk

_SUMS = ("Add", "Sub", "Sum")
_FACTORS = ("Mul", "Div")


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer that reads the stream, or what a norm with a gain makes of it.

    Attributes:
        linear: the layer.
        norm: the norm whose gain and bias stand between; None when there is none, or its gain is one number.
    """

    linear: Linear
    norm: Norm | None


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant that is part of the stream: a table, positions that are added, a token that is put in front.

    Attributes:
        node: what reads it.
        index: as which input.
        parameter: the constant.
        axis: its axis of features, counted from the end; None when all features share its numbers.
    """

    node: oir.Node
    index: int
    parameter: Parameter
    axis: int | None


@dataclass(frozen=True, eq=False)
class Stream:
    """A stream that can be rotated.

    Attributes:
        width: its features.
        readers: the layers that read it, in the order of the graph.
        writers: the layers whose results are part of it.
        constants: constants that are part of it.
        norms: the norms on it.
        sources: norms of something else whose result is added to it: they hold no constant that could be rotated.
        values: the values that carry it, normed ones included, each with its axis of features, counted from the end.
    """

    width: int
    readers: tuple[Reader, ...]
    writers: tuple[Linear | Convolution, ...]
    constants: tuple[Constant, ...]
    norms: tuple[Norm, ...]
    sources: tuple[Norm, ...]
    values: dict[oir.Value, int]

    @property
    def keeps_ones(self) -> bool:
        """Whether only rotations that leave the row of ones as it is pass through: a layer norm takes the mean off."""
        return any(norm.kind == "layer" for norm in self.norms)


def streams(model: oir.Model, facts: Inference | None = None) -> Iterator[Stream | Miss]:
    """The residual streams of a model, and for one that cannot be rotated the node at which that shows.

    Args:
        model: the model, with the types of its values; not changed.
        facts: what is proven of the model as it is.
    """
    known = facts if facts is not None else Inference(model)
    found = [norm for norm in norms(model) if norm.kind in ("layer", "rms")]
    order = {node: index for index, node in enumerate(walk(model))}
    seen = set[oir.Value]()
    for stack in stacks(model, known).stacks:
        if stack.blocks[0].form == "cnn":
            continue
        block = next((one for one in stack.blocks if one.entry in seen), stack.blocks[0])
        if block.entry in seen:
            continue
        if any(one.adders != (None, None) for one in stack.blocks):
            adder = next(node for one in stack.blocks for node in one.adders if node is not None)
            yield Miss(adder, "it adds to the stream and normalizes it at once; `split-skip-norm` takes it apart")
            continue
        sources = set[oir.Value]()
        while True:
            reach = _Reach(known, found, order, sources)
            try:
                result: Stream | Miss = reach.stream(block.entry)
            except _Stopped as stopped:
                if stopped.ends - sources:
                    sources |= stopped.ends
                    continue
                result = Miss(stopped.node, stopped.reason)
            break
        seen |= set(reach.axes)
        yield result


def _bits(value: oir.Value) -> int:
    return value.dtype.bitwidth if value.dtype is not None else 0


class _Stopped(Exception):
    """Why a stream cannot be rotated; `ends` are results of norms that may be ends of it."""

    def __init__(self, node: oir.Node, reason: str, ends: Set[oir.Value] = frozenset()) -> None:
        super().__init__(reason)
        self.node, self.reason, self.ends = node, reason, ends


class _Reach:
    """What one stream reaches."""

    def __init__(
        self, facts: Inference, found: list[Norm], order: dict[oir.Node, int], sources: Set[oir.Value]
    ) -> None:
        self.facts, self.order, self.sources = facts, order, sources
        self.of_input: dict[oir.Value, list[Norm]] = {}
        for norm in found:
            self.of_input.setdefault(norm.input, []).append(norm)
        self.of_output = {norm.output: norm for norm in found}
        self.axes: dict[oir.Value, int] = {}
        self.pending: list[oir.Value] = []
        self.norms: dict[oir.Value, Norm] = {}
        self.writers: dict[oir.Node, Linear | Convolution] = {}
        self.readers: dict[oir.Node, Linear] = {}
        self.constants: dict[tuple[oir.Node, int], Constant] = {}

    def stream(self, seed: oir.Value) -> Stream:
        shape = self.facts.shape(seed)
        node = seed.producer()
        if node is None:
            raise _Stopped(match.consumers(seed)[0], f"the stream begins as an input or a constant, `{seed.name}`")
        axis = self._first_axis(seed)
        width = shape[axis] if shape and axis is not None else None
        if axis is None or not isinstance(width, int):
            raise _Stopped(node, "no layer or norm of a known width reads the stream")
        self.width = width
        self._enter(seed, axis, node)
        while self.pending:
            value = self.pending.pop()
            self._up(value, self.axes[value])
            self._down(value, self.axes[value])
        gains = self._gains()
        for value in self.axes:
            maker = value.producer()
            assert maker is not None
            if value.is_graph_output():
                raise _Stopped(maker, f"the stream itself is an output, `{value.name}`")
            if is_op(maker, "Cast") and _bits(value) < _bits(seed):
                kind = str(value.dtype).lower()
                raise _Stopped(maker, f"it rounds the stream to {kind}, and would round other numbers of a rotated one")
        readers = sorted(self.readers.values(), key=lambda one: self.order[one.node])
        for layer in (*readers, *self.writers.values()):
            if layer.read_only is not None:
                raise _Stopped(layer.node, layer.read_only)
        return Stream(
            self.width,
            tuple(Reader(one, gains[one.input]) for one in readers),
            tuple(sorted(self.writers.values(), key=lambda one: self.order[one.node])),
            tuple(self.constants.values()),
            tuple(sorted(self.norms.values(), key=lambda one: self.order[one.nodes[0]])),
            tuple(self.of_output[one] for one in self.axes if one in self.sources),
            self.axes,
        )

    def _first_axis(self, seed: oir.Value) -> int | None:
        """The axis of features of a value of the stream: that which its norms, or the layers that read it, run over."""
        pending, seen = [seed], {seed}
        while pending:
            value = pending.pop(0)
            if (
                value in self.of_input
                or value in self.of_output
                or any((one := find_linear(node)) is not None and one.input is value for node in match.consumers(value))
            ):
                return -1 if len(self.facts.shape(value) or ()) == len(self.facts.shape(seed) or ()) else None
            for node in match.consumers(value):
                if is_op(node, *_SUMS, "Identity", "Cast") and node.outputs[0] not in seen:
                    seen.add(node.outputs[0])
                    pending.append(node.outputs[0])
        return None

    def _enter(self, value: oir.Value, axis: int, node: oir.Node) -> None:
        known = self.axes.get(value)
        if known == axis:
            return
        shape = self.facts.shape(value)
        if known is not None or shape is None or len(shape) < -axis or shape[axis] != self.width:
            raise _Stopped(node, "it is not known to keep the features of the stream together")
        if value.producer() is None:
            raise _Stopped(node, f"the stream begins as an input, `{value.name}`")
        self.axes[value] = axis
        self.pending.append(value)

    def _operand(self, node: oir.Node, index: int, axis: int) -> None:
        """An input of a node that carries the stream with the features on `axis`."""
        value = node.inputs[index]
        assert value is not None
        parameter = find_parameter(value)
        if parameter is None:
            self._enter(value, axis, node)
            return
        if parameter.quantized or parameter.dtype is None or not parameter.dtype.is_floating_point():
            raise _Stopped(node, "a constant that is part of the stream is quantized")
        wide = len(parameter.shape) >= -axis and parameter.shape[axis] != 1
        if wide and parameter.shape[axis] != self.width:
            raise _Stopped(node, "it is not known to keep the features of the stream together")
        self.constants[node, index] = Constant(node, index, parameter, axis if wide else None)

    def _up(self, value: oir.Value, axis: int) -> None:
        node = value.producer()
        assert node is not None
        norm = self.of_output.get(value)
        if norm is not None:
            if value not in self.sources:
                self._norm(norm, axis)
            return
        linear = find_linear(node)
        if linear is not None and linear.output is value:
            if axis != -1:
                raise _Stopped(node, "the features of its result are not on the axis of the stream's")
            self.writers[linear.node] = linear
            return
        convolution = find_convolution(node)
        if convolution is not None:
            if axis != 1 - len(self.facts.shape(value) or ()) or convolution.transposed or convolution.groups != 1:
                raise _Stopped(node, "its channels are in groups, or no features of the stream")
            self.writers[node] = convolution
            return
        for index, above in self._above(node, value, axis):
            self._operand(node, index, above)

    def _norm(self, norm: Norm, axis: int) -> None:
        node = norm.nodes[0]
        if norm.axes != (-1,) or axis != -1:
            raise _Stopped(node, "it does not normalize the features of the stream alone")
        if norm.read_only or norm.outside_reader is not None or norm.inner_output is not None:
            raise _Stopped(node, norm.read_only or "an inner value of it is read elsewhere")
        if norm.output in self.sources:
            raise _Stopped(norm.nodes[-1], "its result, gain and all, is added to the stream that it norms (post-norm)")
        self.norms[norm.output] = norm
        self._enter(norm.input, axis, node)
        self._enter(norm.output, axis, node)

    def _down(self, value: oir.Value, axis: int) -> None:
        own = self.of_input.get(value, [])
        for use in value.uses():
            node = use.node
            if is_op(node, "Shape", "Size"):
                continue
            norm = next((one for one in own if node in one.nodes), None)
            if norm is not None:
                self._norm(norm, axis)
                continue
            linear = find_linear(node)
            if linear is not None and linear.node is node and use.idx == 0:
                if axis != (-1 if linear.input_axis == -1 else -2):
                    raise _Stopped(node, "it does not multiply the features of the stream")
                self.readers[node] = linear
                continue
            for out in self._outputs(node, use.idx, value, axis):
                self._enter(out[0], out[1], node)

    def _feature_free(self, value: oir.Value | None, axis: int) -> bool:
        """Whether all features share the numbers of a factor."""
        shape = self.facts.shape(value)
        return shape is not None and (len(shape) < -axis or shape[axis] == 1)

    def _above(self, node: oir.Node, value: oir.Value, axis: int) -> list[tuple[int, int]]:
        """Which inputs of a node carry the stream when its output does, each with its axis of features."""
        if is_op(node, *_SUMS):
            return [(index, axis) for index in range(len(node.inputs))]
        if is_op(node, *_FACTORS):
            carrying = [index for index, one in enumerate(node.inputs) if not self._feature_free(one, axis)]
            constant = any(find_parameter(node.inputs[index]) is not None for index in carrying)
            if len(carrying) != 1 or (node.op_type == "Div" and carrying != [0]) or constant:
                raise _Stopped(node, "it multiplies each feature of the stream by a number of its own")
            return [(carrying[0], axis)]
        if is_op(node, "Concat") and len(node.inputs) > 1:
            if match.attribute(node, "axis", 0) in (axis, axis + self._rank(value)):
                raise _Stopped(node, "it joins the features of the stream with others")
            return [(index, axis) for index in range(len(node.inputs))]
        source = match.input_of(node, 0)
        shape = self.facts.shape(source)
        if source is None or shape is None:
            raise _Stopped(node, f"{node.op_type} is not known to keep a rotation of the stream")
        for above in range(-len(shape), 0):
            if shape[above] == self.width and features_below(node, source, value, above, self.facts) == axis:
                return [(0, above)]
        raise _Stopped(node, f"{node.op_type} computes part of the stream, which no rotation passes through")

    def _outputs(self, node: oir.Node, index: int, value: oir.Value, axis: int) -> list[tuple[oir.Value, int]]:
        """What of a node's outputs carries the stream when one of its inputs does."""
        if is_op(node, *_SUMS, *_FACTORS) or (is_op(node, "Concat") and len(node.inputs) > 1):
            return [(node.outputs[0], axis)]
        below = features_below(node, value, node.outputs[0], axis, self.facts) if index == 0 else None
        if below is None:
            raise _Stopped(node, f"{node.op_type} reads the stream, and no rotation passes through it")
        return [(out, below) for out in (node.outputs if is_op(node, "Split") else node.outputs[:1])]

    def _rank(self, value: oir.Value | None) -> int:
        return len(self.facts.shape(value) or ())

    def _gains(self) -> dict[oir.Value, Norm | None]:
        """For each value the norm whose gain stands between it and the stream."""
        found: dict[oir.Value, Norm | None] = {}
        ends = set[oir.Value]()
        for value in sorted(self.axes, key=lambda one: self.order[one.producer()]):  # type: ignore[index]
            node = value.producer()
            assert node is not None
            above = [one for one in self._carriers(node, value) if one is not None and one in self.axes]
            behind = [gain for one in above if (gain := found[one]) is not None]
            if behind and (value in self.norms or is_op(node, *_SUMS, "Concat")):
                ends |= {one.output for one in behind}
            norm = self.norms.get(value)
            if norm is None:
                found[value] = behind[0] if behind else None
            else:
                found[value] = None if _is_plain(norm) else norm
        if ends:
            last = self.norms[min(ends, key=lambda one: self.order[one.producer()])].nodes[-1]  # type: ignore[index]
            raise _Stopped(last, "its gain stands between the norm and a sum", ends)
        return found

    def _carriers(self, node: oir.Node, value: oir.Value) -> list[oir.Value | None]:
        if value in self.norms:
            return [self.norms[value].input]
        ends = value in self.sources or node in self.writers or find_linear(node) is not None
        return [] if ends else list(node.inputs)


def _is_plain(norm: Norm) -> bool:
    """Whether a norm multiplies all features by one number and adds nothing."""
    gain = norm.scale.read() if norm.scale is not None else np.ones(1)
    return bool((gain == gain.reshape(-1)[0]).all()) and (norm.bias is None or not norm.bias.read().any())
