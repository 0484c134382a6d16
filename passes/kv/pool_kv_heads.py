"""Several heads of keys and values become one that their queries share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import attention_layers
from burnish.passes import catalog, kv_families, kv_pooling, kv_trials
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import lending
from burnish.passes.kv_families import Family
from burnish.passes.kv_heads import Way
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.lossy import Context, Edit, LossyPass, Savings


@dataclass(frozen=True)
class PoolKvHeads(LossyPass):
    """Let the queries of several heads share one head of keys and values: a smaller cache, smaller projections.

    A layer with as many heads of keys and values as of queries becomes one with grouped queries (arXiv:2305.13245), or
    with a single head for all (arXiv:1911.02150). Each layer is an edit. Layers that read the keys and values of
    another change together with it.

    Attributes:
        groups: how many heads of keys and values a layer keeps; 0 to search among the divisors of their number.
        layers: numbers of layers, counted from 0 among those with keys and values of their own, with + between them,
            as in `2+3`; all when empty.
        how: `fit` chooses which heads go together, and for each group the head from which queries and outputs, whose
            weights change, lose the least on the samples, or by the weights alone where there are none; `mean`,
            `first` or `random` of neighbouring heads.
        seed: of `random`.
    """

    order: ClassVar[int] = 21
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")

    groups: int = 0
    layers: str = ""
    how: Way = "fit"
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = next((name for name in ("groups", "seed") if getattr(self, name) < 0), None)
        if wrong is not None:
            raise InputError(f"`{wrong}` is negative", place=self.pass_name(), hint="give 0 or more")

    @property
    def everywhere(self) -> bool:
        return self.groups > 0

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds `groups` and, for each layer that reads the keys, a `moment`."""
        found = KeyLayers(model)
        wanted = [(family, number) for family in self._chosen(found) for number in self._numbers(family)]
        left = []
        for family, number, saved in self._tried(found, wanted, context.dims, outcome):
            if saved.parameters > 0:
                left.append((family, number, saved))
            else:
                outcome.skip(family.layer.anchor, f"{_heads(number)} take no less, with what repeats them")
        payloads: dict[Family, dict[str, np.ndarray]] = {family: {} for family, _, _ in left}
        if self.how == "fit":
            for family, seen in kv_trials.observed(model, payloads, context):
                if isinstance(seen, str):
                    outcome.skip(family.layer.anchor, seen)
                    del payloads[family]
                else:
                    payloads[family] |= {f"moment {i}": one for i, one in enumerate(seen)}
        return [
            self._edit(found, family, number, saved, payloads[family])
            for family, number, saved in left
            if family in payloads
        ]

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if not self.groups:
            return super().asked(model, outcome)
        found = KeyLayers(model)
        place, wanted = f"`{catalog.spec(self)}`", []
        for family in self._chosen(found):
            count, first = family.layer.kv_heads, family.readers[0].index
            if count <= self.groups:
                outcome.skip(family.layer.anchor, f"it has {_heads(count)} already", matched=False)
                continue
            if count % self.groups:
                cause = f"layer {first} has {_heads(count)}, which {self.groups} does not divide"
                raise InputError(cause, place=place)
            wanted.append((family, self.groups))
        left = self._tried(found, wanted, {}, outcome)
        if self.layers and len(left) < len(wanted):
            raise InputError(outcome.skipped[-1].reason, place=place)
        return [self._edit(found, *one, {}) for one in left]

    def _tried(
        self, found: KeyLayers, wanted: Sequence[tuple[Family, int]], dims: Mapping[str, int], outcome: Outcome
    ) -> list[tuple[Family, int, Savings]]:
        left, said = [], set()
        for miss in attention_layers(found.model, found.facts):
            if isinstance(miss, Miss):
                outcome.skip(miss.anchor, miss.reason, matched=False)
        for family, number, saved in kv_trials.tried(found, wanted, self.how, dims):
            if not isinstance(saved, str):
                left.append((family, number, saved))
            elif family not in said:
                outcome.skip(family.layer.anchor, saved)
                said.add(family)
        return left

    def _chosen(self, found: KeyLayers) -> list[Family]:
        families = kv_families.families(found)
        if not self.layers:
            return families
        place = f"`{catalog.spec(self)}`"
        own = {one.readers[0].index: one for one in families}
        try:
            numbers = [int(one) for one in self.layers.split("+")]
        except ValueError:
            raise InputError("`layers` is no list of layers", place=place, hint="as in `layers=2+3`") from None
        wrong = next((one for one in numbers if one not in own), None)
        if wrong is not None:
            known = ", ".join(map(str, own))
            raise InputError(f"layer {wrong} has no keys and values of its own; these have: {known}", place=place)
        return [own[one] for one in sorted(set(numbers))]

    def _numbers(self, family: Family) -> list[int]:
        """The numbers of heads that are proposed for a layer."""
        count = family.layer.kv_heads
        return [number for number in range(count - 1, 0, -1) if count % number == 0 and self.groups in (0, number)]

    def _edit(
        self, found: KeyLayers, family: Family, number: int, saved: Savings, payload: Mapping[str, np.ndarray]
    ) -> Edit:
        first, layer = family.readers[0], family.layer
        nodes = [part.holder for one in family.readers for part in one.layer.projections if part is not None]
        claims = {str(node.name) for node in (*nodes, *(one.layer.anchor for one in family.readers))}
        claims |= {lending(late.layer.anchor, layer.anchor) for late in found.layers[first.index + 1 :]}
        return Edit(
            catalog.spec(self),
            f"layer {first.index}",
            _heads(number),
            frozenset(claims),
            saved,
            {"groups": np.array(number), **payload},
            (str(layer.anchor.name),),
        )

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        found = KeyLayers(model)
        known = {str(one.layer.anchor.name): one for one in kv_families.families(found)}
        wanted = []
        for edit in edits:
            family, number = known.get(edit.anchors[0]), int(edit.payload["groups"])
            if family is None:
                raise InputError("it is not there any more: another edit has changed it", place=edit.site)
            reason = kv_families.obstacle(found, family)
            if reason is not None:
                raise InputError(f"its heads of keys and values cannot become {number}: {reason}", place=edit.site)
            if outcome.take(family.layer.anchor):
                new = kv_trials.weights_of(found, family, number, self.how, edit.payload, self.seed)
                wanted.append((family, number, new))
        if wanted:
            kv_pooling.pool(found, wanted)


def _heads(count: int) -> str:
    return f"{count} {'head' if count == 1 else 'heads'} of keys and values"
