"""Layers as two factors that keep what the data use of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.linear import Linear
from burnish.passes import catalog, factors, rank, rank_search
from burnish.passes.base import Outcome
from burnish.passes.gram import Gram
from burnish.passes.layers import Layer, gram_of, layers, portions
from burnish.passes.lossy import Context, Edit, LossyPass
from burnish.passes.reducers import Magnitudes
from burnish.passes.reservoirs import Several
from burnish.passes.sites import Site


@dataclass(frozen=True)
class ProjectRank(LossyPass):
    """Write linear layers and convolutions as two smaller ones, which keep the part of the outputs that the data use.

    Attributes:
        policy: `grid` proposes `ranks` ranks for each layer, evenly below the one that would save nothing; `energy` the
            one that keeps `share` of the energy of the outputs; `uniform` the largest that leaves `share` of the
            layer's parameters; `validation` the first of the grid that, alone, keeps the divergence of the model's
            outputs within `tolerance`.
        ranks: how many ranks of each layer the grid has.
        multiple: ranks are multiples of it.
        share: of the energy, or of the parameters; see `policy`.
        tolerance: in nats, or as a share of the squares of outputs that are no scores; see `policy`.
        basis: what is kept: `data` the outputs with the most energy, `weight` the largest singular values of the
            weight alone, `activation` those of the weight scaled by the root of the inputs' magnitudes.
        centred: keep the mean output exactly, by a bias.
        joint: `grid` proposes one first factor for layers that read the same value, too.
    """

    policy: Literal["grid", "energy", "uniform", "validation"] = "grid"
    ranks: int = 4
    multiple: int = 8
    share: float = 0.99
    tolerance: float = 0.01
    basis: Literal["data", "weight", "activation"] = "data"
    centred: bool = True
    joint: bool = True
    order: ClassVar[int] = 30
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")

    def __post_init__(self) -> None:
        for name in ("ranks", "multiple"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` is {getattr(self, name)}", place="project-rank", hint="give 1 or more")
        if not self.tolerance > 0:
            raise InputError(f"`tolerance` is {self.tolerance}", place="project-rank", hint="give more than 0")
        if not 0 < self.share <= 1:
            raise InputError(f"`share` is {self.share}", place="project-rank", hint="give a number between 0 and 1")

    @property
    def decided(self) -> bool:
        return self.policy != "grid"

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds `basis` ([groups, features or outputs, rank]), and `mean`."""
        found: dict[str, Layer] = {}
        for name, layer in layers(model).items():
            reason = factors.refusal(model, layer)
            if reason is None and not self._saving((layer,), context, [self.multiple]):
                reason = f"no rank that is a multiple of {self.multiple} saves parameters"
            if reason is None:
                found[name] = layer
            else:
                outcome.skip(layer.node, reason)
        proposed: dict[str, list[Edit]] = {}
        for names, seen in self._seen(model, found, context, outcome):
            group = [found[name] for name in names]
            try:
                proposed[" + ".join(names)] = self._edits(model, names, group, seen, context)
            except InputError as error:
                if len(group) == 1:
                    outcome.skip(group[0].node, error.cause)
        if self.policy == "validation":
            proposed = rank_search.smallest(self, model, proposed, context, self.tolerance, outcome)
        places = {name: index for index, name in enumerate(found)}
        ordered = sorted(proposed, key=lambda site: (places[site.split(" + ")[0]], len(site)))
        return [edit for site in ordered for edit in proposed[site]]

    def _seen(
        self, model: oir.Model, found: Mapping[str, Layer], context: Context, outcome: Outcome
    ) -> Iterator[tuple[list[str], Several]]:
        """Layers that are one edit, and the statistics of what they read, some layers at a time."""
        wanted = {}
        for name, layer in found.items():
            gram = gram_of(layer)
            also = (Magnitudes(axis=gram.axis),) if self.basis == "activation" else ()
            wanted[name] = Several((gram, *also))
        keeps = context.keeps(model, {name: (found[name].input, one.feature_axis) for name, one in wanted.items()})
        for name, keep in keeps.items():
            patches = keep is not None and type(wanted[name].parts[0]) is not Gram
            if isinstance(keep, str) or patches:
                why = keep if isinstance(keep, str) else "its patches mix positions"
                outcome.skip(found[name].node, f"padding cannot be left out: {why}")
                del wanted[name]
        alone = {id(layer): name for name, layer in found.items() if name in wanted}
        linears = [layer for layer in found.values() if isinstance(layer, Linear) and id(layer) in alone]
        shared = factors.together(linears) if self.joint and not self.decided else []
        observer = context.observe(model)
        for part in portions(found, wanted):
            sites = {name: Site(found[name].input, keep) for name in part if not isinstance(keep := keeps[name], str)}
            done = observer.observe(sites, part, context.samples)
            for name, one in done.items():
                assert isinstance(one, Several)
                yield [name], one
                for group in (group for group in shared if alone[id(group[0])] == name):
                    yield [alone[id(layer)] for layer in group], one
        observer.close()

    def _edits(
        self, model: oir.Model, names: Sequence[str], group: Sequence[Layer], seen: Several, context: Context
    ) -> list[Edit]:
        gram = seen.parts[0]
        assert isinstance(gram, Gram)
        if not gram.rows:
            raise InputError("no row was seen: all are padding, or the samples have none")
        weight = factors.stacked(group)
        chosen = self._saving(group, context, self._ranks(weight, group, gram, context))
        if not chosen:
            raise InputError(f"two factors of the rank that `{self.policy}` asks for save nothing")
        gain = factors.gains(model, group[0]) if len(group) == 1 else None
        scaled = weight if gain is None else weight * gain[:, :, None]
        directions = factors.basis(scaled, factors.moment_of(seen, weight, self.basis, self.centred), chosen[-1])
        also = {"mean": gram.mean} if self.centred else {}
        also |= {} if gain is None else {"gain": gain}
        return [
            Edit(
                catalog.spec(self),
                " + ".join(names),
                f"rank {one}",
                frozenset(str(node.name) for layer in group for node in layer.nodes),
                factors.savings(group, one, self.centred, context.dims),
                {"basis": directions[:, :, :one]} | also,
                tuple(str(layer.node.name) for layer in group),
            )
            for one in chosen
        ]

    def _ranks(self, weight: np.ndarray, group: Sequence[Layer], gram: Gram, context: Context) -> list[int]:
        """The ranks that the policy asks for, ascending; they need not save anything."""
        groups, out, size = weight.shape
        even = out * size / (out + size)
        if self.policy in ("grid", "validation"):
            wanted = [even * step / (self.ranks + 1) for step in range(1, self.ranks + 1)]
            return sorted({max(int(one // self.multiple), 1) * self.multiple for one in wanted})
        if self.policy == "energy":
            used = rank.utilized(weight, gram, self.share).utilized
            return [math.ceil(used / groups / self.multiple) * self.multiple]
        least = groups * out * size * (1 - self.share)
        ranks = range(self.multiple, int(even) + 1, self.multiple)
        return [one for one in ranks if self._parameters(group, one, context) >= least][-1:]

    def _parameters(self, group: Sequence[Layer], one: int, context: Context) -> int:
        return factors.savings(group, one, self.centred, context.dims).parameters

    def _saving(self, group: Sequence[Layer], context: Context, ranks: Sequence[int]) -> list[int]:
        return [one for one in ranks if self._parameters(group, one, context) > 0]

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes = {node.name: node for node in model.graph}
        for edit in edits:
            group = [factors.found(nodes[name]) for name in edit.anchors]
            if not outcome.take(group[0].node):
                return
            weight, given = factors.stacked(group), edit.payload
            pair = factors.split(weight, given["basis"], given["basis"].shape[2], given.get("gain"))
            factors.write_alike(model, group, partial(_write, model, weight, pair, given.get("mean")))


def _write(
    model: oir.Model,
    weight: np.ndarray,
    pair: tuple[np.ndarray, np.ndarray],
    mean: np.ndarray | None,
    group: Sequence[Layer],
) -> None:
    factors.write(model, group, pair, factors.biases(group, weight, pair, mean))
