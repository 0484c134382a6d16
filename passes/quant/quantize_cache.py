"""Keys and values that are kept between two calls as 8-bit integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.errors import InputError
from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import attention_layers
from burnish.ir.views.cache import Port
from burnish.ir.views.parameter import same_shape
from burnish.ir.walk import is_op
from burnish.passes import catalog, lossy, sites
from burnish.passes.base import Outcome
from burnish.passes.cache_scales import Peaks
from burnish.passes.lossy import Context, Edit, LossyPass, Savings
from burnish.passes.reducers import Reducer
from burnish.passes.sites import Site

_OPSET = 13
_LARGEST = 127


@dataclass(frozen=True)
class QuantizeCache(LossyPass):
    """Take and give the caches of attention as int8, a quarter of the bytes; whoever calls the model has to know of it.

    Inputs and outputs keep their names and shapes. A number of a cache is its integer times a fixed scale, which comes
    from samples; new keys and values are rounded before they are used, so that a text gives the same numbers at once
    and step by step.

    Attributes:
        scales: one for each `channel` of each head, or one for each `head`.
    """

    scales: Literal["channel", "head"] = "channel"
    order: ClassVar[int] = 40
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")

    @property
    def decided(self) -> bool:
        return True

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds the scales, `key` and `value`, which broadcast to a cache."""
        found: dict[str, tuple[Port, Port]] = {}
        for layer in attention_layers(model):
            if isinstance(layer, Miss) or not layer.cache:
                continue
            key, value = layer.cache.key, layer.cache.value
            reason = _refusal(model, key) or _refusal(model, value)
            if reason is not None or key is None or value is None:
                outcome.skip(layer.anchor, str(reason))
            else:
                found[_join(key).name or ""] = (key, value)
        places = {str(_join(one).outputs[0].name): one for pair in found.values() for one in pair}
        if not places:
            return []
        observer = context.observe(model)
        seen = observer.observe(
            {name: Site(_join(one).outputs[0]) for name, one in places.items()},
            {name: Peaks(self._axes(one)) for name, one in places.items()},
            context.samples,
        )
        observer.close()
        units = {name: _unit(one) for name, one in seen.items()}
        return [self._edit(name, pair, units) for name, pair in found.items()]

    def _axes(self, one: Port) -> tuple[int, ...]:
        kept = ("heads", "size") if self.scales == "channel" else ("heads",)
        return tuple(index for index, name in enumerate(one.present_axes) if name in kept)

    def _edit(self, name: str, pair: tuple[Port, Port], units: Mapping[str, np.ndarray]) -> Edit:
        joins = [_join(one) for one in pair]
        own = [units[str(join.outputs[0].name)] for join in joins]
        count = sum(unit.size for unit in own)
        return Edit(
            catalog.spec(self),
            name,
            f"int8 for each {self.scales}",
            frozenset(str(join.name) for join in joins),
            Savings(-2 * count - 4, -8 * count - 10, 0),
            dict(zip(("key", "value"), own, strict=True)),
            tuple(str(join.name) for join in joins),
        )

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes = {node.name: node for node in model.graph}
        for one in edits:
            if not outcome.take(nodes[one.anchors[0]]):
                return
            for name, unit in zip(one.anchors, one.payload.values(), strict=True):
                _write(model, nodes[name], unit)


def _join(one: Port) -> oir.Node:
    """The node that puts new keys or values behind those that are kept."""
    node = None if one.present is None else one.present.producer()
    assert node is not None
    return node


def _refusal(model: oir.Model, one: Port | None) -> str | None:
    """Why a port cannot be of integers, in plain words; None when it can."""
    if one is None or one.past is None or one.present is None:
        return "its cache is not both taken and given"
    if model.opset_imports.get("", 1) < _OPSET:
        return f"opset {model.opset_imports.get('', 1)} quantizes whole tensors only; `--opset` raises it"
    if one.past.dtype != oir.DataType.FLOAT:
        return "its cache is not float32"
    join = one.present.producer()
    if not is_op(join, "Concat") or join is None or len(join.inputs) != 2 or join.inputs[0] is not one.past:
        return f"its cache is joined by a {join.op_type if join is not None else 'model input'}, not by one Concat"
    if [node for node in match.readers(one.past) if node is not join] or one.past.is_graph_output():
        return "something else reads its cache, too"
    if "heads" not in one.present_axes or "size" not in one.present_axes:
        return "the heads of its cache are not an axis of their own"
    return sites.refusal(model, one.present)


def _unit(seen: Reducer) -> np.ndarray:
    assert isinstance(seen, Peaks) and seen.peak is not None
    if not np.isfinite(seen.peak).all():
        raise InputError("a cache holds NaN or infinity")
    return np.where(seen.peak > 0, seen.peak / _LARGEST, 1.0).astype(np.float32)


def _write(model: oir.Model, join: oir.Node, unit: np.ndarray) -> None:
    """Keep integers: what is new is rounded before it is joined, and what was joined is multiplied where it is read."""
    past, new = join.inputs
    assert past is not None and new is not None
    present = join.outputs[0]
    stem, byte = str(present.name), oir.DataType.INT8
    one = edit.add_constant(model, f"{stem}_one", np.ones((), np.float32))
    zero = edit.add_constant(model, f"{stem}_zero", np.zeros((), np.int8))
    inverse = edit.add_constant(model, f"{stem}_inverse", (1 / unit.astype(np.float64)).astype(np.float32))
    divided = edit.make("Mul", [new, inverse], like=join)
    rounded = edit.make("QuantizeLinear", [divided.outputs[0], one, zero], like=join)
    same_shape(divided, new)
    same_shape(rounded, new).type = oir.TensorType(byte)
    edit.insert_before(join, [divided, rounded])
    readers = [(use.node, use.idx) for use in present.uses() if not is_op(use.node, "Shape")]
    number = edit.make("Cast", [present], {"to": oir.DataType.FLOAT.value}, like=join)
    wide = edit.make("Mul", [number.outputs[0], edit.add_constant(model, f"{stem}_unit", unit)], like=join)
    for node in (number, wide):
        same_shape(node, present)
    model.graph.insert_after(join, [number, wide])
    for node, index in readers:
        node.replace_input_with(index, wide.outputs[0])
    join.replace_input_with(1, rounded.outputs[0])
    for value in (past, present):
        lossy.set_unit(value, byte, unit)
