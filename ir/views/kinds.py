"""What a residual branch does: attention, cross-attention, state, conv, moe or mlp, told by its operators."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.network import reads
from burnish.ir.views.flow import Flow
from burnish.ir.views.residual import Residual

KINDS = ("attention", "cross-attention", "state", "conv", "moe", "mlp")
"""In the order in which the kinds of a block are named."""

MIXERS = frozenset(("attention", "state"))
_ATTENTION_OPS = {"Attention": 1, "MultiHeadAttention": 1, "GroupQueryAttention": 1, "QAttention": 0}
"""Operators that are a whole attention, with the input that holds the keys."""

_RECURRENT = frozenset(("LSTM", "GRU", "RNN", "Scan", "Loop", "CumSum"))
_CONVS = frozenset(("Conv", "ConvTranspose", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger", "DeformConv"))
_PRODUCTS = ("MatMul", "Einsum", "FusedMatMul", "Gemm")
_REACH = 12
"""Steps between a softmax and the products on its two sides."""


@dataclass(frozen=True)
class Core:
    """The middle of an attention.

    Attributes:
        start: the step of the product of queries and keys, or of the whole.
        end: the step of the product with the values, or of the whole.
        values: what that reads as values or keys.
        node: the softmax, or the operator that is the whole.
    """

    start: int
    end: int
    values: oir.Value | None
    node: oir.Node


def cores(flow: Flow) -> list[Core]:
    """Every product, softmax and second product, however scaled and masked in between, and every fused attention."""
    found = []
    for index, step in enumerate(flow.steps):
        if step.node is not None and step.op in _ATTENTION_OPS:
            keys = match.input_of(step.node, _ATTENTION_OPS[step.op])
            constant = keys is None or weights.is_constant(keys)
            found.append(Core(index, index, step.node.inputs[0] if constant else keys, step.node))
        elif step.op == "Softmax" and step.node is not None:
            start, end = _product(flow, index, up=True), _product(flow, index, up=False)
            if start is not None and end is not None:
                others = [v for v in flow.steps[end].data if not flow.before[flow.source[v]] >> index & 1]
                others = [v for v in others if flow.source[v] != index]
                found.append(Core(start, end, others[0] if others else None, step.node))
    return found


def _product(flow: Flow, index: int, *, up: bool) -> int | None:
    """The nearest product of two computed values above or below a step."""
    level, seen = [index], {index}
    for _ in range(_REACH):
        following: list[int] = []
        for one in level:
            step = flow.steps[one]
            if up:
                near = [flow.source[value] for value in step.data]
            else:
                readers = (user for out in step.outputs for user in match.consumers(out))
                near = [flow.source[user.outputs[0]] for user in readers if user.outputs[0] in flow.source]
            for other in near:
                if other in seen:
                    continue
                seen.add(other)
                if flow.contractions >> other & 1:
                    factors = [value for value in flow.steps[other].data if flow.varies(value)]
                    if flow.steps[other].op in _PRODUCTS and len(factors) > 1:
                        return other
                    continue
                following.append(other)
        level = following
    return None


def kinds(
    flow: Flow,
    one: Residual,
    known: Iterable[Core],
    routers: Container[oir.Node | None],
    selves: Container[oir.Node],
    ports: bool,
) -> tuple[str, ...]:
    """The kinds of the branches of a residual sum, those of sums inside it included, in the order of `KINDS`.

    Args:
        flow: the flow of the graph.
        one: the residual sum.
        known: the attentions of the graph.
        routers: the nodes that choose experts.
        selves: the middle nodes of attentions that are known to be self-attention, be it with the keys of another.
        ports: whether the region has inputs and outputs of the graph of its own, the old and new state of a cache.
    """
    found: set[str] = set()
    own = one.region
    for inner in one.inner:
        found |= set(kinds(flow, inner, known, routers, selves, ports))
        own &= ~inner.region
    linear, convolutions = 0, 0
    around = 0
    for core in known:
        if own >> core.end & 1:
            same = core.node in selves or core.values in (None, one.entry) or flow.depends(core.values, one.entry)
            found.add("attention" if same else "cross-attention")
            around |= flow.before[core.end] | flow.behind[core.end] | 1 << core.end
    operators = {step.op for step in flow.members(own)}
    beside = own & flow.contractions & ~around
    for step in flow.members(beside):
        if around and not flow.before[flow.source[step.outputs[0]]] & beside:
            continue  # one matrix beside an attention is its gate; an mlp has a second one behind the first
        if step.op in _CONVS:
            convolutions += 1
        elif step.op not in _RECURRENT:
            linear += 1
    if operators & _RECURRENT or (ports and not found):
        found.add("state")
    elif any(step.node in routers for step in flow.members(own)):
        found.add("moe")
    elif convolutions and not found:
        found.add("conv")
    elif linear and "state" not in found:
        found.add("mlp")
    return tuple(kind for kind in KINDS if kind in found)


def owned(flow: Flow, region: int, entry: oir.Value, taken: int) -> dict[oir.Node, None]:
    """The nodes of a region, and those that only they need: sizes, masks, tables, projections of another stream.

    Args:
        flow: the flow of the graph.
        region: steps, as bits.
        entry: what the region begins with; nodes before it are never counted.
        taken: the steps of all residual sums, as bits; they are their own blocks'.
    """
    nodes = {step.node: None for step in flow.members(region) if step.node is not None and step.part != "sum"}
    start = flow.source[entry]
    fixed = (flow.before[start] | 1 << start | taken) & ~region
    pending = [value for node in nodes for value in reads(node)]
    while pending:
        value = pending.pop()
        node, index = value.producer(), flow.source.get(value)
        if node is None or node in nodes or index is None or node.graph is not flow.graph or fixed >> index & 1:
            continue
        uses = [use.node for out in node.outputs for use in out.uses()]
        if all(user in nodes for user in uses) and not any(out.is_graph_output() for out in node.outputs):
            nodes[node] = None
            other = flow.before[index] & taken and not flow.behind[start] >> index & 1
            last = other and flow.contractions >> index & 1  # above it is the other stream, such as an encoder's result
            pending += [one for one in reads(node) if not last or not flow.varies(one)]
    return nodes
