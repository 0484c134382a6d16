"""Cancel Transposes, Reshapes and Casts that undo each other, and move those that would."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.affine import LAYOUT
from burnish.ir.views.parameter import match_perm
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.layout import find_region, inverse, move

_RESHAPES = tuple(op for op in LAYOUT if op not in ("Identity", "Transpose"))
_MANTISSA = {"FLOAT16": 11, "BFLOAT16": 8, "FLOAT": 24, "DOUBLE": 53}
_LARGEST_EXPONENT = {"FLOAT16": 15, "BFLOAT16": 127, "FLOAT": 127, "DOUBLE": 1023}


@dataclass(frozen=True)
class CancelLayout(ExactPass):
    """Cancel Transpose, Reshape and Cast pairs, and move Transposes past other nodes where fewer elements are moved."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        version = model.graph.opset_imports.get("", 1)
        while True:
            before = outcome.rewritten
            for node in walk(model, "Transpose", *_RESHAPES, "Cast"):
                if node.graph is not None and not _cancel(node, outcome):
                    return
            missed = _move_all(model, version, outcome)
            if missed is None:
                return
            if outcome.rewritten == before:
                for node, reason in missed:
                    outcome.skip(node, reason, matched=False)
                return


def _cancel(node: oir.Node, outcome: Outcome) -> bool:
    """Cancel what `node` and the node above it do; False when the pass must stop."""
    match node.op_type:
        case "Transpose":
            return _cancel_transpose(node, outcome)
        case "Cast":
            return _cancel_cast(node, outcome)
    return _cancel_reshape(node, outcome)


def _cancel_transpose(node: oir.Node, outcome: Outcome) -> bool:
    rank = match.rank(node.inputs[0])
    if rank is None:
        return True
    perm, above = match_perm(node, rank), match.producer(node.inputs[0], "Transpose")
    if perm == tuple(range(rank)):
        if not outcome.take(node):
            return False
        edit.bypass(node)
    elif above is not None and above.inputs[0] is not None:
        first = match_perm(above, rank)
        both = tuple(first[axis] for axis in perm)
        if both != tuple(range(rank)) and not match.used_once(above.outputs[0]):
            return True
        if not outcome.take(node):
            return False
        if both == tuple(range(rank)):
            edit.bypass(node, above.inputs[0])
        else:
            edit.set_input(node, 0, above.inputs[0])
            node.attributes["perm"] = oir.AttrInt64s("perm", both)
    return True


def _cancel_reshape(node: oir.Node, outcome: Outcome) -> bool:
    value, out = node.inputs[0], node.outputs[0]
    if value is None:
        return True
    known = value.shape is not None and out.shape is not None and not value.shape.has_unknown_dim()
    if known and value.shape == out.shape:
        if not outcome.take(node):
            return False
        edit.bypass(node)
        return True
    above = match.producer(value, *_RESHAPES)
    if above is None or above.inputs[0] is None or above.graph is not node.graph:
        return True
    source = above.inputs[0].shape
    if known and source is not None and source == out.shape and not source.has_unknown_dim():
        if not outcome.take(node):
            return False
        edit.bypass(node, above.inputs[0])
    elif node.op_type == "Reshape" and match.used_once(value) and _stands_alone(node):
        if not outcome.take(node):
            return False
        edit.set_input(node, 0, above.inputs[0])
    return True


def _stands_alone(reshape: oir.Node) -> bool:
    """Whether the wanted shape copies no dimension of the input."""
    wanted = weights.integers(reshape.inputs[1])
    return wanted is not None and (0 not in wanted or bool(match.attribute(reshape, "allowzero", 0)))


def _cancel_cast(node: oir.Node, outcome: Outcome) -> bool:
    value, to = node.inputs[0], oir.DataType(match.attribute(node, "to"))
    above = match.producer(value, "Cast")
    if value is not None and value.dtype == to:
        if not outcome.take(node):
            return False
        edit.bypass(node)
    elif above is not None and above.inputs[0] is not None and above.inputs[0].dtype is not None:
        origin, middle = above.inputs[0].dtype, oir.DataType(match.attribute(above, "to"))
        if not _holds(middle, origin) or (origin != to and not match.used_once(above.outputs[0])):
            return True
        if not outcome.take(node):
            return False
        if origin == to:
            edit.bypass(node, above.inputs[0])
        else:
            edit.set_input(node, 0, above.inputs[0])
    return True


def _holds(wide: oir.DataType, narrow: oir.DataType) -> bool:
    """Whether a floating-point dtype holds every value of another one."""
    names = wide.name, narrow.name
    if not all(name in _MANTISSA for name in names):
        return False
    return all(table[names[0]] >= table[names[1]] for table in (_MANTISSA, _LARGEST_EXPONENT))


def _move_all(model: oir.Model, version: int, outcome: Outcome) -> list[tuple[oir.Node, str]] | None:
    """Move the Transposes that gain by it; the others, or None when the pass must stop."""
    missed: list[tuple[oir.Node, str]] = []
    failed: set[tuple[int, tuple[int, ...]]] = set()
    for node in walk(model, "Transpose"):
        rank = match.rank(node.inputs[0])
        if node.graph is None or rank is None:
            continue
        perm, source = match_perm(node, rank), match.producer(node.inputs[0])
        if source is None or (id(source), perm) in failed or perm == inverse(perm) == tuple(range(rank)):
            continue
        wide = find_region(node, perm, version, downwards=True)
        region = wide
        if wide is None or wide.saved <= 0:
            region = find_region(node, perm, version, downwards=False)
        if region is None or region.saved <= 0:
            fixed = f"{source.op_type} depends on the order of axes"
            missed.append((node, fixed if region is None else "moving it would not move fewer elements"))
            failed.update((id(one), perm) for one in (wide.nodes if wide is not None and len(wide.ends) < 2 else ()))
            continue
        if not outcome.take(node):
            return None
        move(model, region)
    return missed
