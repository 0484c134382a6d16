"""Whole residual blocks go; the stream behind each is what it was before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.block import Block, Structure
from burnish.ir.views.block_drop import drop, obstacle
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import States, anchors, blocks_of, found_again, numbered
from burnish.passes.depth_ledger import Ledger
from burnish.passes.lossy import Context, Edit, LossyPass, Savings


@dataclass(frozen=True)
class RemoveBlocks(LossyPass):
    """Remove residual blocks: those whose removal changes the output least, or those named as in `blocks=3+4+12`.

    The engine scores the removal of each block alone by what it changes at the output, and chooses by a knapsack
    (LAPTOP-Diff, arXiv:2404.11098). `renumber=false` leaves the gaps in the names of the caches.
    """

    order: ClassVar[int] = 0
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")

    blocks: str = ""
    renumber: bool = True

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        structure = blocks_of(model)
        chosen = numbered(structure, self.blocks, "blocks") if self.blocks else structure.blocks
        return self._edits(model, structure, chosen, context.dims, outcome)

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if not self.blocks:
            return super().asked(model, outcome)
        structure = blocks_of(model)
        chosen = numbered(structure, self.blocks, "blocks")
        reason = obstacle(structure, chosen)
        if reason is not None:
            raise InputError(reason, place=f"`{self.pass_name()}{{blocks={self.blocks}}}`")
        return self._edits(model, structure, chosen, {}, outcome)

    def _edits(
        self,
        model: oir.Model,
        structure: Structure,
        chosen: Sequence[Block],
        dims: Mapping[str, int],
        outcome: Outcome,
    ) -> list[Edit]:
        ledger = Ledger(model, dims)
        found = []
        for block in chosen:
            reason = obstacle(structure, [block])
            if reason is not None:
                outcome.skip(block.nodes[-1], reason)
                continue
            names = anchors(block)
            together = {f"block {min(block.index, one.index)} and the next" for one in _rivals(structure, block)}
            savings = self._savings(model, block, ledger, dims)
            claims = frozenset({*names, *together})
            found.append(Edit(catalog.spec(self), f"block {block.index}", "drop", claims, savings, anchors=names))
        return found

    def _savings(self, model: oir.Model, block: Block, ledger: Ledger, dims: Mapping[str, int]) -> Savings:
        if block.adders == (None, None) and block.entry_shape == block.exit_shape:
            return ledger.without(block.nodes)
        copy = model.clone()
        structure = blocks_of(copy)
        drop(copy, structure, [structure.blocks[block.index]])
        return lossy.saved(model, copy, dims)

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        structure = blocks_of(model)
        blocks = [found_again(structure, edit.anchors, edit.site) for edit in edits]
        chosen = [block for block in blocks if outcome.take(block.nodes[-1])]
        if not chosen:
            return
        reason = obstacle(structure, chosen)
        if reason is not None:
            raise InputError(reason, place=self.pass_name(), hint="remove fewer blocks")
        states = States(model, structure)
        kept = [block for block in structure.blocks if block not in chosen]
        drop(model, structure, chosen)
        if self.renumber:
            states.renumber(kept)
        states.note(kept)


def _rivals(structure: Structure, block: Block) -> list[Block]:
    """The blocks beside it that cannot go together with it although each can alone."""
    beside = [one for one in structure.blocks if abs(one.index - block.index) == 1]
    return [one for one in beside if obstacle(structure, [one]) is None and obstacle(structure, [block, one])]
