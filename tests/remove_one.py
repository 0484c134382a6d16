"""A lossy pass for tests of the engine: whole blocks go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.block_drop import drop, obstacle
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.lossy import Context, Edit, LossyPass, Savings


@dataclass(frozen=True)
class RemoveOne(LossyPass):
    """Remove blocks, and give the caches of those behind them the names of those before them if asked to."""

    order: ClassVar[int] = 0
    shift: bool = False

    def propose(self, model: oir.Model, context: Context | None, outcome: Outcome | None) -> list[Edit]:
        structure = stacks(model)
        return [
            Edit(catalog.spec(self), f"block {one.index}", "drop", frozenset(), Savings())
            for one in structure.blocks
            if obstacle(structure, [one]) is None
        ]

    def edit_out(self, site: str) -> Edit:
        """An edit of a block that cannot be removed twice: it raises what a pass raises that does not find its site."""
        return Edit(catalog.spec(self), site, "twice", frozenset(), Savings())

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        structure = stacks(model)
        chosen = [structure.blocks[int(one.site.split()[1])] for one in edits]
        if any(one.option == "twice" for one in edits):
            raise InputError("it is not there any more", place=edits[0].site)
        for block in chosen:
            outcome.take(block.nodes[-1])
        before = [str(value.name) for value in model.graph.inputs], [str(value.name) for value in model.graph.outputs]
        drop(model, structure, chosen)
        if self.shift:
            for names, ports in zip(before, (model.graph.inputs, model.graph.outputs), strict=True):
                for name, value in zip(names, ports, strict=False):
                    value.name = f"{name}.new"
                for value in ports:
                    value.name = str(value.name).removesuffix(".new")
