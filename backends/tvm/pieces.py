"""Smaller parts of a region, for when the whole of it is not faster: blocks, else stages of a convolutional network."""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as oir

from burnish.backends.tvm import pairs
from burnish.backends.tvm.operators.weight_only import product_alone
from burnish.backends.tvm.regions import LEAST, computes, multiplies
from burnish.ir import dims
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.segments import segments


class Pieces:
    """The segments of a model, found when they are first asked for.

    Args:
        model: the model; it must not be edited meanwhile.
        facts: what is proven of it.
    """

    def __init__(self, model: oir.Model, facts: Inference) -> None:
        self._model, self._facts = model, facts
        self._segments: list[set[oir.Node]] | None = None

    def of(self, nodes: Set[oir.Node]) -> list[list[oir.Node]]:
        """Nodes of the main graph by the segment they are in, or by the stage where that is one; empty where both are.

        A stage ends where images get another size; what has no size of an image is part of the stage before it.
        """
        if self._segments is None:
            self._segments = [{line.node for line in one.lines} for one in segments(self._model)]
        parts = [[node for node in self._model.graph if node in nodes & one] for one in self._segments]
        found = [part for part in parts if part]
        if len(found) < 2:
            found = self._stages([node for node in self._model.graph if node in nodes])
        return found if len(found) > 1 else []

    def light(self, nodes: Set[oir.Node]) -> list[list[oir.Node]]:
        """What may be worth something without tuning: long chains of nodes that multiply no matrices, bound by the
        memory that one loop reads and writes once, and products with quantized weights, or with two factors, which have
        a schedule.
        """
        import networkx as nx

        kept = [node for node in self._model.graph if node in nodes and not multiplies(node)]
        chains = nx.Graph()
        chains.add_nodes_from(kept)
        for node in kept:
            producers = (value.producer() for value in node.inputs if value is not None)
            chains.add_edges_from((one, node) for one in producers if one in chains)
        found = [[node for node in kept if node in chain] for chain in nx.connected_components(chains)]
        kept_chains = [chain for chain in found if sum(computes(node, self._facts) for node in chain) >= LEAST]
        products = (product_alone(node) or pairs.alone(node) for node in self._model.graph if node in nodes)
        return kept_chains + [one for one in products if one and set(one) <= nodes]

    def _stages(self, nodes: list[oir.Node]) -> list[list[oir.Node]]:
        found: list[list[oir.Node]] = []
        now: tuple[Dim, ...] | None = None
        for node in nodes:
            shapes = [self._facts.shape(value) for value in node.outputs]
            images = [shape[2:] for shape in shapes if shape is not None and len(shape) > 3]
            size = next((one for one in images if dims.product(one) != 1), now)
            if not found or (size != now and now is not None):
                found.append([])
            found[-1].append(node)
            now = size
        return found
