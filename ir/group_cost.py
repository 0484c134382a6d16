"""What several nodes cost together, when one kernel does their work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as oir

from burnish.ir.cost import Cost, bytes_taken, node_cost, total, values_given
from burnish.ir.sizes import Dims, UnknownSizeError, value_bytes


def group_cost(nodes: Sequence[oir.Node], dims: Dims | None = None) -> Cost:
    """What one kernel costs that does the work of `nodes`: what passes between them is neither read nor written.

    Args:
        nodes: nodes of one graph, each once, without calls of functions.
        dims: numbers for the symbolic dimensions.
    """
    parts = [node_cost(node, dims) for node in nodes]
    if len(nodes) == 1:
        return parts[0]
    inside = {id(value) for node in nodes for value in node.outputs}
    members = set(nodes)
    read: dict[int, int] = {}
    written = 0
    reasons: list[str] = []
    for node in nodes:
        for value in values_given(node):
            if id(value) not in inside:
                try:
                    read[id(value)] = max(read.get(id(value), 0), bytes_taken(value, node, dims or {}))
                except UnknownSizeError as error:
                    reasons.append(str(error))
        for value in node.outputs:
            if value.name and (value.is_graph_output() or any(use.node not in members for use in value.uses())):
                try:
                    written += value_bytes(value, dims or {})
                except UnknownSizeError as error:
                    reasons.append(str(error))
    whole = total(parts)
    return replace(
        whole,
        bytes_read=None if reasons else sum(read.values()),
        bytes_written=None if reasons else written,
        unknown=tuple(dict.fromkeys((*whole.unknown, *reasons))),
    )
