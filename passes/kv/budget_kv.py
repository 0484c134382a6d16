"""A decoder keeps of a prompt only what the budget of each cache has room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes import catalog, kv_budget, kv_needs, lossy
from burnish.passes.base import Outcome
from burnish.passes.budget import Amount, amount
from burnish.passes.kv_budget import Budget, BudgetedCache
from burnish.passes.kv_cuts import Cuts, Group
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.lossy import Context, Edit, LossyPass


@dataclass(frozen=True)
class BudgetKv(LossyPass):
    """Let the caches of a decoder keep a part of the prompt: for each head the keys that its last queries look at.

    Layers may have caches of different lengths then, `position_ids` and the mask count every token as before, and one
    input more tells which slots hold nothing. What a runtime runs once behind the prompt is written beside the model.

    Attributes:
        keep: how much a cache keeps on average, `20%` of the prompt or a number of tokens.
        by: which layers keep more: none (`uniform`), those whose attention is spread over more keys (`mass`), or whose
            result needs more keys (`cosine`); measured on samples (ZigZagKV, arXiv:2412.09036).
        window: the last tokens, whose queries say what is kept (SnapKV, arXiv:2404.14469); they are kept in any case.
        pool: weights of so many neighbouring keys are averaged; an odd number.
        share: the part of the attention, or the cosine, that a layer's need is counted for.
        floor: the part of the average that every cache keeps.
    """

    order: ClassVar[int] = 60
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")
    breaks: ClassVar[tuple[str, ...]] = ("typed",)
    saves: ClassVar[bool] = False
    ports: ClassVar[bool] = True

    keep: str = "20%"
    by: Literal["uniform", "mass", "cosine"] = "cosine"
    window: int = 32
    pool: int = 5
    share: float = 0.9
    floor: float = 0.2

    def __post_init__(self) -> None:
        place = self.pass_name()
        if self.window < 1:
            raise InputError(f"`window` is {self.window}", place=place, hint="give at least 1")
        if self.pool < 1 or self.pool % 2 == 0:
            raise InputError(f"`pool` is {self.pool}", place=place, hint="give an odd number, 1 for no average")
        if not 0 < self.share < 1 or not 0 <= self.floor <= 1:
            raise InputError("`share` and `floor` are parts of 1", place=place, hint="such as 0.9 and 0.2")
        kept = self.amount()
        if kept.number <= 0 or not kept.relative and kept.number != int(kept.number):
            raise InputError(f"`keep={self.keep}` keeps nothing that can be counted", place=place, hint=_KEEP)

    def amount(self) -> Amount:
        """What `keep` says."""
        try:
            found = amount(self.keep, "--max-size")
        except InputError as error:
            raise InputError(error.cause, place=self.pass_name(), hint=_KEEP) from None
        assert found is not None
        return found

    @property
    def decided(self) -> bool:
        return self.by != "uniform"

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        if self.by == "uniform":
            return self.asked(model, outcome)
        groups = self._groups(model, outcome)
        if not groups:
            return []
        chosen = [group.owner.index for group in groups]
        found = kv_needs.needs(model, chosen, context, by=self.by, share=self.share, window=self.window, pool=self.pool)
        return self._edits(model, groups, found.tolist())

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if self.by != "uniform":
            return super().asked(model, outcome)
        groups = self._groups(model, outcome)
        return self._edits(model, groups, [1.0] * len(groups))

    def _groups(self, model: oir.Model, outcome: Outcome) -> list[Group]:
        """The caches that can be smaller; none where they are already."""
        if kv_budget.read(model) is not None:
            outcome.skip(next(iter(model.graph)), "its caches have budgets already", matched=False)
            return []
        try:
            groups = Cuts(KeyLayers(model)).groups
        except InputError as error:
            raise InputError(error.cause, place=f"`{self.pass_name()}`", hint=error.hint) from None
        for one in groups:
            if one.refusal is not None:
                outcome.skip(one.owner.layer.anchor, one.refusal)
        found = [one for one in groups if one.refusal is None]
        if not found:
            causes = "; ".join(dict.fromkeys(str(one.refusal) for one in groups))
            raise InputError(f"no cache can be smaller: {causes}", place=f"`{self.pass_name()}`")
        return found

    def _edits(self, model: oir.Model, groups: Sequence[Group], weights: Sequence[float]) -> list[Edit]:
        if not groups:
            return []
        kept = kv_budget.shares(weights, self.amount(), self.floor)
        copy, numbers = model.clone(), [one.owner.index for one in groups]
        cuts = Cuts(KeyLayers(copy))
        cuts.apply([one for one in cuts.groups if one.owner.index in numbers], self.window)
        savings = replace(lossy.saved(model, copy, {}), macs=None)
        names = tuple(str(one.owner.layer.anchor.name) for one in groups)
        option, claims = f"keep {self.keep}, {self.by}", frozenset({"the caches"})
        return [Edit(catalog.spec(self), "caches", option, claims, savings, {"keep": kept}, names)]

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        for edit in edits:
            cuts = Cuts(KeyLayers(model))
            known = {str(one.owner.layer.anchor.name): one for one in cuts.groups if one.refusal is None}
            if any(name not in known for name in edit.anchors):
                raise InputError("a cache is not there any more: another edit has changed it", place=edit.site)
            groups = [known[name] for name in edit.anchors]
            if not outcome.take(groups[0].owner.layer.anchor):
                return
            hidden, queries = cuts.apply(groups, self.window)
            caches = [
                BudgetedCache(_names(one.past), _names(one.present), seen, int(keep))
                for one, seen, keep in zip(groups, queries, edit.payload["keep"], strict=True)
            ]
            kv_budget.write(model, Budget(hidden, self.window, self.pool, self.amount().relative, tuple(caches)))


_KEEP = "write `keep=20%` for a part of the prompt, or `keep=256` for so many tokens"


def _names(pair: tuple[oir.Value, oir.Value]) -> tuple[str, str]:
    return str(pair[0].name), str(pair[1].name)
