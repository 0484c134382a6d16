"""What the passes that take the attention or the mlp out of blocks have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.block import Block, Structure
from burnish.ir.walk import is_op
from burnish.passes import catalog, depth_branches, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import States, block_with, blocks_of, lent, numbered
from burnish.passes.depth_branches import Branch
from burnish.passes.depth_ledger import Ledger
from burnish.passes.lossy import Context, Edit, LossyPass, Savings


@dataclass(frozen=True)
class DropBranches(LossyPass):
    """A pass that takes a branch of one kind out of blocks."""

    order: ClassVar[int] = 10
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")
    what: ClassVar[str]

    blocks: str = ""

    @abstractmethod
    def branch(self, block: Block) -> Branch | str | None:
        """The branch of a block, or why it stays; None when it has none."""

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        structure = blocks_of(model)
        chosen = numbered(structure, self.blocks, "blocks") if self.blocks else structure.blocks
        found = []
        for block in chosen:
            one = self._possible(structure, block)
            if isinstance(one, Branch):
                found.append(one)
            elif one is not None:
                outcome.skip(block.nodes[-1], f"block {block.index}: {one}")
        if not found and not outcome.skipped:
            raise InputError(f"no block of the model has {self.what}", hint="see `burnish inspect --blocks`")
        return self.edits_of(model, structure, found, context.dims)

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if not self.blocks:
            return super().asked(model, outcome)
        structure, found = blocks_of(model), []
        place = f"`{catalog.spec(self)}`"
        for block in numbered(structure, self.blocks, "blocks"):
            one = self._possible(structure, block)
            if not isinstance(one, Branch):
                raise InputError(f"block {block.index}: {one or f'it has no {self.what}'}", place=place)
            found.append(one)
        reason = depth_branches.obstacle(structure, found)
        if reason is not None:
            raise InputError(reason, place=place)
        return self.edits_of(model, structure, found, {})

    def _possible(self, structure: Structure, block: Block) -> Branch | str | None:
        one = self.branch(block)
        return (depth_branches.obstacle(structure, [one]) or one) if isinstance(one, Branch) else one

    def edits_of(
        self, model: oir.Model, structure: Structure, branches: Sequence[Branch], dims: Mapping[str, int]
    ) -> list[Edit]:
        """The edits that take out these branches of a model, one for each; `dims` are its symbolic sizes."""
        ledger, spec = Ledger(model, dims), catalog.spec(self)
        return [
            Edit(
                spec,
                f"block {one.block.index}",
                f"drop its {self.what}",
                frozenset(
                    [*(str(node.name) for node in one.nodes), *(lent(structure, one.block) if one.inputs else ())]
                ),
                self._savings(model, one, ledger, dims),
                anchors=tuple(str(node.name) for node in one.nodes[-1:]),
            )
            for one in branches
        ]

    def _savings(self, model: oir.Model, one: Branch, ledger: Ledger, dims: Mapping[str, int]) -> Savings:
        if is_op(one.join, "Add"):
            return ledger.without(one.nodes)
        copy = model.clone()  # a skip-normalization may hold a bias of the branch
        structure = blocks_of(copy)
        again = self.branch(structure.blocks[one.block.index])
        assert isinstance(again, Branch)
        depth_branches.drop_branches(copy, structure, [again])
        return lossy.saved(model, copy, dims)

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        structure = blocks_of(model)
        chosen: list[Branch] = []
        for edit in edits:
            one = self._found(block_with(structure, edit.anchors[0], edit.site), edit)
            if outcome.take(one.join):
                chosen.append(one)
        reason = depth_branches.obstacle(structure, chosen)
        if reason is not None:
            raise InputError(reason, place=self.pass_name(), hint="drop fewer")
        states, gone = States(model, structure), [one.block for one in chosen if one.inputs or one.outputs]
        depth_branches.drop_branches(model, structure, chosen)
        if gone:
            kept = [block for block in structure.blocks if block not in gone]
            states.renumber(kept)
            states.note(structure.blocks, kept)

    def _found(self, block: Block, edit: Edit) -> Branch:
        """The branch that an edit was proposed for; where other branches are gone, a block may have two of a kind."""
        reason = "another edit has changed it"
        for part in (part for outer in block.parts for part in (outer.inner or (outer,))):
            one = self.branch(replace(block, parts=(part,)))
            if isinstance(one, Branch) and any(node.name == edit.anchors[0] for node in one.nodes):
                return replace(one, block=block)
            reason = one if isinstance(one, str) else reason
        raise InputError(reason, place=edit.site)
