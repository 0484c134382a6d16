"""What a model and each of its parts cost, for tables and charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import concrete, cost, liveness, weights
from burnish.ir.segments import Segment, segments
from burnish.ir.views.attention import Attention, find_attentions
from burnish.ir.walk import graphs, walk


@dataclass(frozen=True)
class PartCost:
    """One segment: its nodes, multiply-adds of one run (None when unknown), bytes of the constants it reads first."""

    name: str
    nodes: int
    macs: int | None
    bytes: int


@dataclass(frozen=True)
class Costs:
    """A model in numbers; what depends on dynamic dimensions holds for the numbers that were given for them.

    Attributes:
        segments: of the model.
        parts: what each costs; of a model with functions those of the same model with them inlined.
        nodes: of all graphs.
        operators: nodes by operator.
        parameters: elements of all constants, each once.
        bytes: of all constants.
        macs: multiply-adds of one run; None when unknown.
        peak: bytes of activations that live at once; None when unknown.
        blocks, attentions: how many there are.
        opsets: `17`, `ai.onnx.ml 3`.
    """

    segments: Sequence[Segment]
    parts: Sequence[PartCost]
    nodes: int
    operators: Mapping[str, int]
    parameters: int
    bytes: int
    macs: int | None
    peak: int | None
    blocks: int
    attentions: int
    opsets: str


def costs(model: oir.Model, dims: Mapping[str, int]) -> Costs:
    """What a model costs with the numbers `dims` for its dynamic dimensions; the model is not changed."""
    found = segments(model)
    sized = concrete.concrete(model, dims)
    counted = cost.model_cost(sized, dims)
    return Costs(
        segments=found,
        parts=_parts(found, model, sized, counted),
        nodes=sum(len(graph) for graph in graphs(model)),
        operators=Counter(cost.operator_name(node) for graph in graphs(model) for node in graph),
        parameters=counted.total.parameters,
        bytes=sum(one.bytes for one in counted.stored),
        macs=counted.total.macs,
        peak=liveness.activation_peak(sized, dims).peak,
        blocks=sum(one.block is not None for one in found),
        attentions=sum(isinstance(one, Attention) for one in find_attentions(model)),
        opsets=", ".join(f"{domain} {version}".strip() for domain, version in model.opset_imports.items()),
    )


def _parts(found: Sequence[Segment], model: oir.Model, sized: oir.Model, counted: cost.ModelCost) -> list[PartCost]:
    """The costs of the nodes of `sized` summed over the segments of `model`, whose copy it is."""
    nodes, copies = walk(model), walk(sized)
    if [node.op_type for node in nodes] == [node.op_type for node in copies]:
        original = dict(zip(copies, nodes, strict=True))
    else:
        found, original = segments(sized), {}
    costs: dict[oir.Node, list[int | None]] = {}
    for one in counted.nodes:
        costs.setdefault(original.get(one.node, one.node), []).append(one.cost.macs)
    seen: set[int] = set()
    made = []
    for segment in found:
        macs = [number for line in segment.lines for number in costs.get(line.node, [])]
        tensors = [weights.tensor_of(value) for line in segment.lines for value in line.node.inputs]
        fresh = {id(one): one for one in tensors if one is not None and id(one) not in seen}
        seen.update(fresh)
        known = [number for number in macs if number is not None]
        total = sum(known) if len(known) == len(macs) else None
        made.append(PartCost(segment.name, len(segment.lines), total, sum(one.nbytes for one in fresh.values())))
    return made
