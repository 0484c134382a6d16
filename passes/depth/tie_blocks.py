"""Blocks that compute with the weights of another block, which the file then holds once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir import edit as rewiring
from burnish.ir.errors import InputError
from burnish.ir.views.block import Block, Structure
from burnish.ir.walk import main_graphs, walk
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.block_pairs import Different, Pairs, Use
from burnish.passes.depth_blocks import anchors, blocks_of, held
from burnish.passes.depth_ledger import Ledger
from burnish.passes.lossy import Context, Edit, LossyPass


@dataclass(frozen=True)
class TieBlocks(LossyPass):
    """Let a block use the weights of another block that is built alike; the file holds them once.

    Every block runs as before, with a cache and masks of its own: the file gets smaller, not faster. What is no weight
    (windows, scales that depend on the layer, rotary tables) has to be equal. Which blocks share is found by the
    search here; Dynamic Layer Tying (arXiv:2401.12819) learns it.

    Attributes:
        map: blocks and whose weights they take, `5:4+6:4`, numbered from 0 as `burnish inspect --blocks` shows them.
        reach: how many blocks before it the weights may be taken from, where the search chooses.
    """

    order: ClassVar[int] = 20
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")

    map: str = ""
    reach: int = 2

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise InputError(f"`reach` is {self.reach}", place=self.pass_name(), hint="give a number of blocks")

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        structure = blocks_of(model)
        if self.map:
            pairs = list(self._named(structure))
        else:
            pairs = [
                (block, donor)
                for stack in structure.stacks
                for place, block in enumerate(stack.blocks)
                for donor in reversed(stack.blocks[max(0, place - self.reach) : place])
                if block.hash == donor.hash
            ]
        return self._edits(model, pairs, context.dims, outcome)

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if not self.map:
            return super().asked(model, outcome)
        found = self._edits(model, list(self._named(blocks_of(model))), {}, outcome)
        refused = next((skip for skip in outcome.skipped if skip.matched), None)
        if refused is not None:
            raise InputError(refused.reason, place=f"`{catalog.spec(self)}`")
        return found

    def _named(self, structure: Structure) -> Iterator[tuple[Block, Block]]:
        """The pairs of `map`, those of a block with itself left out."""
        blocks, place = structure.blocks, f"`{catalog.spec(self)}`"
        try:
            pairs = [(int(taker), int(donor)) for taker, donor in (one.split(":") for one in self.map.split("+"))]
        except ValueError:
            raise InputError("`map` is no list of pairs of blocks", place=place, hint="as in `map=5:4+6:4`") from None
        takers = dict(pairs)
        if len(takers) < len(pairs):
            raise InputError("a block takes weights twice", place=place, hint="name each block once before a colon")
        for taker, donor in takers.items():
            wrong = next((one for one in (taker, donor) if not 0 <= one < len(blocks)), None)
            if wrong is not None:
                raise InputError(f"there is no block {wrong}: the model has 0 to {len(blocks) - 1}", place=place)
            if taker != donor and takers.get(donor, donor) != donor:
                hint = f"write `{taker}:{takers[donor]}`"
                raise InputError(f"block {donor} takes the weights of another itself", place=place, hint=hint)
            if taker != donor:
                yield blocks[taker], blocks[donor]

    def _edits(
        self, model: oir.Model, pairs: Sequence[tuple[Block, Block]], dims: Mapping[str, int], outcome: Outcome
    ) -> list[Edit]:
        known, ledger, spec = Pairs(model), Ledger(model, dims), catalog.spec(self)
        found = []
        for taker, donor in pairs:
            try:
                uses = known.paired(taker, donor)
            except Different as why:
                outcome.skip(taker.nodes[-1], f"block {taker.index} cannot be like block {donor.index}: {why}")
                continue
            kept = held(donor, abs(taker.index - donor.index) - 1)
            if kept is None:
                outcome.skip(taker.nodes[-1], f"block {donor.index} has fewer nodes than there are blocks between them")
                continue
            if not uses:
                reason = f"block {taker.index} has the weights of block {donor.index} already"
                outcome.skip(taker.nodes[-1], reason, matched=False)
                continue
            savings = ledger.unread([(use.node, use.index) for use in uses])
            claims = frozenset({*anchors(taker), *kept})
            option, places = f"weights of block {donor.index}", tuple(_places(uses))
            found.append(Edit(spec, f"block {taker.index}", option, claims, savings, anchors=places))
        return found

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        constants = {str(name): value for graph in main_graphs(model) for name, value in graph.initializers.items()}
        nodes = {str(node.name): node for node in walk(model)}
        planned = [(edit, _found(edit, constants, nodes)) for edit in edits]
        for _, uses in planned:
            if not outcome.take(uses[0][0]):
                return
            for node, index, other in uses:
                rewiring.set_input(node, index, other)


def _places(uses: Sequence[Use]) -> Iterator[str]:
    """Four texts for each weight: its name, that of the other, and the node and number of the input that reads it.

    The latter two are empty where the block alone reads the weight: then all that reads it will read the other, also
    where another edit has written the block's nodes in another way.
    """
    places = {(use.node, use.index) for use in uses}
    for use in uses:
        alone = all((one.node, one.idx) in places for one in use.own.uses())
        yield from (str(use.own.name), str(use.other.name))
        yield from ("", "") if alone else (str(use.node.name), str(use.index))


def _found(
    edit: Edit, constants: Mapping[str, oir.Value], nodes: Mapping[str, oir.Node]
) -> list[tuple[oir.Node, int, oir.Value]]:
    """The inputs that an edit changes, and what they will read."""
    found: dict[tuple[oir.Node, int], oir.Value] = {}
    for own, other, name, index in zip(*[iter(edit.anchors)] * 4, strict=True):
        old, new = constants.get(own), constants.get(other)
        if old is None or new is None or (name and name not in nodes):
            raise InputError("it is not there any more: another edit has changed it", place=edit.site)
        places = [(nodes[name], int(index))] if name else [(use.node, use.idx) for use in old.uses()]
        found.update(dict.fromkeys(places, new))
    return [(node, index, other) for (node, index), other in found.items()]
