"""Attention layers read the keys and values of an earlier layer, and have no cache of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes import catalog, kv_layout, kv_sharing
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import lending
from burnish.passes.depth_ledger import Ledger
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.kv_search import Order, Search
from burnish.passes.kv_sharing import Average
from burnish.passes.lossy import Context, Edit, LossyPass


@dataclass(frozen=True)
class ShareKv(LossyPass):
    """Let attention layers read the keys and values of an earlier layer: less cache, fewer projections.

    A layer that reads those of another loses its projections of keys and values, their rotary embedding and norm, and
    its cache; the names of the caches that stay are numbered anew. By default each pair of layers is an edit, scored
    alone by what it changes at the output, and chosen together with the edits of other passes.

    Attributes:
        layout: who reads whose, in the terms of arXiv:2410.14442: `pizza-bottom-8`, `sandwich-bottom-8`,
            `lasagna-bottom-8` (8 layers keep theirs), `CLA2`, `YOCO`, or a number for each layer as in `0_0_2_2`.
        map: layers and whose keys and values they read, `7:5+9:5`, numbered from 0.
        search: how pairs are chosen where neither is given: `loss` by what the outputs lose, `dissimilar` or `similar`
            or `random` in KVSharer's way (arXiv:2410.18517), which tries pairs by the distance of their keys.
        layers: how many layers lose their keys and values, without a search among the edits of other passes.
        threshold: KVSharer takes a pair when the cosine of the last hidden states is above it.
        reach: how many layers before it a layer may read at most; 0 for no limit.
        tries: how many pairs `loss` measures anew for each of `layers`, together with those chosen before.
        renumber: name the caches that stay like the first ones, without gaps.
        seed: of `random`.
        average: a layer that is read makes the averages of its keys and values and those that go: `uniform`, or
            `sequential`, by which the last layer counts one half, as MLKV (arXiv:2406.09297) begins its training; with
            `layout`, `map` or `layers`.
    """

    order: ClassVar[int] = 22
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")

    layout: str = ""
    map: str = ""
    search: Order = "loss"
    layers: int = 0
    threshold: float = 0.5
    reach: int = 0
    tries: int = 12
    renumber: bool = True
    seed: int = 0
    average: Average = "none"

    def __post_init__(self) -> None:
        if self.layout and self.map:
            raise InputError("`layout` and `map` say the same", place=self.pass_name(), hint="give one of them")
        wrong = next((name for name in ("layers", "reach", "seed") if getattr(self, name) < 0), None)
        if wrong is not None or self.tries < 1:
            raise InputError(f"`{wrong or 'tries'}` is too small", place=self.pass_name(), hint="give a larger number")

        if self.average != "none" and not (self.layout or self.map or self.layers):
            cause = "what an average loses is not that of pairs alone"
            raise InputError(cause, place=self.pass_name(), hint="give `layout`, `map` or `layers` beside `average`")

    @property
    def decided(self) -> bool:
        return self.layers > 0 and not self.layout and not self.map

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        found = KeyLayers(model)
        if self.layout or self.map:
            wanted = [*self._named(found).items()]
        else:
            wanted = [(taker, donor) for taker in range(len(found.layers)) for donor in self._within(taker)]
        pairs = []
        for taker, donor in wanted:
            reason = found.obstacle(taker, donor)
            if reason is None:
                pairs.append((taker, donor))
            else:
                cause = f"layer {taker} cannot read the keys of layer {donor}: {reason}"
                outcome.skip(found.layers[taker].layer.anchor, cause)
        if self.decided:
            search = Search(self.search, context, self.threshold, self.tries, self.seed)
            pairs = [*search.choose(model, found, pairs, self.layers).items()]
        elif self.search != "loss" and not (self.layout or self.map):
            raise InputError(f"`search={self.search}` has to be told how many layers", hint="give `layers`")
        return self._edits(model, found, pairs, Ledger(model, context.dims))

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if not self.layout and not self.map:
            return super().asked(model, outcome)
        found = KeyLayers(model)
        pairs, place = self._named(found), f"`{catalog.spec(self)}`"
        for taker, donor in pairs.items():
            if found.layers[taker].owner == donor:
                outcome.skip(found.layers[taker].layer.anchor, "it reads these keys and values already", matched=False)
                continue
            reason = found.obstacle(taker, donor)
            if reason is not None:
                raise InputError(f"layer {taker} cannot read the keys of layer {donor}: {reason}", place=place)
        new = [(taker, donor) for taker, donor in pairs.items() if found.layers[taker].owner != donor]
        return self._edits(model, found, new, Ledger(model, {}))

    def _within(self, taker: int) -> range:
        return range(max(0, taker - self.reach) if self.reach else 0, taker)

    def _named(self, found: KeyLayers) -> dict[int, int]:
        """The pairs of `layout` or `map`; who reads one that itself reads another reads that."""
        if self.layout:
            windows = [one.layer.window for one in found.layers]
            return kv_sharing.roots(dict(enumerate(kv_layout.layout(self.layout, len(windows), windows))))
        place = f"`{catalog.spec(self)}`"
        try:
            given = [(int(taker), int(donor)) for taker, donor in (one.split(":") for one in self.map.split("+"))]
        except ValueError:
            raise InputError("`map` is no list of pairs of layers", place=place, hint="as in `map=5:4+6:4`") from None
        pairs = dict(given)
        if len(pairs) < len(given):
            raise InputError("a layer reads two others", place=place, hint="name each layer once before a colon")
        wrong = next((one for pair in given for one in pair if not 0 <= one < len(found.layers)), None)
        if wrong is not None:
            raise InputError(f"there is no layer {wrong}: the model has 0 to {len(found.layers) - 1}", place=place)
        return kv_sharing.roots(pairs)

    def _edits(
        self, model: oir.Model, found: KeyLayers, pairs: Sequence[tuple[int, int]], ledger: Ledger
    ) -> list[Edit]:
        savings, edits = {}, []
        for taker, donor in pairs:
            one, other = found.layers[taker].layer, found.layers[donor].layer
            if taker not in savings:
                savings[taker] = kv_sharing.savings(model, found, taker, donor, ledger)
            behind = (late.layer.anchor for late in found.layers[taker + 1 :])
            own = [node for linear in (one.key, one.value) if linear is not None for node in linear.nodes]
            claims = {str(node.name) for node in (one.anchor, *own)}
            claims |= {lending(one.anchor, other.anchor), *(lending(late, one.anchor) for late in behind)}
            names = (str(one.anchor.name), str(other.anchor.name))
            option = f"keys of layer {donor}"
            edits.append(
                Edit(catalog.spec(self), f"layer {taker}", option, frozenset(claims), savings[taker], anchors=names)
            )
        return edits

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        found = KeyLayers(model)
        numbers = {str(one.layer.anchor.name): one.index for one in found.layers}
        pairs: dict[int, int] = {}
        for edit in edits:
            if any(name not in numbers for name in edit.anchors):
                raise InputError("it is not there any more: another edit has changed it", place=edit.site)
            taker, donor = (numbers[name] for name in edit.anchors)
            if outcome.take(found.layers[taker].layer.anchor):
                pairs[taker] = donor
        pairs = kv_sharing.roots(pairs)
        for taker, donor in pairs.items():
            reason = found.obstacle(taker, donor)
            if reason is not None:
                raise InputError(f"it cannot read the keys of layer {donor}: {reason}", place=f"layer {taker}")
        if pairs:
            kv_sharing.averaged(found, pairs, self.average)
            kv_sharing.share(model, found, pairs, renumber=self.renumber)
