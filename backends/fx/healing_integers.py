"""Weights that are stored as integers, trained as the numbers that are rounded to them, and put back as integers.

Each such weight gets a parameter of its numbers, which is rounded to the stored grid in every step, and each scale one
of how far it has moved, as a logarithm; zero points stay. The numbers start where the original has them, or as near to
that as rounding to the student's own integers allows, so that training begins with what the student computes.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as oir
import torch
from torch import fx

from burnish.backends.fx import bridge, straight_through
from burnish.backends.fx import healing_graph as halves
from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.healing_factors import reading
from burnish.backends.fx.healing_sites import BLOCKED, Sites, Stored, find
from burnish.backends.fx.operators.quantize import spread
from burnish.backends.fx.values import DTYPES
from burnish.backends.fx.write_back import store, values_of
from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.walk import graphs, is_op

_EDGE = 0.499
"""How far from its integer, in steps, a number may start."""
_ELSEWHERE = 0.25
"""How far a number starts that the original rounds to another integer: near the edge, the first steps would move it."""
_ALIKE = 0.5
"""The least correlation of a weight with what its integers stand for."""
_SEEN = 4096
"""Of how many numbers that is taken."""
_STRAIGHT: dict[str, Callable[..., Any]] = {
    "DynamicQuantizeLinear": straight_through.dynamic_quantize,
    "MatMulInteger": straight_through.matmul_integer,
    "ConvInteger": straight_through.conv_integer,
}


@dataclass
class _Open:
    """What is trained of a weight or a scale: the parameter, and how the graph was without it.

    Attributes:
        path: of the parameter.
        changed: nodes with their old targets, arguments and keywords.
        stepped: the moved scale, and the scale.
    """

    path: str
    changed: list[tuple[fx.Node, Any, Any, Any]] = field(default_factory=list)
    stepped: tuple[fx.Node, fx.Node] | None = None


class Integers:
    """The integers of a student, made trainable.

    Args:
        student: the model.
        module: made from it; its graph is changed.
        teacher: the original.

    Attributes:
        values: the constants of the model whose integers or scales the new parameters stand for, by their names.
        refused: why other integers stay as they are, by the nodes that read them.
    """

    def __init__(self, student: oir.Model, module: fx.GraphModule, teacher: oir.Model) -> None:
        self._module, self._bridge = module, bridge_of(module)
        self._paths = {value: path for path, value in values_of(student, self._bridge.weights).items()}
        self._nodes = {node.name: node for node in module.graph.nodes}
        self._start = next(node for node in module.graph.nodes if node.op != "placeholder")
        sites = find(student)
        self.refused, self._sums = sites.refused, sites.sums
        self._pass_gradients()
        self._scales: dict[oir.Value, _Open] = {}
        self._weights: dict[oir.Value, _Open] = {}
        self._stored = {one.value: one for one in sites.stored}
        if sites.stored:
            self._open(sites, _Originals(teacher))
        self.values = {at.path: value for table in (self._scales, self._weights) for value, at in table.items()}
        module.recompile()

    def _open(self, sites: Sites, originals: _Originals) -> None:
        for one in sites.stored:
            if not one.bias and one.scale not in self._scales and one.scale not in sites.fixed:
                self._scales[one.scale] = self._open_scale(one.scale)
            self._weights[one.value] = self._open_weight(one, originals)

    @property
    def any(self) -> bool:
        """Whether the student has integers."""
        return bool(self._stored or self.refused)

    @property
    def scales(self) -> set[oir.Value]:
        """The constants that hold scales of integers."""
        return {one.scale for one in self._stored.values()}

    def _pass_gradients(self) -> None:
        """Let gradients pass the rounding of what is computed."""
        for node in self._module.graph.nodes:
            kind = node.meta.get("onnx_op", ("", ""))[1] if node.op == "call_function" else ""
            if kind in _STRAIGHT and node.target is not operator.getitem:
                node.target = _STRAIGHT[kind]
            elif kind == "QuantizeLinear":
                node.kwargs = {**node.kwargs, "straight_through": True}

    def _open_scale(self, scale: oir.Value) -> _Open:
        path, graph = self._paths[scale], self._module.graph
        found = list(reading(self._module, [path]))
        held = self._held(scale)
        own = self._register(f"healing_scales.{len(self._scales)}", torch.zeros_like(held), True)
        with graph.inserting_before(self._start):
            before = graph.get_attr(path)
            moved = graph.call_function(straight_through.stepped, (before, graph.get_attr(own)))
        for node in found:
            node.replace_all_uses_with(moved)
        return _Open(own, stepped=(moved, before))

    def _open_weight(self, one: Stored, originals: _Originals) -> _Open:
        graph, like = self._module.graph, self._held(one.scale)
        own = self._register(
            f"healing_weights.{len(self._weights)}", torch.from_numpy(self._beginning(one, originals)).to(like), True
        )
        zeros = self._register(f"healing_zeros.{len(self._weights)}", torch.from_numpy(one.zeros()).to(like), False)
        opened = _Open(own)
        with graph.inserting_before(self._start):
            numbers = graph.get_attr(own)
            if not one.bias:
                scale = self._scales[one.scale].stepped if one.scale in self._scales else None
                at = scale[0] if scale is not None else graph.get_attr(self._paths[one.scale])
                grid = (at, graph.get_attr(zeros), one.low, one.high, one.axis, one.block)
                numbers = graph.call_function(straight_through.rounded, (numbers, *grid))
            for reader in one.readers:
                node = self._nodes[self._bridge.values[str(reader.outputs[0].name)]]
                opened.changed.append((node, node.target, node.args, node.kwargs))
                if is_op(reader, "MatMulInteger", "ConvInteger"):
                    steps = graph.call_function(straight_through.in_steps, (numbers, at, one.axis))
                    node.args = (node.args[0], steps, *node.args[2:3])
                elif is_op(reader, "DequantizeLinear"):
                    node.target, node.args, node.kwargs = straight_through.same, (numbers,), {}
                elif is_op(reader, "MatMulNBits", domain=reader.domain):
                    bias = node.args[5] if len(node.args) > 5 else None
                    node.target, node.args, node.kwargs = straight_through.product, (node.args[0], numbers, bias), {}
                else:
                    node.target, node.args, node.kwargs = straight_through.looked_up, (node.args[1], numbers), {}
        return opened

    def _beginning(self, one: Stored, originals: _Originals) -> np.ndarray:
        """The numbers to start with, which are rounded to the integers that are stored."""
        centre = _centre(one)
        wanted = None if one.bias else originals.like(centre)
        if wanted is None:
            return centre
        steps = np.abs(_spread(one.scales().astype(np.float32), one))
        apart = (wanted.astype(np.float32) - centre) / steps
        near = np.clip(apart, -_EDGE, _EDGE)
        return np.asarray(centre + steps * np.where(np.abs(apart) < 0.5, near, np.sign(apart) * _ELSEWHERE))

    def _register(self, name: str, tensor: torch.Tensor, trained: bool) -> str:
        path = bridge.attribute_path(self._module, name)
        bridge.register(self._module, path, tensor, trained)
        return path

    def close(self, trained: Collection[str]) -> set[str]:
        """Leave alone what is not trained, and scales on which a bias depends that is not trained.

        Args:
            trained: names of parameters.

        Returns:
            The names of those that are left alone after all.
        """
        kept = {bias for bias, at in self._weights.items() if at.path in trained}
        tied = {one.of_weight for one in self._sums if one.bias not in kept}
        left = {at.path for scale, at in self._scales.items() if scale in tied} & set(trained)
        for table in (self._weights, self._scales):
            for value, at in list(table.items()):
                if at.path in trained and at.path not in left:
                    continue
                for node, target, args, keywords in at.changed:
                    node.target, node.args, node.kwargs = target, args, keywords
                if at.stepped is not None:
                    at.stepped[0].replace_all_uses_with(at.stepped[1])
                owner, _, name = at.path.rpartition(".")
                delattr(self._module.get_submodule(owner), name)
                del table[value]
        return left

    def check(self, wanted: Sequence[fx.Node], trained: Collection[str]) -> None:
        """Nothing, where gradients reach what is trained.

        Raises:
            InputError: an operator on integers is in the way.
        """
        roots = [node for node in self._module.graph.nodes if node.op == "get_attr" and node.target in trained]
        between = halves.ancestors(wanted) & halves.descendants(roots)
        for node in self._module.graph.nodes:
            kind = node.meta.get("onnx_op", ("", ""))[1]
            if node in between and (kind.startswith("QLinear") or kind in BLOCKED):
                raise InputError(
                    f"`{node.meta['onnx_outputs'][0]}` is computed by {kind} on integers, and no gradient passes it",
                    place="heal",
                    hint="write it with QuantizeLinear and DequantizeLinear, or leave the layer in floating point",
                )

    def finish(self) -> None:
        """Put what scales have become into the module, as they are stored; biases have the product of their layers'."""
        with torch.no_grad():
            for scale, at in self._scales.items():
                held = self._held(scale)
                moved = straight_through.stepped(held, self._module.get_parameter(at.path))
                stored = weights.tensor_of(scale)
                assert stored is not None
                held.copy_(moved.to(DTYPES[stored.dtype]))
            for one in self._sums:
                if one.of_weight in self._scales:
                    held = self._held(one.scale)
                    held.copy_((self._held(one.of_input) * self._held(one.of_weight)).reshape(held.shape))

    def write(self, model: oir.Model) -> list[str]:
        """Put the integers into a copy of the student, after `finish`; what is the same keeps its tensor.

        Returns:
            The names of the constants that were written.
        """
        places = values_of(model, self._bridge.weights)
        found = []
        for value, at in self._weights.items():
            one = self._stored[value]
            new, old = self._levels(one, self._module.get_parameter(at.path).detach()), one.levels()
            if not np.array_equal(new, old):
                target = places[self._paths[value]]
                store(target, one.tensor(new))
                found.append(str(target.name))
        return found

    def _levels(self, one: Stored, numbers: torch.Tensor) -> np.ndarray:
        scale = self._held(one.scale).reshape(one.spread)
        if not one.bias:
            zero = torch.from_numpy(one.zeros()).to(scale)
            made = straight_through.levels(numbers, scale, zero, one.low, one.high, one.axis, one.block)
            return np.asarray(made.cpu().numpy(), np.int64)
        exact, steps = numbers.double().cpu().numpy(), _spread(scale.double().cpu().numpy(), one)
        found = np.clip(np.rint(exact / steps) + _spread(one.zeros(), one), one.low, one.high).astype(np.int64)
        same = (steps == _spread(one.scales(), one)) & (exact == _centre(one).astype(np.float32))
        return np.where(same, one.levels(), found)  # float32 holds no more than 24 bits of an integer

    def _held(self, value: oir.Value) -> torch.Tensor:
        path = self._paths[value]
        owner, _, name = path.rpartition(".")
        found: torch.Tensor = getattr(self._module.get_submodule(owner), name)
        return found.detach()


class _Originals:
    """The weights of the original, found by their numbers: a weight that was turned or scaled is another one."""

    def __init__(self, teacher: oir.Model) -> None:
        self._found: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        for graph in graphs(teacher):
            for value in graph.initializers.values():
                tensor = weights.tensor_of(value)
                if tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 1:
                    array = np.asarray(weights.constant(value))
                    for one in (array, array.T) if array.ndim == 2 else (array,):
                        self._found[one.shape].append((one, _some(one)))

    def like(self, numbers: np.ndarray) -> np.ndarray | None:
        """The weight of this shape that is most like some numbers; None where none is."""
        seen = _some(numbers)
        best, most = None, _ALIKE
        for array, other in self._found[numbers.shape]:
            size = float(np.linalg.norm(seen) * np.linalg.norm(other))
            alike = float(seen @ other) / size if size > 0 else 0.0
            if alike > most:
                best, most = array, alike
        return None if best is None or not np.isfinite(best).all() else best


def _some(array: np.ndarray) -> np.ndarray:
    return array.ravel()[:: max(1, array.size // _SEEN)].astype(np.float64)


def _centre(one: Stored) -> np.ndarray:
    """The numbers that the integers stand for: float32, of a bias float64."""
    kind = np.float64 if one.bias else np.float32
    found: np.ndarray = one.levels().astype(kind)
    np.subtract(found, _spread(one.zeros().astype(kind), one), out=found)
    np.multiply(found, _spread(one.scales().astype(kind), one), out=found)
    return found


def _spread(values: np.ndarray, one: Stored) -> np.ndarray:
    """One number for each number of a weight, or what broadcasts to it, from one for each scale."""
    like = torch.empty(one.shape, device="meta")
    return np.asarray(spread(torch.from_numpy(values), like, one.axis, one.block).numpy())
