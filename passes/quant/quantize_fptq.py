"""Linear layers with weights of 4 bits and activations of 8, whose wide channels are divided first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.linear import find_linear
from burnish.ir.walk import walk
from burnish.passes import catalog, equalization
from burnish.passes.base import Outcome
from burnish.passes.equalization import Group, Plan, Seen, Source, Sources
from burnish.passes.kernels_of_integers import ROUNDED, Blocks, EachRun, Kernel
from burnish.passes.layers import others
from burnish.passes.lossy import Context, Edit, LossyPass, Savings, Undecided
from burnish.passes.moments import moments
from burnish.passes.weight_rounding import MEASURED
from burnish.passes.weight_sites import LEAST_BLOCK

_PLACE = "quantize-fptq"
_ROUNDINGS = Literal["nearest", "mse", "hqq", "gptq"]
_POWERS = (1.0, 0.75, 0.5, 0.25)
"""Of what channels are divided by, that are tried by error."""

_FOLDED, _KEPT = 0.98, 0.9
"""Equalizing has to bring the error down to this share: where it costs nothing, and where a product is kept."""


@dataclass(frozen=True)
class QuantizeFptq(LossyPass):
    """Let linear layers multiply weights of 4 bits and activations of 8, with wide channels divided first (FPTQ).

    The channels of what layers read are divided by m / log2(2 + m), m their largest magnitude on samples, and weights
    multiplied; see Li et al. (2023), arXiv:2308.15987. Where every reader is such a layer, a norm or layer before takes
    the division in, else a product is kept. ONNX Runtime has no kernel for activations of a fixed scale and weights of
    4 bits: MatMulNBits finds the scales of activations in each run, for each block of each row.

    Attributes:
        route: which values are divided: `error` those where the layers' error, measured on rows of the samples, becomes
            less, by the power of the paper's divisors (1, 3/4, 1/2, 1/4) that is best; `thresholds` those whose largest
            magnitude lies between `v0` and `v1`, as in the paper.
        v0: for `thresholds`: values of a lower magnitude are left as they are.
        v1: for `thresholds`: so are those of a higher one.
        lowering: `int4` for MatMulNBits; `int8` for weights of 8 bits and DynamicQuantizeMatMul or
            MatMulIntegerToFloat; `both` lets a budget choose for each layer.
        block: how many weights of an output share a scale in 4 bits, at most: a power of two from 16 on. It is halved,
            down to 32 (16 for so few inputs), until it divides the inputs.
        rounding: of weights in 4 bits, as in `quantize-weights`; `gptq` sees what layers read behind the division. In 8
            bits all but `nearest` are `mse`.
        memory: MiB of statistics that are held at once while samples are run, and of activations; less takes more runs.
    """

    route: Literal["error", "thresholds"] = "error"
    v0: float = 15.0
    v1: float = 150.0
    lowering: Literal["int4", "int8", "both"] = "int4"
    block: int = 128
    rounding: _ROUNDINGS = "mse"
    memory: int = 1024
    order: ClassVar[int] = 40
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")
    prepare: ClassVar[tuple[str, ...]] = ("fold-codebook",)

    def __post_init__(self) -> None:
        if self.block < LEAST_BLOCK or self.block & (self.block - 1):
            hint = f"give a power of two from {LEAST_BLOCK} on"
            raise InputError(f"`block` is {self.block}", place=_PLACE, hint=hint)
        if not 0 <= self.v0 <= self.v1:
            raise InputError(f"`v0` is {self.v0} and `v1` {self.v1}", place=_PLACE, hint="give 0 <= v0 <= v1")
        if self.memory < 1:
            raise InputError(f"`memory` is {self.memory}", place=_PLACE, hint="give some MiB")

    @property
    def decided(self) -> bool:
        return self.lowering != "both"

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        raise Undecided(
            "`quantize-fptq` has to see how wide the channels of activations are", hint="give samples with `--data`"
        )

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds what the inputs of layers are divided by, under their nodes."""
        kernels = self._kernels
        found, left = equalization.groups(model)
        for layer, reason in left:
            outcome.skip(layer.node, reason)
        for node, reason in others(model):
            outcome.skip(node, reason)
        for group in found:
            for name, layer in list(group.layers.items()):
                why = next((why for one in kernels if (why := one.refusal(model, layer)) is not None), None)
                if why is not None:
                    outcome.skip(layer.node, why)
                    del group.layers[name]
        sources = Sources(model)
        plans: dict[Kernel, dict[Group, Plan]] = {kernel: {} for kernel in kernels}
        rest = [one for one in found if one.layers]
        for group, seen in equalization.observed(model, rest, context, self.memory << 20):
            if isinstance(seen, str):
                for layer in group.layers.values():
                    outcome.skip(layer.node, seen)
                continue
            source = sources.of(group)
            for kernel in kernels:
                plans[kernel][group] = Plan(group, self._divisors(group, seen, kernel, source), source)
        edits: list[Edit] = []
        for kernel in kernels:
            ordered = [plans[kernel][group] for group in found if group in plans[kernel]]
            made = [self._edit(kernel, part) for part in equalization.joined(ordered)]
            edits += self._measured(model, kernel, made, context, outcome) if isinstance(kernel, Blocks) else made
        return edits

    def _measured(
        self, model: oir.Model, kernel: Blocks, edits: Sequence[Edit], context: Context, outcome: Outcome
    ) -> Sequence[Edit]:
        """The edits with integers that suit what layers read behind the division, where `rounding` asks for them."""
        if self.rounding not in MEASURED:
            return edits
        copy = model.clone()
        nodes, sources = {str(node.name): node for node in walk(copy)}, Sources(copy)
        for edit in edits:
            equalization.divide(copy, edit, nodes, sources)
        found = {name: one for edit in edits for name in edit.anchors if (one := find_linear(nodes[name])) is not None}
        made: dict[str, dict[str, np.ndarray]] = {}
        owner = {name: edit.key for edit in edits for name in edit.anchors}
        for name, moment in moments(copy, {name: [one] for name, one in found.items()}, context, self.memory << 20):
            if not isinstance(moment, str):
                made[name], lost = kernel.measured(found[name], moment)
                outcome.errors[owner[name]] = max(lost, outcome.errors.get(owner[name], 0.0))
        own = [(edit, {f"{k} {n}": a for n in edit.anchors for k, a in made.get(n, {}).items()}) for edit in edits]
        return [replace(edit, payload={**edit.payload, **more}) for edit, more in own]

    @property
    def _kernels(self) -> list[Kernel]:
        kernels: dict[str, Kernel] = {
            "int4": Blocks(self.block, self.rounding),
            "int8": EachRun("minmax" if self.rounding == "nearest" else "mse"),
        }
        return [one for name, one in kernels.items() if self.lowering in (name, "both")]

    def _divisors(self, group: Group, seen: Seen, kernel: Kernel, source: Source | str) -> np.ndarray | None:
        """What the channels are divided by; None where they are left as they are."""
        scale = equalization.logarithmic(seen.largest)
        if not equalization.fitting(group, scale):
            return None
        if self.route == "thresholds":
            return scale if self.v0 < seen.largest.max(initial=0.0) < self.v1 else None
        weights = [layer.weight() for layer in group.layers.values()]
        tried = {power: scale**power for power in _POWERS}
        errors = {power: kernel.error(seen.rows, weights, one) for power, one in tried.items()}
        best = min(_POWERS, key=lambda power: errors[power])
        less = errors[best] < (_KEPT if isinstance(source, str) else _FOLDED) * kernel.error(seen.rows, weights)
        return tried[best] if less else None

    def _edit(self, kernel: Kernel, part: Sequence[Plan]) -> Edit:
        claims, payload = set[str](), dict[str, np.ndarray]()
        savings: list[Savings] = []
        for plan in part:
            savings += [kernel.savings(layer) for layer in plan.group.layers.values()]
            claims |= {str(node.name) for layer in plan.group.layers.values() for node in layer.nodes}
            if plan.scale is not None:
                source = plan.folded
                savings.append(equalization.savings(plan.group, source))
                claims |= set(equalization.claimed(source))
                kind = equalization.KEPT if source is None else equalization.FOLDED
                payload |= {f"{kind}{layer.node.name}": plan.scale for layer in plan.group.layers.values()}
        anchors = tuple(str(layer.node.name) for plan in part for layer in plan.group.layers.values())
        how = " + ".join(dict.fromkeys(plan.words for plan in part))
        total = Savings(sum(one.parameters for one in savings), sum(one.bytes for one in savings), 0)
        site = next(iter(part[0].group.layers))
        what = kernel.words(plan.group.features for plan in part)
        return Edit(catalog.spec(self), site, f"{what}, {how}", frozenset(claims), total, payload, anchors)

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes, sources = {str(node.name): node for node in walk(model)}, Sources(model)
        for edit in edits:
            if not outcome.take(nodes[edit.anchors[0]]):
                return
            equalization.divide(model, edit, nodes, sources)
            kernel = next(one for one in self._kernels if edit.option.startswith(one.name))
            for name in edit.anchors:
                layer = find_linear(nodes[name])
                assert layer is not None
                lost = kernel.write(model, layer, {key: edit.payload.get(f"{key} {name}") for key in ROUNDED})
                if lost is not None:
                    outcome.errors[edit.key] = max(lost, outcome.errors.get(edit.key, 0.0))
