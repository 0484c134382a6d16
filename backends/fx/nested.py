"""The nodes that hold or call other graphs, change in training, or are left to ONNX Runtime."""

from __future__ import annotations

import operator as python
import re
from typing import TYPE_CHECKING, Any

import onnx_ir as oir
from torch import fx, nn

from burnish.backends.fx import modules
from burnish.backends.fx.fallback import OrtCall
from burnish.backends.fx.values import DTYPES
from burnish.ir import match, weights
from burnish.ir.errors import InputError
from burnish.ir.walk import bodies

if TYPE_CHECKING:
    from burnish.backends.fx.builder import Body, Builder, Frame


def call(builder: Builder, frame: Frame, node: oir.Node, function: oir.Function) -> None:
    """Write the nodes of a model-local function in the place of its call."""
    from burnish.backends.fx.builder import Frame, attributes

    if function.identifier() in frame.calls:
        raise InputError(f"function `{function.name}` calls itself", place=match.describe(node))
    given = {n: a for n, a in function.attributes.items() if a.value is not None} | attributes(frame, node)
    inner = Frame(frame.body, function.opset_imports, given, calls=(*frame.calls, function.identifier()))
    inputs = [builder.lookup(frame, v) if v is not None else None for v in node.inputs]
    inputs += [None] * (len(function.inputs) - len(inputs))
    inner.values.update(zip(function.inputs, inputs, strict=True))
    builder.nodes(inner, function)
    for out, value in zip(node.outputs, function.outputs, strict=False):
        frame.values[out] = builder.lookup(inner, value)


def structure(builder: Builder, frame: Frame, node: oir.Node) -> None:
    """If, Loop, Scan and SequenceMap: a module that holds the nested graphs as modules of their own."""
    inputs = [builder.lookup(frame, v) if v is not None else None for v in node.inputs]
    if node.op_type == "If":
        then, left = _module(builder, frame, node.attributes["then_branch"].as_graph())
        otherwise, right = _module(builder, frame, node.attributes["else_branch"].as_graph())
        made: nn.Module = modules.Branch(then, otherwise)
        arguments: tuple[Any, ...] = (inputs[0], left, right)
    else:
        graph = node.attributes["body"].as_graph()
        inner, outer = _module(builder, frame, graph)
        if node.op_type == "Loop":
            empties = [_empty(v) for v in graph.outputs[len(inputs) - 1 :]]
            made = modules.Repeat(inner, empties)
            limit, condition, *carried = [*inputs, None, None][: max(len(inputs), 2)]
            arguments = (limit, condition, tuple(carried), outer)
        elif node.op_type == "SequenceMap":
            made, arguments = modules.Each(inner, len(node.outputs)), (inputs[0], tuple(inputs[1:]), outer)
        else:
            made, arguments = _scan(frame, node, graph, inner, inputs, outer)
    target = _attach(frame.body, node.op_type, made)
    builder.bind(frame, node, builder.emit(frame, node, "call_module", target, arguments), True)


def _scan(
    frame: Frame, node: oir.Node, graph: oir.Graph, inner: nn.Module, inputs: list[Any], outer: tuple[Any, ...]
) -> tuple[nn.Module, tuple[Any, ...]]:
    if frame.opsets.get("", 1) < 9:
        raise InputError("Scan is known from opset 9 on", place=match.describe(node))
    count = int(match.attribute(node, "num_scan_inputs"))
    states = len(inputs) - count
    made = len(graph.outputs) - states
    options = [
        list(match.attribute(node, name) or [0] * size)
        for name, size in (
            ("scan_input_axes", count), ("scan_input_directions", count),
            ("scan_output_axes", made), ("scan_output_directions", made),
        )
    ]  # fmt: skip
    module = modules.Walk(inner, [_empty(v) for v in graph.outputs[states:]], *options)
    return module, (tuple(inputs[:states]), tuple(inputs[states:]), outer)


def _module(builder: Builder, frame: Frame, graph: oir.Graph) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """A nested graph as a module that gives a tuple, and the outer values it takes behind its own inputs."""
    from burnish.backends.fx.builder import Body, Frame

    body = Body(fx.Graph(), nn.Module(), frame.body)
    inner = Frame(body, frame.opsets, frame.attributes, frame, calls=frame.calls)
    for i, value in enumerate(graph.inputs):
        inner.values[value] = body.graph.placeholder(f"given_{i}")
    builder.nodes(inner, graph)
    body.graph.output(tuple(builder.lookup(inner, value) for value in graph.outputs))
    return fx.GraphModule(body.root, body.graph, "OnnxGraph"), tuple(body.arguments)


def _empty(value: oir.Value) -> modules.Empty:
    dims = [d if isinstance(d, int) else 0 for d in value.shape] if value.shape is not None else []
    return DTYPES.get(value.dtype or oir.DataType.FLOAT, DTYPES[oir.DataType.FLOAT]), tuple(dims)


def _attach(body: Body, name: str, module: nn.Module) -> str:
    """Keep a module in the body under a free name that is safe in the Python code that FX writes."""
    name, number = re.sub(r"\W", "_", name, flags=re.ASCII), 0
    while hasattr(body.root, f"{name}_{number}"):
        number += 1
    body.root.add_module(f"{name}_{number}", module)
    return f"{name}_{number}"


def layer(builder: Builder, frame: Frame, node: oir.Node, inputs: list[Any], keywords: dict[str, Any]) -> bool:
    """BatchNormalization or Dropout of inference as a module that follows `train()`; False for any other node."""
    if node.op_type == "BatchNormalization" and not keywords.get("training_mode"):
        if not all(weights.is_constant(v) for v in node.inputs[3:5]):
            return False
        made: nn.Module = modules.BatchNorm(keywords.get("epsilon", 1e-5), keywords.get("momentum", 0.9))
    elif node.op_type == "Dropout":
        ratio = inputs[1] if len(inputs) > 1 else keywords.get("ratio")
        if isinstance(ratio, fx.Node) or len(inputs) > 2 and inputs[2] is not None and inputs[2] is not False:
            return False
        made, inputs = modules.Dropout(0.5 if ratio is None else float(ratio)), inputs[:1]
    else:
        return False
    target = _attach(frame.body, node.op_type, made)
    builder.bind(frame, node, builder.emit(frame, node, "call_module", target, tuple(inputs)), True)
    return True


def opaque(builder: Builder, frame: Frame, node: oir.Node, opsets: dict[str, int]) -> None:
    """A node that ONNX Runtime runs; its constants travel with it."""
    from burnish.backends.fx.builder import attributes

    if bodies(node):
        raise InputError("an unknown operator with nested graphs cannot be run", place=match.describe(node))
    proto = oir.serde.serialize_node(node)
    del proto.attribute[:]
    proto.attribute.extend(oir.serde.serialize_attribute(a) for a in attributes(frame, node).values())
    constants, names, values = [], [], []
    for i, value in enumerate(node.inputs):
        if value is None or not value.name:
            proto.input[i] = ""
            continue
        proto.input[i] = f"i{i}"
        tensor = weights.tensor_of(value) if value not in frame.values else None
        if tensor is not None:
            held = oir.serde.serialize_tensor(tensor)
            held.name = f"i{i}"
            constants.append(held.SerializeToString())
            continue
        found = builder.lookup(frame, value)
        if found is None:
            proto.input[i] = ""
            continue
        names.append(f"i{i}")
        values.append(found)
    for i, out in enumerate(node.outputs):
        proto.output[i] = f"o{i}" if out.name else ""
    wanted = [i for i, out in enumerate(node.outputs) if out.name]
    used = {"" if d == "ai.onnx" else d: v for d, v in opsets.items()}
    made = OrtCall(proto.SerializeToString(), constants, used, [f"o{i}" for i in wanted], match.describe(node))
    target = _attach(frame.body, node.op_type, made)
    emitted = builder.emit(frame, node, "call_module", target, (names, tuple(values)))
    for position, i in enumerate(wanted):
        frame.values[node.outputs[i]] = frame.body.graph.call_function(python.getitem, (emitted, position))
