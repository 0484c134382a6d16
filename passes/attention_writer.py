"""Write an attention as the standard's Attention or as com.microsoft's MultiHeadAttention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Attention, Source
from burnish.passes.masks import Masks, Ready


@dataclass(frozen=True)
class Plan:
    """What to write in the place of one attention, and from which sources."""

    operator: str
    q: Source
    k: Source
    v: Source
    out: oir.Value
    flat: bool
    kv_heads: int


@dataclass
class AttentionWriter:
    """Chooses the sources and the operator for an attention, and writes it.

    Attributes:
        model: rewritten in place.
        facts: what is proven of it.
        masks: makes its masks ready.
        target: `onnx`: rely on the standard alone for rows that are masked from end to end.
    """

    model: oir.Model
    facts: Inference
    masks: Masks
    target: str
    _parts: dict[tuple[oir.Value, int], list[oir.Value]] = field(default_factory=dict)

    def standard(self, found: Attention) -> Plan | str | None:
        """The plan for the standard's Attention; None when it is that already, in its best form."""
        strict = self.target == "onnx"
        same = found.anchor.op_type == "Attention"
        refused = None if same else self.masks.refused(found, "unknown" if strict else "zeros")
        if refused is not None:
            return refused
        causal = same and bool(match.attribute(found.anchor, "is_causal", 0))
        for past in (True, False):
            for flat in (True, False):
                plan = self._plan(found, "Attention", flat, past and not causal)
                if plan is None:
                    continue
                better = plan.flat or plan.k.past is not None or plan.kv_heads < found.heads and plan.k.path
                return plan if not same or better else None
        return "no arrangement of queries, keys and values fits the operator"

    def multi_head(self, found: Attention) -> Plan | str:
        """The plan for com.microsoft's MultiHeadAttention."""
        refused = self.masks.refused(found, "nan")
        if refused is not None:
            return refused
        if found.wide:
            return "the softmax is computed in another dtype than the scores"
        out = _last(found.outputs, True)
        q = next((one for one in reversed(found.queries) if one.flat), None)
        if q is None or out is None:
            return "queries or result are not laid out as [batch, sequence, heads * size]"
        for flat in (True, False):
            k, v = (
                next((x for x in reversed(one) if x.flat == flat and not x.repeated and x.past is None), None)
                for one in (found.keys, found.values)
            )
            if k is not None and v is not None:
                return Plan("MultiHeadAttention", q, k, v, out, True, found.heads)
        return "no arrangement of keys and values fits the operator"

    def _plan(self, found: Attention, operator: str, flat: bool, past: bool) -> Plan | None:
        out = _last(found.outputs, flat)
        q = next((one for one in reversed(found.queries) if one.flat == flat), None)
        if q is None or out is None:
            return None
        for k in reversed(found.keys):
            for v in reversed(found.values):
                if k.flat != flat or v.flat != flat or k.repeated != v.repeated or (k.past is None) != (v.past is None):
                    continue
                if (k.past is None) == past or (past and not self._may_append(found, q, k, v)):
                    continue
                heads = self._heads(found, k)
                if heads is not None:
                    return Plan(operator, q, k, v, out, flat, heads)
        return None

    def _heads(self, found: Attention, k: Source) -> int | None:
        shape = self.facts.shape(k.value)
        if shape is None:
            return None
        if not k.flat:
            return shape[1] if isinstance(shape[1], int) else None
        width = shape[2]
        return width // (found.head_size * (k.part[1] if k.part else 1)) if isinstance(width, int) else None

    def _may_append(self, found: Attention, q: Source, k: Source, v: Source) -> bool:
        """Whether only this attention and outputs read the caches with the new part, which none of its inputs needs."""
        inside = {id(node) for node in (*found.nodes, *k.path, *v.path)}
        presents = [one.present for one in (k, v) if one.present is not None]
        if not all(_serves(node, inside, 0) for present in presents for node in match.consumers(present)):
            return False
        joins = {id(present.producer()) for present in presents}
        masks = [*found.mask.values, *([found.mask.keep] if found.mask.keep is not None else [])]
        return not _depends([*masks, q.value, k.value, v.value], joins)

    def write(self, found: Attention, plan: Plan) -> None:
        """Put the planned operator in the place of the attention."""
        standard, same = plan.operator == "Attention", found.anchor.op_type == "Attention"
        if same:
            ready = Ready(match.input_of(found.anchor, 3))
        else:
            strict = self.target == "onnx"
            ready = self.masks.ready(
                found,
                spare_lowest=standard,
                zero_dead=found.guard and (strict or not standard),
                rank=None if standard else 4,
            )
        q, k, v = (self.operand(one, found.end) for one in (plan.q, plan.k, plan.v))
        scale = found.scale * plan.q.scale * plan.k.scale
        like = list(dict.fromkeys((found.anchor, *found.nodes, *plan.q.path, *plan.k.path, *plan.v.path)))
        if standard:
            kept = (
                {n: a.value for n, a in found.anchor.attributes.items() if n in ("softcap", "is_causal")}
                if same
                else {}
            )
            attributes = {**kept, "scale": scale, "softmax_precision": 1 if found.wide else None}
            if plan.flat:
                attributes |= {"q_num_heads": found.heads, "kv_num_heads": plan.kv_heads}
            inputs = [q, k, v, ready.bias, plan.k.past, plan.v.past]
            node = edit.make("Attention", inputs, attributes, like=like, outputs=3 if plan.k.past is not None else 1)
        else:
            self.model.graph.opset_imports.setdefault("com.microsoft", 1)
            inputs = [q, k, v, None, None, ready.bias]
            attributes = {"num_heads": found.heads, "scale": scale}
            node = edit.make("MultiHeadAttention", inputs, attributes, like=like, domain="com.microsoft")
        edit.insert_before(found.end, [node])
        result = node.outputs[0]
        if ready.dead is not None:
            result = self._zeroed(found, plan, ready.dead, result)
        for present, new in zip((plan.k.present, plan.v.present), node.outputs[1:], strict=False):
            if present is not None:
                edit.replace_value(present, new)
        edit.replace_value(plan.out, result)
        stale = [plan.out.producer(), *(one.present.producer() for one in (plan.k, plan.v) if one.present is not None)]
        edit.remove_unused([one for one in stale if one is not None])

    def _zeroed(self, found: Attention, plan: Plan, dead: oir.Value, result: oir.Value) -> oir.Value:
        if plan.flat:
            dead = self.masks.made.squeezed(dead, 1)
        step = edit.make(
            "Where", [dead, self.masks.number(0.0, found), result], like=found.end, name=f"{found.end.name}.guard"
        )
        result.type, result.shape = plan.out.type, plan.out.shape
        edit.insert_before(found.end, [step])
        return step.outputs[0]

    def operand(self, source: Source, before: oir.Node) -> oir.Value:
        """A source as a value, read before a node; a part of a packed one is cut out."""
        if source.part is None:
            return source.value
        index, count = source.part
        key = (source.value, count)
        if key not in self._parts:
            shape = self.facts.shape(source.value)
            width = int(shape[-1]) // count  # type: ignore[index,arg-type]
            sizes = [width] * count
            given = self.facts.opset >= 13
            split = [edit.add_constant(self.model, "parts", np.array(sizes, np.int64))] if given else []
            attributes = {"axis": -1, "split": None if given else sizes}
            node = edit.make("Split", [source.value, *split], attributes, like=source.path[0], outputs=count)
            edit.insert_before(before, [node])
            self.facts.follow(node)
            self._parts[key] = list(node.outputs)
        return self._parts[key][index]


def _last(outputs: tuple[tuple[oir.Value, bool], ...], flat: bool) -> oir.Value | None:
    found = [value for value, is_flat in outputs if is_flat == flat]
    return (found[-1] if flat else found[0]) if found else None


def _serves(node: oir.Node, inside: set[int], depth: int) -> bool:
    """Whether all that `node` computes is read inside only."""
    if id(node) in inside:
        return True
    if depth > 8 or any(out.is_graph_output() for out in node.outputs):
        return False
    return all(_serves(reader, inside, depth + 1) for out in node.outputs for reader in match.consumers(out))


def _depends(values: Iterable[oir.Value], nodes: set[int]) -> bool:
    """Whether any of `values` is computed from what one of `nodes` gives."""
    pending, seen = [value.producer() for value in values], set[int]()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        if id(node) in nodes:
            return True
        seen.add(id(node))
        pending += [value.producer() for value in node.inputs if value is not None]
    return False
