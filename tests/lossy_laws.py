"""The laws that every lossy pass is held to, on every golden case."""

from __future__ import annotations

import math

import onnx
import onnx_ir as oir
from laws import LawBroken, OrtRunner, check_contract, check_nothing_unused, make_samples

from burnish.ir import facts
from burnish.ir.text import text
from burnish.passes import lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import Edit, LossyPass
from burnish.tools.lossy import QUANTIZED
from burnish.tools.lossy_context import context_for


def proposals(one: LossyPass, model: oir.Model) -> tuple[list[Edit], Outcome]:
    """What a pass proposes for a model on made samples; the model must stay as it is."""
    facts.check(model, one.needs, one.pass_name(), "before")
    before, outcome = text(model), Outcome(one.pass_name())
    found = one.propose(model, context_for(model, list(make_samples(model))), outcome)
    if text(model) != before or outcome.rewritten:
        raise LawBroken("proposing changed the model, or took a site")
    if len({edit.key for edit in found}) != len(found):
        raise LawBroken("two edits have the same key")
    return found, outcome


def made(one: LossyPass, model: oir.Model, edits: list[Edit]) -> tuple[oir.Model, Outcome]:
    """A copy with these edits, and the account of them."""
    after, outcomes = lossy.apply(model, edits, [one])
    outcome = next(iter(outcomes.values()), Outcome(one.pass_name()))
    changed = text(after) != text(model)
    if outcome.rewritten != len(edits) or changed != bool(edits):
        raise LawBroken(f"{len(edits)} edits, `rewritten` is {outcome.rewritten}, the text changed: {changed}")
    return after, outcome


def check_edits(one: LossyPass, model: oir.Model, edits: list[Edit], proposed: Outcome | None = None) -> None:
    """Each edit alone leaves a sound model that holds as much less as it promises; none leaves it as it is.

    What stores numbers in fewer bits says how far they are off: when it is made, or in `proposed` where it was told.

    Raises:
        LawBroken: for the first law that does not hold.
    """
    made(one, model, [])
    samples = list(make_samples(model))
    dims = context_for(model, samples).dims
    for edit in edits:
        after, outcome = made(one, model, [edit])
        check_sound(one, model, after)
        errors = outcome.errors | (proposed.errors if proposed is not None else {})
        if one.order == QUANTIZED and edit.savings.bytes > 0 and not 0 <= errors.get(edit.key, -1) < math.inf:
            raise LawBroken(f"`{edit.key}` does not say how far its numbers are off: {errors}")
        found = lossy.saved(model, after, dims)
        if (found.parameters, found.bytes) != (edit.savings.parameters, edit.savings.bytes):
            raise LawBroken(f"`{edit.key}` promises {edit.savings} and saves {found}")
        if None not in (found.macs, edit.savings.macs) and found.macs != edit.savings.macs:
            raise LawBroken(f"`{edit.key}` promises {edit.savings.macs} multiply-adds and saves {found.macs}")


def check_sound(one: LossyPass, before: oir.Model, after: oir.Model) -> None:
    """The result is a valid model that ONNX Runtime runs, with the caller's ports, some of which may be gone.

    A pass that says so adds inputs and outputs instead.
    """
    ports = [{str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)} for model in (before, after)]
    kinds = [{str(v.name): v.dtype for v in (*model.graph.inputs, *model.graph.outputs)} for model in (before, after)]
    mixed = any(lossy.mixed(value) is not None for value in (*after.graph.inputs, *after.graph.outputs))
    if ports[0] == ports[1] and kinds[0] == kinds[1] and not mixed:
        check_contract(before, after)
    elif ports[0] == ports[1]:
        if not all(kinds[1][name] in (kind, oir.DataType.INT8) for name, kind in kinds[0].items()):
            raise LawBroken(f"inputs or outputs have other types: {kinds}")
    elif not ports[1] < ports[0] and not (one.ports and ports[0] < ports[1]):
        raise LawBroken(f"inputs or outputs were added: {', '.join(sorted(ports[1] - ports[0]))}")
    check_nothing_unused(before, after)
    try:
        onnx.checker.check_model(oir.to_proto(after), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LawBroken(f"the ONNX checker refuses the result: {error}\n\n{text(after)}") from None
    runner = OrtRunner(after, optimize=True)
    for sample in make_samples(after if one.ports else before):
        runner.run(lossy.feeds(after, sample.feeds))
    runner.close()
