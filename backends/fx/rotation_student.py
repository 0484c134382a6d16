"""The model that learns rotations: its graph, and its weights as functions of rotations and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import onnx_ir as oir
import torch
from torch import Tensor, fx

from burnish.backends.fx import bridge
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.operators.quantize import nearest
from burnish.backends.fx.straight_through import through_rounding
from burnish.ir import edit, weights
from burnish.ir.errors import InputError
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.norm import norms
from burnish.ir.views.parameter import Parameter, same_shape
from burnish.ir.views.projection import Projection
from burnish.passes import learned, online, scaling, simulated, turning
from burnish.passes.simulated import Bits


@dataclass
class Space:
    """What is learned, as tensors: the parts of `burnish.passes.learned.Learned`."""

    turn: Tensor
    values: list[Tensor]
    norm_logs: list[Tensor]
    value_logs: list[Tensor]
    score_logs: list[Tensor | None]
    gated_logs: list[Tensor]

    def scales(self) -> list[Tensor]:
        """The logarithms of scales that are possible."""
        scores = (one for one in self.score_logs if one is not None)
        return [*self.norm_logs, *self.value_logs, *scores, *self.gated_logs]


LEFT = 0.35
"""How much of what rounding weights to nearest changes is left: GPTQ leaves about a ninth of its energy on SmolLM2."""

Step = Callable[[Tensor, Tensor | None, Space], tuple[Tensor, Tensor | None]]
"""Makes of a weight [out, in] and a bias [out] those behind a rotation or a scale."""


@dataclass
class Piece:
    """One layer with few bits.

    Attributes:
        path, bias_path: of its weight and its bias in the module.
        shape, transposed: of the weight as it is stored, and whether that is [out, in].
        weight, bias: before all rotations and scales, [out, in] and [out].
        steps: what happens to them, in order.
        last: the factors of the Kronecker product that its input is multiplied with when the model runs, as
            `burnish.passes.online.pair` gives them; None for nothing.
    """

    path: str
    bias_path: str | None
    shape: tuple[int, ...]
    transposed: bool
    weight: Tensor
    bias: Tensor | None
    steps: list[Step]
    last: tuple[Tensor, Tensor] | None


@dataclass
class Student:
    """A torch module that computes what the model does with few bits, given rotations and scales.

    Attributes:
        module: of the graph.
        pieces: the layers with few bits.
        turn_paths, back_paths: the parameters that hold the rotation of the stream and its transpose.
        constants: other constants of the stream, with what makes them.
        gain_paths: those that hold the gains of norms.
        bits: of weights, which are moved by `LEFT` of the way to where rounding takes them; 0 for all.
    """

    module: fx.GraphModule
    pieces: list[Piece]
    turn_paths: list[str]
    back_paths: list[str]
    constants: dict[str, Callable[[Space], Tensor]]
    gain_paths: list[str]
    bits: int

    def weights(self, space: Space) -> dict[str, Tensor]:
        """The parameters of the module for rotations and scales; each is a leaf that takes gradients."""
        with torch.no_grad():
            made = {path: one for paths, make in self._makers() for path, one in zip(paths, make(space), strict=True)}
        return {path: one.detach().requires_grad_() for path, one in made.items()}

    def pull_back(self, space: Space, weights: Mapping[str, Tensor]) -> None:
        """Add the gradients of `weights`, which are dropped, to those of rotations and scales.

        One layer after the other is computed again for it: what lies between is several times as large as the model.
        """
        for paths, make in self._makers():
            made = zip(make(space), (weights[path] for path in paths), strict=True)
            pairs = [(one, leaf.grad) for one, leaf in made if leaf.grad is not None and one.requires_grad]
            if pairs:
                torch.autograd.backward([one for one, _ in pairs], [grad for _, grad in pairs])
            for path in paths:
                weights[path].grad = None

    def _makers(self) -> Iterator[tuple[list[str], Callable[[Space], list[Tensor]]]]:
        """Paths of parameters, and what makes them of rotations and scales."""
        yield self.turn_paths, lambda space: [space.turn] * len(self.turn_paths)
        yield self.back_paths, lambda space: [space.turn.T] * len(self.back_paths)
        yield list(self.constants), lambda space: [make(space) for make in self.constants.values()]
        yield self.gain_paths, lambda space: [torch.exp(-logs) for logs in space.norm_logs]
        for piece in self.pieces:
            paths = [piece.path] if piece.bias_path is None else [piece.path, piece.bias_path]
            yield paths, partial(self._made, piece)

    def _made(self, piece: Piece, space: Space) -> list[Tensor]:
        weight, bias = piece.weight, piece.bias
        for step in piece.steps:
            weight, bias = step(weight, bias, space)
        if piece.last is not None:
            first, second = piece.last
            weight = torch.einsum("oab,ac,bd->ocd", weight.unflatten(1, (len(first), -1)), first, second).flatten(1)
        if self.bits:
            weight = weight + LEFT * (rounded(weight, self.bits) - weight)
        stored = (weight if piece.transposed else weight.T).reshape(piece.shape)
        return [stored] if bias is None or piece.bias_path is None else [stored, bias]


@dataclass
class _Ends:
    """What a rotation does at the ends of a stream that keep their bits, by names of initializers.

    Attributes:
        behind, before: those that hold the rotation, and its transpose.
        turned: constants with what makes them of their own numbers.
    """

    behind: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    turned: dict[str, Callable[[Space], Tensor]] = field(default_factory=dict)

    def add(self, parameter: Parameter, axis: int, node: oir.Node) -> None:
        """A constant with the features of the stream along an axis."""
        name = str(parameter.source.name)
        if parameter.steps or name in self.turned:
            raise InputError("a constant of the residual stream is not stored as it is read", place=str(node.name))
        own = held(parameter.read()).movedim(axis, -1)
        self.turned[name] = lambda space: (own @ space.turn).movedim(-1, axis)


def held(array: np.ndarray) -> Tensor:
    """A copy in float32, on torch's default device."""
    return torch.tensor(array, dtype=torch.float32)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight [out, in] on a symmetric grid of each output; gradients pass straight through."""
    high = 2.0 ** (bits - 1) - 1
    scale = (weight.abs().amax(1, keepdim=True) / high).clamp_min(1e-12)
    return nearest(weight / scale) * scale


def make_student(model: oir.Model, bits: Bits, *, hadamard: bool) -> Student:
    """The student of a model in normal form, which is not changed; on torch's default device.

    Raises:
        InputError: the model's stream cannot be rotated, or an end of it is none that can be learned with.
    """
    graph = model.clone()
    turning.rotate(graph, learned.stream_of(graph), np.eye(learned.stream_of(graph).width), untie=False)
    for norm in learned.scaled_norms(graph):
        scaling.scale_norm(graph, norm, np.zeros(learned.stream_of(graph).width))
    weights.forget_unrounded(graph)
    few = simulated.quantized(graph)
    steps: dict[oir.Node, list[Step]] = {node: [] for node in few}
    ends = _ends(graph, steps)
    _heads(graph, steps)
    _gates(graph, steps)
    gains = _norms(graph, steps)
    raw = {node: layer for node in few if (layer := find_linear(node)) is not None}
    before = {node: (_single(layer.weight()), layer.bias()) for node, layer in raw.items()}
    simulated.simulate(graph, replace(bits, weights=0), hadamard=hadamard)
    weights.forget_unrounded(graph)
    module = to_graph_module(graph)
    through_rounding(module, graph.opset_imports[""])
    module.requires_grad_(False).to(torch.get_default_device()).recompile()
    paths = {origin.name: path for path, origin in bridge.bridge_of(module).weights.items()}
    pieces = []
    for node in few:
        layer = find_linear(node)
        assert layer is not None and layer.parameter is not None
        weight, bias = before[node]
        pieces.append(_piece(layer, paths, weight, bias, steps[node]))
        module.get_parameter(pieces[-1].path).data = torch.empty(0)  # `Student.weights` gives another
    return Student(
        module,
        pieces,
        [paths[name] for name in ends.behind],
        [paths[name] for name in ends.before],
        {paths[name]: make for name, make in ends.turned.items()},
        [paths[name] for name in gains],
        bits.weights,
    )


def _single(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)


def _piece(
    layer: Linear, paths: dict[str, str], weight: np.ndarray, bias: np.ndarray | None, steps: list[Step]
) -> Piece:
    parameter = layer.parameter
    assert parameter is not None
    if parameter.steps or parameter.source.name not in paths:
        raise InputError("a weight is not stored as it is read", place=str(layer.node.name))
    now, last = layer.weight(), None
    if not np.array_equal(_single(now), weight):  # its input is multiplied by a Hadamard matrix when it runs
        first, second = (held(one) for one in online.pair(layer.in_features))
        last = first, second
    bias_path = None
    if layer.bias_parameter is not None:
        bias_path = paths.get(str(layer.bias_parameter.source.name))
        if bias_path is None:
            raise InputError("a bias is not stored as it is read", place=str(layer.node.name))
    return Piece(
        paths[parameter.source.name],
        bias_path,
        tuple(parameter.shape),
        layer.stored_transposed,
        held(weight),
        None if bias is None else held(bias),
        list(steps),
        last,
    )


def _ends(graph: oir.Model, steps: dict[oir.Node, list[Step]]) -> _Ends:
    """Let the ends of the stream that are no layers with few bits be followed or led by its rotation."""
    stream = learned.stream_of(graph)
    ends = _Ends()
    for reader in stream.readers:
        if reader.linear.node in steps:
            steps[reader.linear.node].append(lambda w, b, s: (w @ s.turn, b))
    eye, dtype = np.eye(stream.width), oir.DataType.FLOAT
    for writer in stream.writers:
        if writer.node in steps:
            steps[writer.node].append(lambda w, b, s: (s.turn.T @ w, None if b is None else b @ s.turn))
        elif isinstance(writer, Linear):
            ends.behind.append(_behind(graph, writer.output, eye, dtype))
        else:
            for parameter in (writer.parameter, writer.bias_parameter):
                if parameter is not None:
                    ends.add(parameter, 0, writer.node)
    for one in stream.constants:
        if one.axis == -1 and one.node.op_type == "Gather":
            ends.behind.append(_behind(graph, one.node.outputs[0], eye, dtype))
        elif one.axis is None:
            raise InputError("a number is added to all of the residual stream", place=str(one.node.name))
        else:
            ends.add(one.parameter, one.axis, one.node)
    for reader in stream.readers:
        if reader.linear.node not in steps:
            node = reader.linear.node
            stored = edit.add_rounded(graph, "turned_back", eye, dtype)
            product = edit.make("MatMul", [node.inputs[0], stored], like=node)
            edit.insert_before(node, [product])
            node.replace_input_with(0, same_shape(product, node.inputs[0]))  # type: ignore[arg-type]
            ends.before.append(str(stored.name))
    return ends


def _behind(graph: oir.Model, value: oir.Value, matrix: np.ndarray, dtype: oir.DataType) -> str:
    node, uses = value.producer(), list(value.uses())
    assert node is not None and node.graph is not None
    stored = edit.add_rounded(graph, "turned", matrix, dtype)
    product = edit.make("MatMul", [value, stored], like=node)
    node.graph.insert_after(node, [product])
    for use in uses:
        use.node.replace_input_with(use.idx, same_shape(product, value))
    return str(stored.name)


def _rows(part: Projection, change: Callable[[Tensor, Space], Tensor]) -> Step:
    """A step on the rows of one projection, as [heads, size, in], and on its bias, as [heads, size, 1]."""
    places, heads, size = torch.tensor(part.places.reshape(-1)), part.heads, part.size  # not the graph

    def step(weight: Tensor, bias: Tensor | None, space: Space) -> tuple[Tensor, Tensor | None]:
        def at(x: Tensor) -> Tensor:
            own = change(x[places].reshape(heads, size, -1), space)
            return x.index_copy(0, places, own.reshape(len(places), *x.shape[1:]))

        return at(weight), None if bias is None else at(bias)

    return step


def _columns(part: Projection, change: Callable[[Tensor, Space], Tensor]) -> Step:
    """A step on the columns of one projection, as [heads, size, out]."""
    places, heads, size = torch.tensor(part.places.reshape(-1)), part.heads, part.size

    def step(weight: Tensor, bias: Tensor | None, space: Space) -> tuple[Tensor, Tensor | None]:
        own = change(weight.T[places].reshape(heads, size, -1), space)
        return weight.T.index_copy(0, places, own.reshape(len(places), -1)).T, bias

    return step


def _heads(graph: oir.Model, steps: dict[oir.Node, list[Step]]) -> None:
    for number, layer in enumerate(learned.attention_of(graph)):
        query, key, value, output = layer.projections
        repeats = layer.heads // layer.kv_heads
        assert key is not None and value is not None

        def wide(x: Tensor, repeats: int = repeats) -> Tensor:
            return x.repeat_interleave(repeats, 0)

        def values(x: Tensor, s: Space, n: int = number) -> Tensor:
            return s.values[n].transpose(1, 2) @ x / torch.exp(s.value_logs[n])[..., None]

        def outputs(x: Tensor, s: Space, n: int = number, wide: Callable[[Tensor], Tensor] = wide) -> Tensor:
            return wide(s.values[n].transpose(1, 2)) @ x * wide(torch.exp(s.value_logs[n]))[..., None]

        def queries(x: Tensor, s: Space, n: int = number, wide: Callable[[Tensor], Tensor] = wide) -> Tensor:
            return x * wide(_scores(s, n))[..., None]

        def keys(x: Tensor, s: Space, n: int = number) -> Tensor:
            return x / _scores(s, n)[..., None]

        for part, step in (
            (value, _rows(value, values)),
            (output, _columns(output, outputs)),
            (query, _rows(query, queries)),
            (key, _rows(key, keys)),
        ):
            node = part.holder
            if node not in steps:
                raise InputError("a layer of an attention keeps all its bits", place=str(node.name))
            steps[node].append(step)


def _scores(space: Space, number: int) -> Tensor:
    logs = space.score_logs[number]
    return torch.exp(logs) if logs is not None else torch.ones_like(space.value_logs[number][:, :1])


def _gates(graph: oir.Model, steps: dict[oir.Node, list[Step]]) -> None:
    for number, one in enumerate(learned.gated_of(graph)):
        rows = torch.tensor(one.rows)

        def up(
            w: Tensor, b: Tensor | None, s: Space, n: int = number, rows: Tensor = rows
        ) -> tuple[Tensor, Tensor | None]:
            scale = torch.ones(len(w)).index_copy(0, rows, torch.exp(-s.gated_logs[n]))
            return w * scale[:, None], None if b is None else b * scale

        def down(w: Tensor, b: Tensor | None, s: Space, n: int = number) -> tuple[Tensor, Tensor | None]:
            return w * torch.exp(s.gated_logs[n]), b

        for node, step in ((one.up.node, up), *((layer.node, down) for layer in one.downs)):
            if node in steps:
                steps[node].append(step)


def _norms(graph: oir.Model, steps: dict[oir.Node, list[Step]]) -> list[str]:
    """Let readers undo the scales of norms; the names of the gains."""
    names = []
    wanted = {norm.output: number for number, norm in enumerate(learned.scaled_norms(graph))}
    for norm in norms(graph):
        if norm.output in wanted:
            assert norm.scale is not None
            names.append(str(norm.scale.source.name))
            readers = scaling.norm_readers(norm)
            assert not isinstance(readers, str)
            for layer in readers:
                steps[layer.node].append(
                    lambda w, b, s, n=wanted[norm.output]: (w * torch.exp(s.norm_logs[n]), b)  # type: ignore[misc]
                )
    return names
