"""A model of chosen layers of itself, in any order, as mergekit's passthrough method writes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.block import Structure
from burnish.ir.views.block_drop import drop, obstacle
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import States, anchors, blocks_of
from burnish.passes.depth_sequence import arrange, numbers, why_not
from burnish.passes.lossy import Context, Edit, LossyPass


@dataclass(frozen=True)
class SelectLayers(LossyPass):
    """Let a model consist of ranges of its blocks, as in `ranges=0:12+19:30`; a range that comes again shares weights.

    Blocks in no range go, with their caches; a block that comes again gets caches of its own, numbered on. What is
    before the first block and behind the last stays (mergekit's passthrough).

    Attributes:
        ranges: half-open, numbered from 0 as `burnish inspect --blocks` shows them, with + between them; an end that
            is left out is that of the model.
    """

    order: ClassVar[int] = 0
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")

    ranges: str = ""

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        return self._edits(model, outcome, context.dims)

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        return self._edits(model, outcome, {})

    def _edits(self, model: oir.Model, outcome: Outcome, dims: Mapping[str, int]) -> list[Edit]:
        structure = blocks_of(model)
        wanted = self._numbers(structure)
        if wanted == list(range(len(structure.blocks))):
            outcome.skip(structure.blocks[0].nodes[0], "the ranges are the whole model", matched=False)
            return []
        copy = model.clone()
        self._make(copy, wanted)
        names = frozenset(name for block in structure.blocks for name in anchors(block))
        return [Edit(catalog.spec(self), f"blocks {self.ranges}", "select", names, lossy.saved(model, copy, dims))]

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        for _ in edits:
            structure = blocks_of(model)
            if outcome.take(structure.blocks[0].nodes[0]):
                self._make(model, self._numbers(structure))

    def _make(self, model: oir.Model, wanted: Sequence[int]) -> None:
        structure = blocks_of(model)
        gone = [block for block in structure.blocks if block.index not in wanted]
        kept = [block for block in structure.blocks if block.index in wanted]
        self._check(obstacle(structure, gone))
        if gone:
            states, names = States(model, structure), [anchors(block) for block in kept]
            drop(model, structure, gone)
            states.renumber(kept)
            states.note(kept)
            structure = blocks_of(model)
            owners = {node.name: block for block in structure.blocks for node in block.nodes}
            if [{owners.get(name) for name in one} for one in names] != [{block} for block in structure.blocks]:
                raise InputError("the blocks that are left cannot be told apart", place=f"`{catalog.spec(self)}`")
        places = {block.index: place for place, block in enumerate(kept)}
        sequence = [structure.blocks[places[number]] for number in wanted]
        if sequence != structure.blocks:
            self._check(why_not(structure, sequence))
            arrange(model, structure, sequence)

    def _check(self, reason: str | None) -> None:
        if reason is not None:
            raise InputError(reason, place=f"`{catalog.spec(self)}`")

    def _numbers(self, structure: Structure) -> list[int]:
        found = numbers(structure, self.ranges)
        if found is None:
            raise InputError(
                f"`{self.ranges}` are no ranges of the blocks 0 to {len(structure.blocks) - 1}",
                place=f"`{catalog.spec(self)}`",
                hint="write half-open ranges with + between them, as in `ranges=0:12+19:30`",
            )
        return found
