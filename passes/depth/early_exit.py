"""The model ends behind an earlier block: its head reads the state there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.block_drop import drop, obstacle
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import States, anchors, blocks_of, marker
from burnish.passes.depth_ledger import Ledger
from burnish.passes.exits import Head, chain, read_between
from burnish.passes.lossy import Context, Edit, LossyPass, Savings


@dataclass(frozen=True)
class EarlyExit(LossyPass):
    """End the model behind block `layer`, counted from 1; its head, with the final norm, reads the state there.

    Poolings of EarlyBIRD (arXiv:2305.04940) may take the place of the head's own, and states of the `last` layers be
    mixed (BiBERT's mean, arXiv:2109.04588, for a frozen encoder). The outputs stay what they are called and as large
    as they are, but with another pooling or mix they mean something only once the model is healed.

    Attributes:
        layer: of the exit; None leaves the choice to the search, or is the last one where the other options say more.
        pooling: `keep` the head's own, or the `first` token, the `max` or `mean` over tokens without padding, or a
            `weighted` mean whose weights, one for each position, are 1 before they are trained.
        last: how many layers, that of the exit included, are mixed.
        mix: their `mean`, `max`, or a `weighted` sum whose weights are equal before they are trained.
        tokens: positions with a weight of their own, where the number of tokens is not fixed.
    """

    order: ClassVar[int] = 0
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted", "typed")

    layer: int | None = None
    pooling: Literal["keep", "first", "max", "mean", "weighted"] = "keep"
    last: int = 1
    mix: Literal["mean", "max", "weighted"] = "mean"
    tokens: int = 512

    def __post_init__(self) -> None:
        for name, number in (("layer", self.layer), ("last", self.last), ("tokens", self.tokens)):
            if number is not None and number < 1:
                raise InputError(f"`{name}` is {number}", place=self.pass_name(), hint="layers are counted from 1")

    @property
    def _plain(self) -> bool:
        return self.pooling == "keep" and self.last == 1

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        blocks = chain(blocks_of(model))
        if self.layer is not None:
            return self._edits(model, [self.layer], context.dims, outcome)
        return self._edits(model, range(self.last, len(blocks)), context.dims, outcome)

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if self.layer is None and self._plain:
            return super().asked(model, outcome)
        found = self._edits(model, [self.layer or len(blocks_of(model).blocks)], {}, outcome)
        if not found and outcome.skipped[-1].matched:
            raise InputError(outcome.skipped[-1].reason, place=f"`{catalog.spec(self)}`")
        return found

    def _edits(self, model: oir.Model, layers: Sequence[int], dims: Mapping[str, int], outcome: Outcome) -> list[Edit]:
        structure = blocks_of(model)
        blocks, ledger = chain(structure), Ledger(model, dims)
        found = []
        for layer in layers:
            if not self.last <= layer <= len(blocks):
                asked = f"layer {layer}" + (f" with the {self.last - 1} before it" if self.last > 1 else "")
                raise InputError(f"there is no {asked}: the model has {len(blocks)}", place=f"`{catalog.spec(self)}`")
            tail = blocks[layer:]
            if not tail and self._plain:
                outcome.skip(blocks[-1].nodes[-1], "the model ends there already", matched=False)
                continue
            reason = obstacle(structure, tail) or read_between(tail if self._plain else blocks[layer - 1 :])
            savings = reason or self._savings(model, layer, ledger, dims)
            if isinstance(savings, str):
                outcome.skip((tail or blocks)[-1].nodes[-1], savings)
                continue
            names = tuple(name for block in tail for name in anchors(block))
            tapped = (marker(block) for block in blocks[layer - self.last : layer]) if not self._plain else ()
            site = f"blocks {layer} to {len(blocks) - 1}" if tail else "head"
            rival = f"one of the blocks {layer - 1} and {layer}"  # as `remove-blocks` claims where both cannot go
            claims = frozenset({*names, *tapped, rival})
            found.append(Edit(catalog.spec(self), site, f"exit at layer {layer}", claims, savings, anchors=names))
        return found

    def _savings(self, model: oir.Model, layer: int, ledger: Ledger, dims: Mapping[str, int]) -> Savings | str:
        tail = chain(blocks_of(model))[layer:]
        if self._plain and all(block.adders == (None, None) for block in tail):
            return ledger.without((node for block in tail for node in block.nodes), tail[0].entry)
        copy = model.clone()
        names = {name for block in tail for name in anchors(block)}
        try:
            self._leave(copy, names)
        except InputError as error:
            return error.cause
        return lossy.saved(model, copy, dims)

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        for edit in edits:
            if outcome.take(blocks_of(model).blocks[-1].nodes[-1]):
                self._leave(model, set(edit.anchors))

    def _leave(self, model: oir.Model, names: set[str]) -> None:
        """Drop the blocks that have nodes of these names, and feed the head from what is before them."""
        structure = blocks_of(model)
        blocks = chain(structure)
        tail = [block for block in blocks if any(node.name in names for node in block.nodes)]
        kept = blocks[: len(blocks) - len(tail)]
        reason = obstacle(structure, tail)
        if reason is not None or len(kept) < self.last and not self._plain:
            raise InputError(reason or "the layers of the exit are not there any more", place=self.pass_name())
        if tail:
            states = States(model, structure)
            drop(model, structure, tail)
            states.note(kept)
        if self._plain:
            return
        head = Head(model, chain(blocks_of(model)), self.last)
        if self.pooling != "keep":
            head.pool(self.pooling, self.mix, self.tokens)
        else:
            head.mix(self.mix)
