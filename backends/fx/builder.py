"""An ONNX model as a torch.fx GraphModule whose parameters are the model's initializers."""

from __future__ import annotations

import keyword
import operator as python
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as oir
import torch
from torch import fx, nn

from burnish.backends.fx import bridge, nested, operators, registry
from burnish.backends.fx.bridge import Bridge, Origin
from burnish.backends.fx.constants import literal, trained
from burnish.backends.fx.fallback import HOW_TO_ADD, FallbackWarning
from burnish.backends.fx.values import DTYPES, HELD, as_output
from burnish.ir import match, weights
from burnish.ir.errors import InputError
from burnish.ir.walk import STANDARD_DOMAINS, graphs, is_op

Trainable = Callable[[oir.Value], bool | None]
_SCOPE = "pkg.torch.onnx.name_scopes"


def to_graph_module(
    model: oir.Model, *, training: bool = False, fallback: bool = True, trainable: Trainable | None = None
) -> fx.GraphModule:
    """A torch.fx GraphModule that computes what the model computes.

    It takes the model's inputs by position or by name and gives a tuple of its outputs. Every float initializer and
    Constant that a layer reads is an `nn.Parameter` under the initializer's own name (`bridge.attribute_path` says
    what is done to names that Python cannot have), shared where the model shares it; statistics of
    BatchNormalization, scales of quantization, bounds and single numbers are buffers. Nodes are called like the ONNX
    values they compute; their `meta` holds `onnx_node`, `onnx_op` (domain, operator), `onnx_outputs` and `onnx_scope`.

    Args:
        model: any model; it is read and not kept.
        training: BatchNormalization and Dropout follow `module.train()` and `module.eval()`, as torch's layers do;
            otherwise they always compute what the model says.
        fallback: nodes that the table of operators lacks are run by ONNX Runtime, with a `FallbackWarning` that
            names them; no gradient passes through them.
        trainable: `f(value)` decides whether a float constant is a parameter; None leaves it to the rule above.

    Raises:
        InputError: without `fallback`, operators are missing: all of them are named; or the graph is not sound.
    """
    assert operators
    return Builder(model, training, fallback, trainable).build()


@dataclass
class Body:
    """One FX graph that is being made, and the values of outer graphs that it takes as further inputs."""

    graph: fx.Graph
    root: nn.Module
    outer: Body | None = None
    captured: dict[Any, fx.Node] = field(default_factory=dict)
    arguments: list[fx.Node] = field(default_factory=list)

    def capture(self, key: Any, node: fx.Node) -> fx.Node:
        """A placeholder for a node of the outer body."""
        if key not in self.captured:
            places = [n for n in self.graph.nodes if n.op == "placeholder"]
            with self.graph.inserting_after(places[-1]) if places else self.graph.inserting_before():
                self.captured[key] = self.graph.placeholder(f"outer_{len(self.arguments)}")
            self.arguments.append(node)
        return self.captured[key]


@dataclass
class Frame:
    """The values of one graph or one call of a function.

    `outer` is the frame whose values a nested graph can read, None for the main graph and for functions; `calls` are
    the functions that are being written out.
    """

    body: Body
    opsets: Mapping[str, int]
    attributes: Mapping[str, oir.Attr]
    outer: Frame | None = None
    values: dict[oir.Value, Any] = field(default_factory=dict)
    calls: tuple[Any, ...] = ()


class Builder:
    """Makes one module; the parts that deal with nested graphs are in `nested`."""

    def __init__(self, model: oir.Model, training: bool, fallback: bool, trainable: Trainable | None) -> None:
        self.model = model
        self.training = training
        self._fallback = fallback
        self._trainable = trainable
        self._root = nn.Module()
        self._numbers = {id(graph): i for i, graph in enumerate(graphs(model))}
        self._weights: dict[str, Origin] = {}
        self._paths: dict[oir.Value, str] = {}
        self._missing: list[tuple[str, str, str]] = []

    def build(self) -> fx.GraphModule:
        """The module of the main graph."""
        graph = self.model.graph
        body = Body(fx.Graph(), self._root)
        frame = Frame(body, self.model.opset_imports, {})
        inputs = {}
        for value in graph.inputs:
            if value.const_value is None:
                node = body.graph.placeholder(_identifier(str(value.name), body.graph))
                node.meta["onnx_outputs"] = [value.name]
                frame.values[value] = node
                inputs[str(value.name)] = str(node.target)
        self.nodes(frame, graph)
        results = []
        for value in graph.outputs:
            found, dtype = self.lookup(frame, value), match.tensor_dtype(value)
            if not isinstance(found, fx.Node) or dtype in (oir.DataType.INT64, oir.DataType.BOOL):
                found = body.graph.call_function(as_output, (found, int(dtype or oir.DataType.INT64)))
                found.meta["is_wrapped"] = True
            results.append(found)
        body.graph.output(tuple(results))
        self._report()
        values = {str(v.name): n.name for v, n in frame.values.items() if isinstance(n, fx.Node) and v.name}
        module = fx.GraphModule(self._root, body.graph, "OnnxModule")
        bridge.attach(
            module,
            Bridge(
                bridge.fingerprint(self.model), self._weights, inputs, tuple(str(v.name) for v in graph.outputs),
                values, tuple(dict.fromkeys(op for op, _, _ in self._missing)),
            ),
        )  # fmt: skip
        return module

    def nodes(self, frame: Frame, graph: oir.Graph | oir.Function) -> None:
        """Emit the nodes of a graph."""
        for node in graph:
            if not (is_op(node, "Constant") and weights.is_constant(node.outputs[0])):
                self._node(frame, node)

    def lookup(self, frame: Frame, value: oir.Value) -> Any:
        """The FX node of a value, or the Python value of a small integer constant.

        Raises:
            InputError: nothing computes it.
        """
        if value in frame.values:
            return frame.values[value]
        tensor = weights.tensor_of(value) or value.const_value
        if tensor is not None:
            found = literal(tensor)
            if found is None:
                found = self._weight(frame.body, value, tensor)
            frame.values[value] = found
            return found
        if frame.outer is None:
            raise InputError(f"value `{value.name}` is read before it is computed")
        found = self.lookup(frame.outer, value)
        if isinstance(found, fx.Node) and frame.body is not frame.outer.body:
            found = frame.body.capture(value, found)
        frame.values[value] = found
        return found

    def _weight(self, body: Body, value: oir.Value, tensor: oir.TensorProtocol) -> fx.Node:
        """The tensor of a constant; all of them are kept at the root, nested graphs take them as inputs."""
        if body.outer is not None:
            return body.capture(value, self._weight(body.outer, value, tensor))
        if value not in self._paths:
            made = bridge.to_torch(tensor.numpy(), tensor.dtype)
            if made is None:
                raise InputError(f"constant `{value.name}` of {tensor.dtype.name} cannot be a torch tensor")
            wish = self._trainable(value) if self._trainable is not None else None
            path = bridge.attribute_path(self._root, str(value.name or "weight"))
            bridge.register(self._root, path, made, trained(value, tensor, wish))
            self._paths[value] = path
            self._weights[path] = Origin(self._numbers.get(id(_home(value)), -1), str(value.name))
        node = body.graph.get_attr(self._paths[value])
        node.meta["onnx_outputs"] = [value.name]
        return node

    def _node(self, frame: Frame, node: oir.Node) -> None:
        function = self.model.functions.get(node.op_identifier())
        if function is not None:
            nested.call(self, frame, node, function)
        elif is_op(node, "If", "Loop", "Scan", "SequenceMap"):
            nested.structure(self, frame, node)
        else:
            self._operator(frame, node)

    def _operator(self, frame: Frame, node: oir.Node) -> None:
        domain = "" if node.domain in STANDARD_DOMAINS else node.domain
        opset = frame.opsets.get(domain, frame.opsets.get("ai.onnx", 1) if not domain else 1)
        entry = registry.find(domain, node.op_type, opset)
        reason = "it is not in the table"
        if entry is not None:
            given = attributes(frame, node)
            keywords = {name: self._attribute(frame, node, name, a) for name, a in given.items()}
            count = max((i + 1 for i, out in enumerate(node.outputs) if out.name), default=1)
            dtype = int(match.tensor_dtype(node.outputs[0]) or 0)
            extra = {
                "outputs": count, "opset": opset, "straight_through": _only_dequantized(node), "result": dtype
            }  # fmt: skip
            keywords |= {name: value for name, value in extra.items() if name in entry.parameters}
            refused = entry.refusal(node.inputs, keywords) or _unheld(node)
            if refused is None:
                inputs = [self._input(frame, v, i, entry) for i, v in enumerate(node.inputs)]
                if self.training and nested.layer(self, frame, node, inputs, keywords):
                    return
                made = self.emit(frame, node, "call_function", entry.function, tuple(inputs), keywords)
                self.bind(frame, node, made, entry.several)
                return
            reason = refused
        self._missing.append((f"{domain + '::' if domain else ''}{node.op_type}", match.describe(node), reason))
        nested.opaque(self, frame, node, dict(frame.opsets))

    def _input(self, frame: Frame, value: oir.Value | None, index: int, entry: registry.Operator) -> Any:
        if value is None or value.name == "" and value.producer() is None:
            return None
        tensor = weights.tensor_of(value) if index in entry.static or index in entry.scalars else None
        if tensor is not None and (index in entry.static or not len(tensor.shape)):
            found = literal(tensor, static=True)
            if found is not None:
                return found
        return self.lookup(frame, value)

    def _attribute(self, frame: Frame, node: oir.Node, name: str, attribute: oir.Attr) -> Any:
        if attribute.type == oir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.size == 1 and tensor.dtype in DTYPES:
                return tensor.numpy().reshape(()).tolist(), int(tensor.dtype)
            made = bridge.to_torch(tensor.numpy(), tensor.dtype)
            if made is None:
                return None
            body = frame.body
            path = bridge.attribute_path(body.root, f"{node.outputs[0].name}/{name}".replace(".", "_"))
            bridge.register(body.root, path, made, False)
            return body.graph.get_attr(path)
        if attribute.type == oir.AttributeType.STRING:
            return attribute.as_string()
        if attribute.type == oir.AttributeType.STRINGS:
            return list(attribute.as_strings())
        if isinstance(attribute.value, int):
            return int(attribute.value)
        return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value

    def emit(self, frame: Frame, node: oir.Node, kind: str, target: Any, inputs: Any, keywords: Any = None) -> fx.Node:
        """An FX node for an ONNX node, with its name and metadata."""
        made = frame.body.graph.create_node(kind, target, inputs, keywords or {}, name=_node_name(node))
        made.meta |= {
            "onnx_node": node.name, "onnx_op": (node.domain, node.op_type),
            "onnx_outputs": [out.name for out in node.outputs], "onnx_scope": node.metadata_props.get(_SCOPE),
            "is_wrapped": kind == "call_function",
        }  # fmt: skip
        return made

    def bind(self, frame: Frame, node: oir.Node, made: fx.Node, several: bool) -> None:
        """Let the outputs of an ONNX node be an FX node, or the entries of the tuple that it gives."""
        if not several:
            frame.values[node.outputs[0]] = made
            return
        for i, out in enumerate(node.outputs):
            if out.name and (out.uses() or out.is_graph_output()):
                name = re.sub(r"\W", "_", str(out.name), flags=re.ASCII)
                item = frame.body.graph.create_node("call_function", python.getitem, (made, i), {}, name=name)
                item.meta |= {**made.meta, "onnx_outputs": [out.name], "is_wrapped": False}
                frame.values[out] = item

    def _report(self) -> None:
        """Say what is missing, as a warning or as an error."""
        if not self._missing:
            return
        each = "; ".join(f"{op} at {place} ({reason})" for op, place, reason in self._missing)
        text = f"the torch bridge lacks {len(self._missing)} node{'s' * (len(self._missing) > 1)}: {each}"
        if not self._fallback:
            raise InputError(text, hint=HOW_TO_ADD)
        warnings.warn(
            f"{text}. ONNX Runtime runs them, and no gradient passes; {HOW_TO_ADD}", FallbackWarning, stacklevel=4
        )


def attributes(frame: Frame, node: oir.Node) -> dict[str, oir.Attr]:
    """The attributes of a node, those that a function takes from its caller resolved."""
    found = {}
    for name, attribute in node.attributes.items():
        if not attribute.is_ref():
            found[name] = attribute
        elif str(attribute.ref_attr_name) in frame.attributes:
            found[name] = frame.attributes[str(attribute.ref_attr_name)]
    return found


def _home(value: oir.Value) -> Any:
    """The graph that holds a constant."""
    producer = value.producer()
    return value.graph if producer is None else producer.graph


def _only_dequantized(node: oir.Node) -> bool:
    """Whether nothing but DequantizeLinear reads the output."""
    out = node.outputs[0]
    return not out.is_graph_output() and all(
        use.node.op_type == "DequantizeLinear" and use.idx == 0 for use in out.uses()
    )


_KNOWS_NARROW = ("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "MatMulNBits", "GatherBlockQuantized")


def _unheld(node: oir.Node) -> str | None:
    """Why strings, or numbers of dtypes that torch lacks, cannot be read here; None where they can."""
    dtypes = {match.tensor_dtype(v) for v in node.inputs if v is not None}
    if oir.DataType.STRING in dtypes and node.op_type != "Identity":
        return "torch has no strings"
    if not dtypes.isdisjoint(HELD) and node.op_type not in _KNOWS_NARROW:
        return "it reads numbers of fewer than eight bits"
    return None


def _node_name(node: oir.Node) -> str:
    named = [str(out.name) for out in node.outputs if out.name]
    text = re.sub(r"\W", "_", named[0] if named else node.op_type, flags=re.ASCII)
    return text if len(named) < 2 else f"{text}_and_others"


def _identifier(name: str, graph: fx.Graph) -> str:
    """A Python name for a parameter of `forward`."""
    text = re.sub(r"\W", "_", name, flags=re.ASCII)
    if not text or text[0].isdigit() or keyword.iskeyword(text) or text == "self":
        text = f"input_{text}"
    taken = {str(node.target) for node in graph.nodes if node.op == "placeholder"}
    while text in taken:
        text += "_"
    return text


def dtype_of(value: oir.Value) -> torch.dtype:
    """The declared torch dtype of a value, float32 when there is none."""
    return DTYPES.get(value.dtype or oir.DataType.FLOAT, torch.float32)
