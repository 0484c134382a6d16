"""What a model would compute with few bits for weights, activations and cache, simulated in floating point.

No runtime has kernels for 4-bit activations on a CPU: what is made here is as slow as the original, or slower, and says
only what would be lost. Weights are rounded on a symmetric grid of each output. Activations are rounded when the model
runs, on a grid with a zero point for each token (and for each head of keys and values), fitted to that token alone:

    s = (high - low) / (2^bits - 1),    y = (clip(round(x / s) + z, 0, 2^bits - 1) - z) s,    z = round(-low / s)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.linear import Linear, find_linear, linears
from burnish.ir.views.parameter import same_shape
from burnish.ir.views.projection import Projection
from burnish.ir.views.stream import Stream, streams
from burnish.passes import grids, online
from burnish.passes.weight_sites import before_heads

LABEL = "burnish.simulated"
"""The key under which a model says, among its metadata, that its bits are simulated, and which."""

_SMALLEST = 1e-8
"""The least step of a grid: that of a token of zeros."""

Round = Callable[[Linear], np.ndarray]
"""Gives the rounded weight of a layer, float64 [out, in]."""


@dataclass(frozen=True)
class Bits:
    """How many bits a simulation has for each kind of number; 0 leaves them as they are.

    Attributes:
        weights: of linear layers; not of heads and tables.
        activations: what these layers read.
        cache: keys, behind their rotary embedding, and values.
        activation_range: the share of the range of a token that its grid spans.
        cache_range: likewise for a head of keys and values of a token.
    """

    weights: int = 4
    activations: int = 4
    cache: int = 4
    activation_range: float = 1.0
    cache_range: float = 1.0


def nearest(bits: int) -> Round:
    """Rounding to the nearest number of the grid with the least squared error, output by output."""

    def made(layer: Linear) -> np.ndarray:
        weight = layer.weight()
        scales = grids.fit(weight, grids.Grid(bits), axis=0, clip="mse")
        return grids.dequantize(grids.quantize(weight, scales), scales)

    return made


def simulate(model: oir.Model, bits: Bits, *, hadamard: bool = False, rounded: Round | None = None) -> list[str]:
    """Let a model compute what it would with few bits.

    Args:
        model: with the types of its values; changed in place. What it computes is slower than before.
        bits: how many.
        hadamard: multiply what the last layers of MLPs read, and queries and keys behind their rotary embedding, by
            Hadamard matrices first, as `rotate-residual{online=true}` does.
        rounded: how weights are rounded; by default `nearest`.

    Returns:
        The names of the outputs of the layers that have few bits.

    Raises:
        InputError: the model has an attention whose keys or values are not found.
    """
    facts = Inference(model)
    attention = [one for one in attention_layers(model, facts) if isinstance(one, AttentionLayer)]
    layers = quantized(model)
    keys = {one.anchor: one.key_rotary.y for one in attention if one.key_rotary is not None}
    if hadamard:
        keys |= _put_hadamards(model, facts, attention)
    made = TokenRounding(model)
    for one in attention if bits.cache else ():
        if (key := keys.get(one.anchor)) is not None:
            made.round(key, bits.cache, bits.cache_range)
        for projected, size, columns in _projected(one, one.projections[1 if key is None else 2 : 3]):
            made.round(projected, bits.cache, bits.cache_range, size, columns=columns)
    found = [layer for node in layers if (layer := find_linear(node)) is not None]
    if bits.activations:
        for value in dict.fromkeys(layer.input for layer in found):
            own = [layer.node for layer in found if layer.input is value]
            made.round(value, bits.activations, bits.activation_range, readers=own)
    if bits.weights:
        make = rounded or nearest(bits.weights)
        for node in layers:
            layer_now = find_linear(node)
            assert layer_now is not None
            layer_now.write(model, make(layer_now), layer_now.bias())
    return [str(layer.output.name) for layer in found]


def put_hadamards(model: oir.Model) -> None:
    """Do what `simulate` does first where it is told `hadamard`; nodes of layers stay the same, with other weights."""
    facts = Inference(model)
    _put_hadamards(model, facts, [one for one in attention_layers(model, facts) if isinstance(one, AttentionLayer)])


def _put_hadamards(model: oir.Model, facts: Inference, attention: list[AttentionLayer]) -> dict[oir.Node, oir.Value]:
    """The keys as they are then, by the anchors of the attentions where that is possible."""
    turner, keys = online.Turner(model, facts), {}
    found_streams = [one for one in streams(model, facts) if isinstance(one, Stream)]
    inner = [down for stream in found_streams for down in online.inner_layers(stream, attention)]
    for one in attention:
        if online.score_refusal(one, facts) is None:
            keys[one.anchor] = turner.turn_scores(one)
    for down in inner:
        if online.input_refusal(down, facts) is None:
            turner.turn_input(down)
    return keys


def quantized(model: oir.Model) -> list[oir.Node]:
    """The nodes of the linear layers that get few bits: all but heads, what stands before them alone, and rotations.

    One whose weight holds NaN or infinity, or is held otherwise already, is none of them.
    """
    ends, before = before_heads(model)
    found = []
    for layer in linears(model):
        if layer.node in ends | before or layer.read_only is not None:
            continue
        finite = layer.parameter is not None and layer.parameter.finite
        if layer.input_axis == -1 and finite and not _is_rotation(layer):
            found.append(layer.node)
    return found


def _is_rotation(layer: Linear) -> bool:
    if layer.in_features != layer.out_features or layer.bias_parameter is not None:
        return False
    weight = layer.weight()
    return bool(np.abs(weight @ weight.T - np.eye(len(weight))).max() < 1e-5)


def _projected(
    layer: AttentionLayer, parts: Sequence[Projection | None]
) -> Iterator[tuple[oir.Value, int, np.ndarray | None]]:
    """What matrices compute keys or values of an attention, the size of a head there, and which columns are theirs.

    Booleans [out]; None where all are.
    """
    joined: dict[tuple[oir.Value, int], np.ndarray] = {}
    for one in parts:
        linear = None if one is None or one.biases else one.linear
        places = np.zeros((1, 0), int) if one is None else one.places.reshape(one.heads, one.size)
        whole = places.size and not (places[:, 0] % places.shape[1]).any() and (np.diff(places) == 1).all()
        if one is None or linear is None or not whole or linear.out_features % one.size:
            raise InputError(
                "keys or values of an attention are not found, head beside head",
                place=str(layer.anchor.name),
                hint="leave the cache its bits: 0 for `cache`",
            )
        columns = joined.setdefault((linear.output, one.size), np.zeros(linear.out_features, bool))
        columns[places] = True
    for (value, size), columns in joined.items():
        yield value, size, None if columns.all() else columns


class TokenRounding:
    """Writes the arithmetic of rounding rows by their own range into a model."""

    def __init__(self, model: oir.Model) -> None:
        self.model, self.version = model, model.opset_imports.get("", 0)
        self.held: dict[tuple[str, float], oir.Value] = {}

    def round(
        self,
        value: oir.Value,
        bits: int,
        share: float,
        size: int | None = None,
        readers: list[oir.Node] | None = None,
        columns: np.ndarray | None = None,
    ) -> None:
        """Let readers of a value (all of them, unless they are given) read it rounded, row by row of its last axis.

        `size` splits the last axis into rows of so many elements; of `columns`, only those are rounded that are True.
        """
        maker = value.producer()
        uses = [(one.node, one.idx) for one in value.uses() if one.node.op_type not in ("Shape", "Size")]
        if readers is not None:
            uses = [(node, index) for node, index in uses if node in readers and index == 0]
        nodes: list[oir.Node] = []

        def add(op: str, *inputs: oir.Value, **attributes: object) -> oir.Value:
            node = edit.make(op, inputs, attributes, like=maker or [node for node, _ in uses])
            nodes.append(node)
            node.outputs[0].type = value.type
            return node.outputs[0]

        x, whole_rows = value, list[int]()
        if size is not None:
            assert value.shape is not None
            lead, last = [0] * (len(value.shape) - 1), value.shape[-1]
            whole_rows = [*lead, last if isinstance(last, int) else -1]
            x = add("Reshape", value, self._sizes([*lead, -1, size]))
        low, high = (self._reduced(add, op, x) for op in ("ReduceMin", "ReduceMax"))
        zero, scale = self._number(0.0, value), self._number(share, value)
        low, high = add("Mul", add("Min", low, zero), scale), add("Mul", add("Max", high, zero), scale)
        levels = self._number(float(2**bits - 1), value)
        step = add("Max", add("Div", add("Sub", high, low), levels), self._number(_SMALLEST, value))
        offset = add("Round", add("Div", low, step))
        whole = add("Sub", add("Round", add("Div", x, step)), offset)
        kept = add("Min", add("Max", whole, zero), levels)
        y = add("Mul", add("Add", kept, offset), step)
        if size is not None:
            y = add("Reshape", y, self._sizes(whole_rows))
        if columns is not None:
            y = add("Where", edit.add_constant(self.model, "rounded", columns), y, value)
        same_shape(nodes[-1], value)
        edit.insert_behind(value, nodes)
        for node, index in uses:
            node.replace_input_with(index, y)

    def _reduced(self, add: Callable[..., oir.Value], op: str, x: oir.Value) -> oir.Value:
        if self.version < 18:
            return add(op, x, axes=[-1], keepdims=1)
        return add(op, x, self._sizes([-1]), keepdims=1)

    def _number(self, number: float, like: oir.Value) -> oir.Value:
        dtype = like.dtype or oir.DataType.FLOAT
        key = (dtype.name, number)
        if key not in self.held:
            self.held[key] = edit.add_rounded(self.model, "grid", np.array(number), dtype)
        return self.held[key]

    def _sizes(self, sizes: list[int]) -> oir.Value:
        key = (str(sizes), -1.0)
        if key not in self.held:
            self.held[key] = edit.add_constant(self.model, "sizes", np.array(sizes, np.int64))
        return self.held[key]
