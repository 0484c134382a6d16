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
from burnish.passes.depth_blocks import States, anchors, blocks_of, found_again, lent, numbered
from burnish.passes.depth_criteria import Criterion, Ranking, without
from burnish.passes.depth_ledger import Ledger
from burnish.passes.lossy import Context, Edit, LossyPass, Savings


@dataclass(frozen=True)
class RemoveBlocks(LossyPass):
    """Remove residual blocks: those whose removal changes the output least, or those named as in `blocks=3+4+12`.

    By default every block is an edit, scored alone by what its removal changes at the output, and chosen together with
    the edits of other passes (LAPTOP-Diff, arXiv:2404.11098). Another `criterion` orders the blocks instead: with a
    `count`, so many go; without, the search chooses among one block, two, and so on in that order.

    Attributes:
        blocks: remove exactly these, numbered from 0 as `burnish inspect --blocks` shows them.
        criterion: `block-influence` (ShortGPT), `angular` (blocks that follow each other), `perplexity`, `taylor`
            (needs torch), `magnitude` and `magnitude-l2`, `criticality`, `reverse` (the last ones) and `random`.
        count: remove so many, chosen by the criterion without a search.
        iterative: choose one after the other, each on the model without those before it (SLEB, arXiv:2402.09025).
        renumber: name the caches that stay like the first ones, without gaps.
        seed: of `random` and `criticality`.
    """

    order: ClassVar[int] = 0
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")

    blocks: str = ""
    criterion: Criterion = "output-loss"
    count: int = 0
    iterative: bool = False
    renumber: bool = True
    seed: int = 0

    @property
    def decided(self) -> bool:
        return self.count > 0

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        structure = blocks_of(model)
        possible = []
        for block in structure.blocks if not self.blocks else numbered(structure, self.blocks, "blocks"):
            reason = obstacle(structure, [block])
            if reason is None:
                possible.append(block)
            else:
                outcome.skip(block.nodes[-1], reason)
        ranking = Ranking(self.criterion, context, self.seed, self.iterative)
        if self.count and not self.blocks:
            chosen = ranking.choose(model, structure, self.count)
            return self._edits(model, structure, [[block] for block in chosen], context.dims)
        if self.blocks or self.criterion == "output-loss" and not self.iterative:
            return self._edits(model, structure, [[block] for block in possible], context.dims)
        return self._edits(model, structure, ranking.ladder(model, structure) if possible else [], context.dims)

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if not self.blocks:
            return super().asked(model, outcome)
        structure = blocks_of(model)
        chosen = numbered(structure, self.blocks, "blocks")
        reason = obstacle(structure, chosen)
        if reason is not None:
            raise InputError(reason, place=f"`{self.pass_name()}{{blocks={self.blocks}}}`")
        return self._edits(model, structure, [[block] for block in chosen], {})

    def _edits(
        self, model: oir.Model, structure: Structure, sets: Sequence[Sequence[Block]], dims: Mapping[str, int]
    ) -> list[Edit]:
        ledger, spec = Ledger(model, dims), catalog.spec(self)
        ladder = any(len(blocks) > 1 for blocks in sets)
        found = []
        for blocks in sets:
            names = tuple(name for block in blocks for name in anchors(block))
            claims = {*names, *([spec] if ladder else _shared(structure, blocks[0]))}
            claims |= {one for block in blocks for one in lent(structure, block)}
            numbers = "+".join(str(block.index) for block in blocks)
            site = f"block{'s' if len(blocks) > 1 else ''} {numbers}"
            savings = _savings(model, blocks, ledger, dims)
            found.append(Edit(spec, site, "drop", frozenset(claims), savings, anchors=names))
        return found

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        structure = blocks_of(model)
        chosen: list[Block] = []
        for edit in edits:
            blocks = found_again(structure, edit.anchors, edit.site)
            if outcome.take(blocks[-1].nodes[-1]):
                chosen += blocks
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


def _savings(model: oir.Model, blocks: Sequence[Block], ledger: Ledger, dims: Mapping[str, int]) -> Savings:
    if all(block.adders == (None, None) and block.entry_shape == block.exit_shape for block in blocks):
        return ledger.without(node for block in blocks for node in block.nodes)
    return lossy.saved(model, without(model, [block.index for block in blocks]), dims)


def _shared(structure: Structure, block: Block) -> list[str]:
    """A claim in common with each block beside it that cannot go together with it although each can alone."""
    beside = [one for one in structure.blocks if abs(one.index - block.index) == 1]
    rivals = [one for one in beside if obstacle(structure, [one]) is None and obstacle(structure, [block, one])]
    return [f"one of the blocks {min(block.index, one.index)} and {max(block.index, one.index)}" for one in rivals]
