"""LayerNorm and RMSNorm as maps with fixed statistics, which the layers behind them take in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.ir.views.norm import Norm, norms
from burnish.ir.views.parameter import fits
from burnish.passes import catalog, sites
from burnish.passes import replaced_norms as replacing
from burnish.passes.base import Outcome
from burnish.passes.depth_ledger import Ledger
from burnish.passes.lossy import Context, Edit, LossyPass, Savings
from burnish.passes.norm_fit import NormFit, by_statistics, fitted
from burnish.passes.sites import Site

_OPSET = 9
"""The first with a BatchNormalization whose statistics are plain inputs."""


@dataclass(frozen=True)
class ReplaceNorm(LossyPass):
    """Replace LayerNorm and RMSNorm by maps with fixed statistics, which `merge-repbn` folds into the layers behind.

    A norm computes a mean and a deviation for each row; its replacement does the same to every row. SLAB
    (arXiv:2405.11582) trains `BN(x) + eta * x` in its place. Here it starts as the map that is nearest to the norm on
    the samples, and healing trains it while the norm fades out. What no linear layer takes in is left as Mul and Add.

    Attributes:
        with_: `repbn` writes `BN(x) + eta * x`, and healing normalizes by the statistics of each step's rows; `affine`
            writes `scale * x + shift`, which healing trains as it is.
        start: `fitted` begins with the least squares of the norm's output on its input, in each channel; `statistics`
            divides each channel by its own deviation, with the gain and bias of the norm.
    """

    with_: Literal["repbn", "affine"] = "repbn"
    start: Literal["fitted", "statistics"] = "fitted"
    order: ClassVar[int] = 15
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")

    @property
    def decided(self) -> bool:
        return True

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds the weights of the replacement."""
        found: dict[str, Norm] = {}
        for norm in norms(model):
            reason = _refusal(model, norm)
            if reason is None:
                found[str(norm.nodes[-1].name)] = norm
            else:
                outcome.skip(norm.nodes[-1], reason, matched=norm.kind in ("layer", "rms"))
        seen = self._seen(model, found, context, outcome)
        ledger = Ledger(model, context.dims)
        edits = []
        for name, one in seen.items():
            norm = found[name]
            try:
                payload = self._weights(norm, one)
            except InputError as error:
                outcome.skip(norm.nodes[-1], error.cause)
                continue
            claims = frozenset(str(node.name) for node in norm.nodes)
            savings = _savings(ledger.without(norm.nodes), norm, payload)
            edits.append(Edit(catalog.spec(self), name, self.with_, claims, savings, payload, (name,)))
        return edits

    def _seen(
        self, model: oir.Model, found: Mapping[str, Norm], context: Context, outcome: Outcome
    ) -> dict[str, NormFit]:
        """What the samples tell of each norm."""
        keeps = context.keeps(model, {name: (norm.input, -1) for name, norm in found.items()})
        places: dict[str, Site] = {}
        for name, keep in keeps.items():
            if isinstance(keep, str):
                outcome.skip(found[name].nodes[-1], f"padding cannot be left out: {keep}")
            else:
                places[name] = Site(found[name].input, keep)
        if not places:
            return {}
        wanted = {name: NormFit(found[name].kind == "layer", found[name].epsilon) for name in places}
        observer = context.observe(model)
        done = observer.observe(places, wanted, context.samples)
        observer.close()
        return {name: one for name, one in done.items() if isinstance(one, NormFit)}

    def _weights(self, norm: Norm, seen: NormFit) -> dict[str, np.ndarray]:
        former = replacing.former(norm)
        start = fitted if self.start == "fitted" else by_statistics
        fit = start(seen, former.gain, former.bias)
        weights = replacing.repbn_weights(fit) if self.with_ == "repbn" else replacing.affine_weights(fit)
        dtype = norm.input.dtype
        assert dtype is not None
        if not all(fits(array, dtype) for array in weights.values()):
            raise InputError(f"the weights of its replacement do not fit {dtype.name.lower()}")
        return weights

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        found = {str(norm.nodes[-1].name): norm for norm in norms(model)}
        for edit in edits:
            norm = found.get(edit.anchors[0])
            if norm is None:
                raise InputError("it is not there any more: another edit has changed it", place=edit.site)
            if not outcome.take(norm.nodes[-1]):
                return
            replacing.replace(model, norm, edit.payload)


def _refusal(model: oir.Model, norm: Norm) -> str | None:
    """Why a norm cannot be replaced, in plain words; None when it can."""
    if norm.read_only is not None:
        return norm.read_only
    if norm.kind not in ("layer", "rms"):
        return "its statistics are not those of a row" if norm.kind != "batch" else "its statistics are fixed already"
    if model.graph.opset_imports.get("", 1) < _OPSET:
        return f"BatchNormalization with fixed statistics needs opset {_OPSET}"
    if norm.axes != (-1,):
        return "it normalizes over several axes"
    if norm.outside_reader is not None:
        return f"{norm.outside_reader.op_type} reads one of its inner values"
    if norm.inner_output is not None:
        return "one of its inner values is an output of the graph"
    if norm.input.dtype not in (oir.DataType.FLOAT, oir.DataType.DOUBLE) or norm.output.dtype != norm.input.dtype:
        return "it does not read and give float32 or float64; convert the model after this pass"
    rank = match.rank(norm.input)
    if rank is None or rank < 2 or match.rank(norm.output) != rank or match.dim(norm.input, -1) is None:
        return "the rank or the number of channels of its input is not known"
    why = sites.refusal(model, norm.input)
    return None if why is None else f"its input cannot be observed: {why}"


def _savings(gone: Savings, norm: Norm, payload: Mapping[str, np.ndarray]) -> Savings:
    """What a norm takes away, less the weights of its replacement."""
    assert norm.input.dtype is not None
    added = sum(array.size for array in payload.values())
    return Savings(gone.parameters - added, gone.bytes - round(added * norm.input.dtype.itemsize), gone.macs)
