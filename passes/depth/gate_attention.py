"""The attention of blocks is computed for those inputs that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.views.block import Structure
from burnish.passes import catalog, depth_branches, gates, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import block_with, blocks_of, lent, numbered
from burnish.passes.depth_parts import DropBranches
from burnish.passes.gates import Padding, Place, Router
from burnish.passes.lossy import Context, Edit, LossyPass, Savings
from burnish.passes.routers import Gated, Routed, Routing

ALWAYS, LEAST = 0.98, 0.02
"""The shares of rows from which on a gate counts as closed for all, and as closed for some."""


@dataclass(frozen=True)
class GateAttention(LossyPass):
    """Let a router decide row by row whether the attention of a block is computed (Router-Tuning, arXiv:2410.13184).

    A router is one linear score of the mean of the stream over a row's tokens, padding left out. Routers alone are
    learned, on the samples, until the wanted share of the attentions is skipped. A skipped attention adds nothing. It
    is in an `If`, which saves time only where all rows of a call skip. Decoders decide when a row begins, and hold the
    decision. Where no router is better than the same decision for all rows, attentions are dropped for good.

    Attributes:
        skip: the share of the attentions of all rows that is to be skipped, more than 0 and less than 1.
        form: `dynamic` decides at run time; `static` drops for good those that are skipped for nearly all rows, with
            their caches, and leaves the others as they are.
        blocks: only the attention of these has a gate, as in `3+4+12`, numbered as `burnish inspect --blocks` shows
            them.
        rounds: of measuring: at first with all other gates open, then with the routers of the round before.
        steps: of training behind what was measured, with straight-through gradients; it helps sometimes.
        rate: the learning rate of AdamW.
        seed: of the split and the order of the samples.
    """

    order: ClassVar[int] = 12
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")
    by_row: ClassVar[bool] = True

    skip: float = 0.3
    form: Literal["dynamic", "static"] = "dynamic"
    blocks: str = ""
    rounds: int = 3
    steps: int = 0
    rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        place = self.pass_name()
        if not 0 < self.skip < 1:
            raise InputError(f"`skip` is {self.skip}", place=place, hint="give a share, such as 0.3")
        if self.steps < 0 or self.seed < 0 or self.rounds < 1 or not 0 < self.rate < float("inf"):
            what = "`steps` and `seed` are not negative, `rounds` is at least 1, and `rate` is more than 0"
            raise InputError(what, place=place)

    @property
    def decided(self) -> bool:
        return True

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds the router."""
        structure, facts = blocks_of(model), Inference(model)
        chosen = numbered(structure, self.blocks, "blocks") if self.blocks else structure.blocks
        found: list[Place] = []
        for block in chosen:
            one = gates.place_of(model, block, facts)
            if isinstance(one, Place):
                found.append(one)
            elif one is not None:
                outcome.skip(block.nodes[-1], f"block {block.index}: {one}")
        if not found and not outcome.skipped:
            raise InputError("no block of the model has attention", hint="see `burnish inspect --blocks`")
        paddings = self._paddings(model, found, context, outcome)
        found = [one for one in found if one in paddings]
        if not found:
            return []
        if context.routes is None:
            raise InputError("routers are learned in torch", hint="install the extra `torch`", place=self.pass_name())
        places = [
            Gated(str(one.branch.result.name), str(one.stream.name), one.features, paddings[one]) for one in found
        ]
        wanted = Routing(places, self.skip, self.rounds, self.steps, self.rate, self.seed)
        routed = context.routes(model, wanted, context.samples)
        edits = []
        for number, one in enumerate(found):
            closed, block = routed.closed[number], one.branch.block
            same = self.form == "static" or not routed.routers[number].weight.any()
            reason = depth_branches.obstacle(structure, [one.branch]) if same and closed >= ALWAYS else None
            if closed < (ALWAYS if same else LEAST):
                reason = f"block {block.index}: its router skips {closed:.0%} of the samples' rows"
            if reason is not None:
                outcome.skip(one.branch.join, reason)
            elif same:
                (edit,) = _dropping().edits_of(model, structure, [one.branch], context.dims)
                edits.append(replace(edit, spec=catalog.spec(self)))
            else:
                edits.append(self._edit(model, structure, one, routed, number, paddings[one], context))
        return edits

    def _paddings(
        self, model: oir.Model, found: Sequence[Place], context: Context, outcome: Outcome
    ) -> dict[Place, Padding | None]:
        """The places whose padding a router can leave out, each with where it is told."""
        keeps = context.keeps(model, {str(number): (one.stream, -1) for number, one in enumerate(found)})
        told: dict[Place, Padding | None] = {}
        for number, one in enumerate(found):
            padding = gates.padding_of(keeps[str(number)])
            if isinstance(padding, str):
                outcome.skip(one.branch.join, f"block {one.branch.block.index}: {padding}")
            else:
                told[one] = padding
        return told

    def _edit(
        self, model: oir.Model, structure: Structure, one: Place, routed: Routed, number: int,
        padding: Padding | None, context: Context,
    ) -> Edit:  # fmt: skip
        router, branch = routed.routers[number], one.branch
        payload = {"weight": router.weight, "bias": np.array(router.bias)}
        anchors = [str(branch.nodes[-1].name)]
        if padding is not None:
            anchors.append(padding.input)
            payload["padding"] = np.array([padding.kept, padding.additive, padding.tail], np.int64)
        names = [str(node.name) for node in branch.nodes]
        claims = frozenset([*names, *(lent(structure, branch.block) if branch.inputs else ())])
        option = f"skip it for {routed.closed[number]:.0%} of the rows"
        site = f"block {branch.block.index}"
        shares = ((routed.closed[number], -1.0), (1 - routed.closed[number], 1.0))
        cases = tuple((share, {**payload, **_same(one, score)}) for share, score in shares)
        edit = Edit(catalog.spec(self), site, option, claims, Savings(), payload, tuple(anchors), cases=cases)
        after = lossy.apply(model, [edit], [self])[0]
        return replace(edit, savings=lossy.saved(model, after, context.dims))

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        gone = [edit for edit in edits if not edit.payload]
        if gone:
            _dropping().apply(model, gone, outcome)
        structure, facts = blocks_of(model), Inference(model)
        chosen = []
        for edit in (edit for edit in edits if edit.payload):
            one = gates.place_of(model, block_with(structure, edit.anchors[0], edit.site), facts)
            if not isinstance(one, Place):
                raise InputError(one or "another edit has changed it", place=edit.site)
            if outcome.take(one.branch.join):
                chosen.append((one, edit))
        for one, edit in chosen:
            padding = None
            if "padding" in edit.payload:
                kept, additive, tail = (int(number) for number in edit.payload["padding"])
                padding = Padding(edit.anchors[1], kept, bool(additive), bool(tail))
            router = Router(edit.payload["weight"], float(edit.payload["bias"]))
            gates.write(model, one, facts, router, padding)


def _same(one: Place, score: float) -> dict[str, np.ndarray]:
    """What decides alike for all rows."""
    return {"weight": np.zeros(one.features), "bias": np.array(score)}


def _dropping() -> DropBranches:
    """The pass that drops attention for good."""
    (one,) = catalog.parse("drop-attention")
    assert isinstance(one, DropBranches)
    return one
