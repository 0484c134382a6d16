"""Layers that a recipe leaves as they are: the few bytes that rounding them saves are not worth what it loses.

What the last layer of a network loses is corrected by nothing behind it, and where it reads a mean, it is often the
largest single error of all, of a layer that holds next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import onnx_ir as oir

from burnish.ir import cost
from burnish.ir.errors import InputError
from burnish.ir.walk import walk
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import Context, Edit
from burnish.passes.pipeline import constant_bytes
from burnish.passes.plan import Plan
from burnish.passes.trying import Tried

BYTES = 0.01
"""The share of the model's bytes that may stay for this."""

WORK = 0.001
"""The share of the multiply-adds that a layer may have: its time is then that of what is around it."""

GAIN = 0.1
"""The share of the squared error of the outputs that a layer has to make."""


def spared(
    model: oir.Model,
    edits: list[Edit],
    todo: Plan,
    context: Context,
    outcomes: Sequence[Outcome],
    on_step: Callable[[str, int, int], None],
) -> list[Edit]:
    """The edits of a run without those of last layers that are small and make much of what all together lose.

    Args:
        model: what the edits were proposed for.
        edits: all that are to be made; those of passes that the caller named are.
        todo: the passes.
        context: samples and what runs models.
        outcomes: of each of the lossy passes; take the reasons.
        on_step: progress.
    """
    few = [edit for edit in _last(model, edits) if edit.spec not in todo.named and _small(model, edit, context)]
    if not few or len(edits) == 1:
        return edits
    on_step("looking for a layer to leave out", 0, 1)
    versions = {edit.key: [one for one in edits if one is not edit] for edit in few} | {"": edits}
    tried = Tried(model, context, "relative-error")
    try:
        tried.run({key: partial(_made, model, own, todo) for key, own in versions.items()})
    except InputError:
        return edits
    left, nodes = BYTES * constant_bytes(model), {str(node.name): node for node in walk(model)}
    names = [catalog.spec(one) for one in todo.lossy]
    for edit in sorted(few, key=lambda one: tried.value(one.key)):
        part = 1 - (tried.value(edit.key) / tried.value("")) ** 2 if tried.value("") > 0 else 0.0
        if edit.savings.bytes <= left and part >= GAIN and tried.gain("", edit.key) > 0:
            left -= edit.savings.bytes
            edits = [one for one in edits if one is not edit]
            why = f"rounding it makes {part:.0%} of the squared error and saves {edit.savings.bytes:,} bytes"
            outcomes[names.index(edit.spec)].skip(nodes[edit.anchors[0]], why)
    return edits


def _made(model: oir.Model, edits: Sequence[Edit], todo: Plan) -> oir.Model:
    return lossy.apply(model, edits, todo.lossy)[0]


def _last(model: oir.Model, edits: Sequence[Edit]) -> list[Edit]:
    """The edits whose nodes no other edit stands behind."""
    owner = {name: edit for edit in edits for name in edit.claims}
    found: dict[Edit, None] = {}
    seen: set[oir.Node] = set()
    waiting = list(model.graph.outputs)
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        edit = owner.get(str(node.name))
        if edit is not None:
            found[edit] = None
        else:
            waiting += [value for value in node.inputs if value is not None]
    behind = {owner.get(str(node.name)) for edit in found for node in _above(model, edit)}
    return [edit for edit in found if edit not in behind]


def _above(model: oir.Model, edit: Edit) -> set[oir.Node]:
    """The nodes that what an edit changes is computed by."""
    own = [node for node in model.graph if str(node.name) in edit.claims]
    found: set[oir.Node] = set()
    waiting = [value for node in own for value in node.inputs]
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is not None and node not in found and node not in own:
            found.add(node)
            waiting += node.inputs
    return found


def _small(model: oir.Model, edit: Edit, context: Context) -> bool:
    if not 0 < edit.savings.bytes <= BYTES * constant_bytes(model):
        return False
    costs = cost.model_cost(model, dict(context.dims))
    own = [one.cost.macs for one in costs.nodes if str(one.node.name) in edit.claims]
    return bool(costs.macs) and None not in own and sum(own) <= WORK * (costs.macs or 0)  # type: ignore[arg-type]
