"""Layers in numbers of 16 bits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.walk import is_op, walk
from burnish.passes import catalog, half_floats, sites
from burnish.passes.base import Outcome
from burnish.passes.layers import Layer, layers
from burnish.passes.lossy import Context, Edit, LossyPass, Undecided
from burnish.passes.reducers import Range
from burnish.passes.sites import Site

_CELLS = ("LSTM", "GRU", "RNN")
_BFLOAT16 = 13
"""The first opset whose Cast takes bfloat16."""


@dataclass(frozen=True)
class CastHalf(LossyPass):
    """Let layers, tables of rows and what lies between them compute in float16, where no number is near its limit.

    Norms, means and Softmax stay in float32, and so do inputs and outputs of the model. ONNX Runtime's CPU computes
    halves in float32: there they make a model smaller, and slower by the casts; `stored` leaves the casts out.

    Attributes:
        dtype: `bfloat16` is only for `stored`.
        stored: weights are stored in 16 bits and read as float32; nothing can overflow, and no samples are needed.
        margin: how many times larger the largest number that is seen may become before it overflows.
    """

    dtype: Literal["float16", "bfloat16"] = "float16"
    stored: bool = False
    margin: float = 8.0
    order: ClassVar[int] = 40
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")
    prepare: ClassVar[tuple[str, ...]] = ("fold-batchnorm",)

    def __post_init__(self) -> None:
        if not self.margin >= 1:
            raise InputError(f"`margin` is {self.margin}", place="cast-half", hint="give 1 or more")
        if self.dtype == "bfloat16" and not self.stored:
            raise InputError(
                "ONNX Runtime computes few operators in bfloat16", place="cast-half", hint="add `stored=True`"
            )

    @property
    def decided(self) -> bool:
        return not self.stored

    @property
    def everywhere(self) -> bool:
        return self.stored

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds the names of the nodes that were seen to stay in range, `safe`."""
        if self.stored and context.timed:
            for _, group in self._groups(model, outcome):
                outcome.skip(group[0], "stored in 16 bits it is computed as before, which saves no time")
            return []
        if self.stored:
            return [self._edit(name, group, group, []) for name, group in self._groups(model, outcome)]
        groups = dict(self._groups(model, outcome))
        safe = self._safe(model, context, [node for group in groups.values() for node in group])
        fine = [node for group in groups.values() if all(str(one.name) in safe for one in group) for node in group]
        every, found = half_floats.reach(model, fine, safe), []
        for name, group in groups.items():
            other = half_floats.held_beside(group, every)
            if all(str(node.name) in safe for node in group) and other is not None:
                outcome.skip(group[0], f"the halves would be held beside its weight, which {other.op_type} reads")
            elif all(str(node.name) in safe for node in group):
                found.append(self._edit(name, group, half_floats.reach(model, group, safe), sorted(safe)))
            else:
                outcome.skip(group[0], f"numbers there come within {self.margin:g} times of what float16 cannot hold")
        return found

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        """Every layer that becomes smaller by being stored in 16 bits."""
        if not self.stored:
            raise Undecided("what overflows is measured", hint="give samples with `--data`, or `stored=True`")
        found = []
        for name, group in self._groups(model, outcome):
            one = self._edit(name, group, group, [])
            if one.savings.bytes > 0:
                found.append(one)
            else:
                outcome.skip(group[0], "its weight is small, or others read it too")
        return found

    def _groups(self, model: oir.Model, outcome: Outcome) -> Iterator[tuple[str, tuple[oir.Node, ...]]]:
        """The nodes of each layer, and each table of rows, that could be in 16 bits; the others are skipped."""
        named = layers(model)
        found = {id(layer.node): (name, layer.nodes) for name, layer in named.items()}
        held = {id(layer.node): reason for layer in named.values() if (reason := _held(layer)) is not None}
        for node in walk(model):
            table = is_op(node, "Gather") and weights.is_constant(node.inputs[0]) and half_floats.floats(node) == [0]
            if id(node) not in found and not table and node.op_type not in _CELLS:
                continue
            name, group = found.get(id(node), (str(node.name), (node,)))
            reason = held.get(id(node)) or self._refusal(model, group)
            if reason is None:
                yield name, group
            else:
                outcome.skip(node, reason)

    def _refusal(self, model: oir.Model, group: tuple[oir.Node, ...]) -> str | None:
        if self.dtype == "bfloat16" and (opset := model.opset_imports.get("", 1)) < _BFLOAT16:
            return f"opset {opset} has no Cast of bfloat16; `--opset {_BFLOAT16}` raises it"
        if any(node.op_type in _CELLS for node in group):
            return f"ONNX Runtime has no {group[0].op_type} of halves" if not self.stored else self._unfit(group)
        if any(value.dtype != oir.DataType.FLOAT for node in group for value in node.outputs):
            return "it does not compute in float32"
        if any(node.graph is not model.graph for node in group) and not self.stored:
            return "it is inside a sub-graph"
        return self._unfit(group)

    def _unfit(self, group: tuple[oir.Node, ...]) -> str | None:
        reasons = (half_floats.unfit(node, oir.DataType[self.dtype.upper()]) for node in group)
        return next((reason for reason in reasons if reason is not None), None)

    def _safe(self, model: oir.Model, context: Context, layers: Sequence[oir.Node]) -> set[str]:
        """The names of layers, and of nodes that may follow them, at which no number was seen near what overflows."""
        followers = [node for node in model.graph if is_op(node, *half_floats.FOLLOWERS) and half_floats.floats(node)]
        values = {
            node: [*(node.inputs[index] for index in half_floats.floats(node)), *node.outputs]
            for node in (*layers, *followers)
        }
        computed = {one for some in values.values() for one in some if one is not None and not weights.is_constant(one)}
        watched = {str(one.name): Site(one) for one in computed if sites.refusal(model, one) is None}
        observer = context.observe(model)
        seen = observer.observe(watched, Range(), context.samples)
        observer.close()
        limit = half_floats.LIMITS[oir.DataType.FLOAT16][0] / self.margin
        wide = {name for name, one in seen.items() if not isinstance(one, Range) or not _below(one, limit)}
        inside = {one for one in computed if str(one.name) in watched and str(one.name) not in wide}
        return {
            str(node.name)
            for node, read in values.items()
            if all(one is None or weights.is_constant(one) or one in inside for one in read)
        }

    def _edit(self, name: str, group: Sequence[oir.Node], nodes: Collection[oir.Node], safe: list[str]) -> Edit:
        option = f"{self.dtype}, stored" if self.stored else self.dtype
        claims = frozenset(str(node.name) for node in group)
        savings = half_floats.savings(nodes, half_floats.SMALL if self.stored else 0)
        anchors = tuple(str(node.name) for node in group)
        return Edit(catalog.spec(self), name, option, claims, savings, {"safe": np.array(safe, np.str_)}, anchors)

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes = {node.name: node for node in walk(model)}
        chosen: list[oir.Node] = []
        safe: set[str] = set()
        for edit in edits:
            if not outcome.take(nodes[edit.anchors[0]]):
                break
            group = [nodes[name] for name in edit.anchors]
            least = half_floats.SMALL if self.stored else 0
            outcome.errors[edit.key] = half_floats.error(group, oir.DataType[self.dtype.upper()], least)
            chosen += group
            safe |= set(edit.payload["safe"].tolist())
        if self.stored:
            half_floats.store(model, chosen, oir.DataType[self.dtype.upper()])
        else:
            half_floats.write(model, half_floats.reach(model, chosen, safe))


def _held(layer: Layer) -> str | None:
    """Why the weight of a layer is not in floating point; None where it is, even if stored in fewer bits."""
    widened = layer.parameter is not None and layer.parameter.widened
    return None if widened else layer.read_only


def _below(seen: Range, limit: float) -> bool:
    return seen.absmax is None or bool((seen.absmax < limit).all())
