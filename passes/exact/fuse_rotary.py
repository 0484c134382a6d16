"""Write rotary position embedding as one operator, its tables computed once for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.views import heads
from burnish.ir.views.attention import Miss
from burnish.ir.views.rotary import Rotary, find_rotaries, same_halves
from burnish.ir.walk import is_op, walk
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.shared import Shared

FIRST_OPSET = 23
"""The first opset with RotaryEmbedding."""

_ELEMENTWISE = ("Cos", "Sin", "Cast", "CastLike", "Identity", "Neg")


@dataclass(frozen=True)
class FuseRotary(ExactPass):
    """Write x * cos + turned(x) * sin as RotaryEmbedding, where both elements of each pair provably turn alike.

    Where the heads are split from [batch, sequence, heads * size] right before, the operator reads that, so that
    `fuse-attention` behind it can do without splitting and transposing.

    Attributes:
        target: `onnx` writes the standard's operator (opset 23); `ort-cpu` and `ort-cuda` below that com.microsoft's.
    """

    target: Literal["onnx", "ort-cpu", "ort-cuda"] = "onnx"
    needs: ClassVar[tuple[str, ...]] = ("inlined", "sorted")

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        facts = Inference(model)
        writer = _Writer(model, facts, Shared(model, facts, "rotary"))
        standard = facts.opset >= FIRST_OPSET
        for found in list(find_rotaries(model, facts)):
            if isinstance(found, Miss):
                outcome.skip(found.anchor, found.reason, matched=False)
            elif not standard and self.target == "onnx":
                outcome.skip(
                    found.anchor, f"opset {facts.opset} has no RotaryEmbedding; raise it with --opset {FIRST_OPSET}"
                )
            elif facts.dtype(found.x) == oir.DataType.DOUBLE:
                outcome.skip(found.anchor, "ONNX Runtime has no rotary embedding of doubles")
            elif not (writer.has_pairs(found.cos, found) and writer.has_pairs(found.sin, found)):
                outcome.skip(found.anchor, "both elements of a pair are not known to turn by the same angle")
            else:
                if not outcome.take(found.anchor):
                    return
                writer.write(found, standard)
        for node in walk(model, "RotaryEmbedding"):
            flat = (
                writer.flat(node.inputs[0]) if match.rank(node.inputs[0]) == 4 and node.inputs[0] is not None else None
            )
            if flat is not None:
                if not outcome.take(node):
                    return
                writer.flatten(node, flat)


@dataclass
class _Writer:
    model: oir.Model
    facts: Inference
    made: Shared

    def has_pairs(self, table: oir.Value, found: Rotary) -> bool:
        """Whether a table has one number for each pair, or the same number for both elements of each pair."""
        return not found.whole or self._pairs(table, found.interleaved, make=False) is not None

    def _pairs(self, table: oir.Value, interleaved: bool, make: bool) -> oir.Value | None:
        """The table with one number for each pair, computed likewise from half the angles; None where unknown."""
        array = weights.constant(table)
        if array is not None:
            half = same_halves(array, interleaved)
            return None if half is None else self.made.constant("table", table, half) if make else table
        node = table.producer()
        if node is None:
            return None
        if is_op(node, "Concat") and not interleaved:
            last = match.attribute(node, "axis", 0) in (-1, (match.rank(table) or 0) - 1)
            return node.inputs[0] if last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] else None
        if is_op(node, "Reshape") and interleaved:
            return self._doubled(node)
        attributes = {name: a.value for name, a in node.attributes.items()}
        keep: list[oir.Value | None]
        if is_op(node, *_ELEMENTWISE) or (is_op(node, "Unsqueeze", "Squeeze") and self._keeps_last(node, table)):
            inner, keep = node.inputs[0], list(node.inputs[1:])
        elif is_op(node, "Gather") and attributes.get("axis", 0) in (0, -2) and match.rank(node.inputs[0]) == 2:
            inner, keep = node.inputs[0], list(node.inputs[1:])
        elif is_op(node, "Mul", "Div") and (scaled := heads.scaled_by(node, self.facts)) is not None:
            inner, keep = scaled[0], [one for one in node.inputs if one is not scaled[0]]
            if node.inputs[0] is not inner:
                return None
        else:
            return None
        half_inner = self._pairs(inner, interleaved, make) if inner is not None else None
        if half_inner is None or not make:
            return half_inner
        return self.made.step(node.op_type, half_inner, *keep, **attributes)

    def _keeps_last(self, node: oir.Node, table: oir.Value) -> bool:
        axes, rank = match.axes_of(node), max(match.rank(table) or 0, match.rank(node.inputs[0]) or 0)
        return bool(axes) and rank > 0 and all(axis % rank != rank - 1 for axis in axes or ())

    def _doubled(self, node: oir.Node) -> oir.Value | None:
        """f for Reshape(Concat(f[..., None], f[..., None])) and Reshape(Expand(f[..., None]))."""
        pair = match.producer(node.inputs[0], "Concat", "Expand")
        whole, wide = self.facts.shape(node.outputs[0]), self.facts.shape(node.inputs[0])
        if pair is None or whole is None or wide is None or wide[-1] != 2 or len(wide) != len(whole) + 1:
            return None
        if any(value is not pair.inputs[0] for value in pair.inputs) and pair.op_type == "Concat":
            return None
        unsqueeze = match.producer(pair.inputs[0], "Unsqueeze")
        single = self.facts.shape(unsqueeze.inputs[0]) if unsqueeze is not None else None
        if unsqueeze is None or single is None or match.axes_of(unsqueeze) not in ([-1], [len(single)]):
            return None
        same = isinstance(single[-1], int) and whole == (*single[:-1], 2 * single[-1]) and wide == (*single, 2)
        return unsqueeze.inputs[0] if same else None

    def _table(self, table: oir.Value, found: Rotary, batch: Dim) -> oir.Value:
        """A table as [batch, sequence, pairs], the batch not broadcast, which the operator does not do."""
        unsqueeze = match.producer(table, "Unsqueeze")
        if unsqueeze is not None and match.axes_of(unsqueeze) in ([1], [-3]) and match.rank(table) == 4:
            table = unsqueeze.inputs[0] or table
        half = self._pairs(table, found.interleaved, make=True) if found.whole else table
        assert half is not None
        rank = len(self.facts.shape(half) or ())
        if rank == 4:
            half = self.made.squeezed(half, 1)
        elif rank == 2:
            half = self.made.unsqueezed(half, 1)
        if (self.facts.shape(half) or ())[0] != batch:
            length = self.made.length(batch, (found.x, 0))
            half = self.made.step("Expand", half, self.made.step("Concat", length, self.made.integers([1, 1]), axis=0))
        return half

    def flat(self, x: oir.Value) -> oir.Value | None:
        """[batch, sequence, heads * size] from which x [batch, heads, sequence, size] is split."""
        shape = self.facts.shape(x)
        if shape is None:
            return None
        steps = heads.Walk(self.facts, dict(zip("bhsd", shape, strict=True)))
        places = [place for place in steps.up(x, ("b", "h", "s", "d"), scaled=False) if place.pick is None]
        return next((place.value for place in reversed(places) if steps.spelled(place.axes, ("b", "s", "hd"))), None)

    def write(self, found: Rotary, standard: bool) -> None:
        """Put the operator in the place of the nodes."""
        shape = self.facts.shape(found.x) or ()
        cos, sin = (self._table(table, found, shape[0]) for table in (found.cos, found.sin))
        end = found.y.producer()
        assert end is not None
        attributes = {"interleaved": int(found.interleaved)}
        if standard:
            node = edit.make("RotaryEmbedding", [found.x, cos, sin], attributes, like=found.nodes)
        else:
            self.model.graph.opset_imports.setdefault("com.microsoft", 1)
            rows = [self.made.step("Reshape", one, self.made.integers([-1, int(shape[3]) // 2])) for one in (cos, sin)]  # type: ignore[arg-type]
            inputs = [found.x, self._positions(cos), *rows]
            node = edit.make("RotaryEmbedding", inputs, attributes, like=found.nodes, domain="com.microsoft")
        edit.replace_node(end, node)
        self.facts.set(node.outputs[0], self.facts.dtype(found.x), shape)
        source = self.flat(found.x)
        if source is not None:
            self.flatten(node, source)

    def _positions(self, table: oir.Value) -> oir.Value:
        """Rows 0, 1, 2 ... of the table as [batch, sequence]."""
        step, shape = self.made.step, self.made.step("Shape", table)
        size = step("Slice", shape, self.made.integers([0]), self.made.integers([2]))
        zero, one = self.made.scalar(0), self.made.scalar(1)
        rows = step("Range", zero, step("ReduceProd", size, keepdims=0), one)
        return step("Reshape", rows, size)

    def flatten(self, node: oir.Node, source: oir.Value) -> None:
        """Let an operator on split heads read what they are split from, and split its result instead."""
        shape = self.facts.shape(node.inputs[0]) or ()
        attributes = {name: a.value for name, a in node.attributes.items()} | {"num_heads": shape[1]}
        whole = edit.make("RotaryEmbedding", [source, *node.inputs[1:]], attributes, like=node, domain=node.domain)
        split = edit.make("Reshape", [whole.outputs[0], self.made.integers([0, 0, shape[1], shape[3]])], like=node)  # type: ignore[list-item]
        heads_first = edit.make("Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]}, like=node)
        edit.replace_node(node, [whole, split, heads_first])
        for one in (whole, split):
            one.outputs[0].name = one.name = edit.unique_name(self.model, f"{heads_first.name}.{one.op_type}")
            self.facts.follow(one)
        self.facts.follow(heads_first)
