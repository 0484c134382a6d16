"""The functions of an ONNX file: whether their calls end, and how many nodes they stand for."""

from __future__ import annotations

import graphlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import onnx

from burnish.ir.errors import InputError

LARGEST = 1_000_000
"""Nodes that a model may have once its functions are written out at every call."""

Walk = Callable[[Iterable[onnx.NodeProto]], Iterator[onnx.NodeProto]]


def check_calls(proto: onnx.ModelProto, place: str, walk: Walk, quoted: Callable[[str], str], hint: str) -> None:
    """Check that no function calls itself, and that the model stays of a size that can be worked with.

    A file of a few kilobytes can stand for more nodes than any memory holds: functions that call each other twice.

    Args:
        proto: the model.
        place: the file, for errors.
        walk: visits nodes and those of the graphs nested in them.
        quoted: writes a name of the file into a message.
        hint: what mends a file that is wrong.

    Raises:
        InputError: functions call each other in a cycle, or stand for more than `LARGEST` nodes.
    """
    bodies: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for function in proto.functions:
        called = bodies.setdefault((function.domain, function.name), Counter())
        called.update((node.domain, node.op_type) for node in walk(function.node))
    try:
        order = list(graphlib.TopologicalSorter({name: set(called) for name, called in bodies.items()}).static_order())
    except graphlib.CycleError as error:
        names = " -> ".join(quoted(name) for _, name in error.args[1][:6])
        raise InputError(f"functions call each other in a cycle: {names}", place=place, hint=hint) from None
    written: dict[tuple[str, str], int] = {}
    for name in order:
        body = bodies.get(name)
        written[name] = 1 if body is None else sum(count * written[one] for one, count in body.items())
    total = sum(written.get((node.domain, node.op_type), 1) for node in walk(proto.graph.node))
    if total > LARGEST:
        cause = f"its functions stand for {total:.3g} nodes, more than the {LARGEST:,} that a model may have"
        raise InputError(cause, place=place, hint="export the model without functions that call functions")
