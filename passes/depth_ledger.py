"""What goes when nodes go: parameters, bytes and multiply-adds, without taking them out first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as oir

from burnish.ir import cost, weights
from burnish.ir.walk import walk
from burnish.passes.lossy import Savings


class Ledger:
    """The cost of each node of a model, read once.

    Args:
        model: a model in normal form: constants are initializers, values have shapes.
        dims: numbers for symbolic dimensions.
    """

    def __init__(self, model: oir.Model, dims: Mapping[str, int]) -> None:
        self.dims = dims
        found = cost.model_cost(model, dict(dims))
        self._macs: dict[oir.Node, int | None] = {}
        for one in found.nodes:
            before = self._macs.get(one.node, 0)
            self._macs[one.node] = None if before is None or one.cost.macs is None else before + one.cost.macs
        self._known = found.macs is not None
        self._backwards = list(reversed(model.graph))
        self._stored = {one.name: one for one in found.stored}
        self._readers: dict[int, tuple[str, set[oir.Node]]] = {}
        for node in walk(model):
            for value in node.inputs:
                tensor = weights.tensor_of(value) if value is not None else None
                if tensor is not None and value is not None:
                    self._readers.setdefault(id(tensor), (str(value.name), set()))[1].add(node)

    def without(self, nodes: Iterable[oir.Node], left: oir.Value | None = None) -> Savings:
        """What is saved when these nodes go, with the constants that only they read.

        Args:
            nodes: nodes of the model, with all that only they need.
            left: what is read in the place of what they compute. With it, `nodes` may lack what only they need.
        """
        gone = set(nodes)
        for node in self._backwards if left is not None else ():
            users = [use.node for value in node.outputs for use in value.uses()]
            stays = left in node.outputs or any(value.is_graph_output() for value in node.outputs)
            if users and not stays and all(user in gone for user in users):
                gone.add(node)
        lost = [name for name, readers in self._readers.values() if readers <= gone]
        kept = [self._stored[name] for name in lost if name in self._stored]
        macs = [self._macs.get(node, 0) for node in gone]
        return Savings(
            sum(one.parameters for one in kept),
            sum(one.bytes for one in kept),
            sum(count or 0 for count in macs) if self._known else None,
        )

    def unread(self, uses: Iterable[tuple[oir.Node, int]]) -> Savings:
        """What is saved when nodes read other constants, which the model has, in these places.

        Args:
            uses: nodes and numbers of their inputs.
        """
        places = set(uses)
        read = {value for node, index in places if (value := node.inputs[index]) is not None}
        lost = {str(value.name) for value in read if all((use.node, use.idx) in places for use in value.uses())}
        kept = [self._stored[name] for name in lost if name in self._stored]
        return Savings(sum(one.parameters for one in kept), sum(one.bytes for one in kept), 0 if self._known else None)
