"""Attentions of neighbouring blocks read the same state, so that they can run side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.block import Block, Structure
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import anchor, blocks_of, held, marker
from burnish.passes.lossy import Context, Edit, LossyPass, Savings
from burnish.passes.parallel_groups import Groups, Member, Unsuited, joined, rewire


@dataclass(frozen=True)
class ParallelBlocks(LossyPass):
    """Let the attentions of a group of blocks read the state before the group; the mlps stay one after the other.

    The fuzzy groups of EasySpec (arXiv:2502.02493). No parameter is saved: what is gained is time, on devices that run
    the attentions at once, or with `fuse` by one product for the projections of all. Blocks that lose much by it stay
    exact, since the search leaves them out.

    Attributes:
        groups: half-open ranges of blocks, `3:5+5:7`, numbered from 0 as `burnish inspect --blocks` shows them.
        size: blocks of a group, where the search chooses.
        fuse: write the projections of a group as one product; gains of norms go into them.
    """

    order: ClassVar[int] = 21
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted", "typed")

    groups: str = ""
    size: int = 2
    fuse: bool = False

    def __post_init__(self) -> None:
        if self.size < 2:
            raise InputError(f"`size` is {self.size}", place=self.pass_name(), hint="a group has two blocks or more")

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        structure = blocks_of(model)
        if self.groups:
            wanted = self._named(structure)
        else:
            runs = [stack.blocks for stack in structure.stacks]
            wanted = [run[start : start + self.size] for run in runs for start in range(len(run) - self.size + 1)]
        return self._edits(model, wanted, context.dims, outcome)

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if not self.groups:
            return super().asked(model, outcome)
        found = self._edits(model, self._named(blocks_of(model)), {}, outcome)
        if outcome.skipped:
            raise InputError(outcome.skipped[0].reason, place=f"`{catalog.spec(self)}`")
        return found

    def _named(self, structure: Structure) -> list[Sequence[Block]]:
        """The groups of `groups`, those of one block left out."""
        blocks, place = structure.blocks, f"`{catalog.spec(self)}`"
        try:
            ranges = sorted((int(first), int(end)) for first, end in (one.split(":") for one in self.groups.split("+")))
        except ValueError:
            raise InputError("`groups` is no list of ranges", place=place, hint="as in `groups=3:5+5:7`") from None
        end = 0
        for first, behind in ranges:
            if not first < behind or first < 0 or behind > len(blocks):
                raise InputError(f"there are no blocks {first}:{behind}: the model has 0:{len(blocks)}", place=place)
            if first < end:
                raise InputError(f"block {first} is in two groups", place=place)
            end = behind
        return [blocks[first:behind] for first, behind in ranges if behind - first > 1]

    def _edits(
        self, model: oir.Model, wanted: Sequence[Sequence[Block]], dims: Mapping[str, int], outcome: Outcome
    ) -> list[Edit]:
        known, found = Groups(model), []
        for blocks in wanted:
            site = f"blocks {blocks[0].index} to {blocks[-1].index}"
            try:
                members = known.members(blocks)
                if self.fuse:
                    joined(members)
            except Unsuited as why:
                outcome.skip(blocks[0].nodes[-1], f"{site}: {why}")
                continue
            marks = tuple(map(anchor, blocks))
            nodes = [node for one in members for node in (*one.norm.nodes, *(one.inside if self.fuse else ()))]
            branches = [name for block in blocks for name in (marker(block), *(held(block) or ()))]
            claims = frozenset({*branches, *(str(node.name) for node in nodes)})
            savings = self._savings(model, marks, dims) if self.fuse else Savings(macs=0)
            found.append(Edit(catalog.spec(self), site, "attentions in parallel", claims, savings, anchors=marks))
        return found

    def _savings(self, model: oir.Model, marks: Sequence[str], dims: Mapping[str, int]) -> Savings:
        copy = model.clone()
        members = self._members(copy, marks, "")
        rewire(copy, members, joined(members))
        return lossy.saved(model, copy, dims)

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        planned = [(edit, self._members(model, edit.anchors, edit.site)) for edit in edits]
        for _, members in planned:
            if not outcome.take(members[0].block.nodes[-1]):
                return
            rewire(model, members, joined(members) if self.fuse else None)

    @staticmethod
    def _members(model: oir.Model, marks: Sequence[str], site: str) -> list[Member]:
        structure = blocks_of(model)
        try:
            known = Groups(model)
            return known.members([known.around(structure, name, site) for name in marks])
        except Unsuited as why:
            raise InputError(f"another edit has changed it: {why}", place=site) from None
