"""A model as text, made for comparing: two models with the same nodes in the same order and the same weights give the
same text, whatever their inner names, and nothing of the machine or the run is in it.

Inner values are numbered in order, the inputs and outputs of the model keep their names, attributes are sorted,
weights of up to eight elements are shown and larger ones hashed. Names of nodes, metadata and documentation are left
out. The text is the judge of whether a pass changed anything.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as oir

from burnish.ir.walk import STANDARD_DOMAINS

_HASH = "burnish.hash"
_SHOWN = 8
_SHOWN_LIST = 64
_CHUNK = 1 << 26
_PLAIN = re.compile(r"[A-Za-z_][\w./:-]*\Z")
_GRAPHS = (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS)


def text(model: oir.Model, *, weights: bool = True) -> str:
    """The model as text.

    Args:
        model: the model; not changed, except that hashes of weights are kept with their tensors.
        weights: show the values of weights or their hashes; when False no weight is read.
    """
    return "\n".join(line for line, _ in _Printer(model, _brief if weights else tensor_kind).model()) + "\n"


def structure(model: oir.Model) -> str:
    """The model as text without the values of its weights, none of which is read."""
    return text(model, weights=False)


def fingerprint(model: oir.Model) -> str:
    """SHA-256, in hex, of the model's text with the full hash of every weight."""
    return _digest(_Printer(model, _full).model())


def structure_fingerprint(model: oir.Model) -> str:
    """SHA-256, in hex, of the model's structure; no weight is read."""
    return _digest(_Printer(model, tensor_kind).model())


def around(model: oir.Model, node: oir.Node, reach: int = 2) -> list[tuple[str, oir.Node]]:
    """The lines of the nodes around `node` in the structure of the model, each with its node.

    Args:
        model: the model that holds `node`.
        node: the node of interest.
        reach: how many nodes on either side.
    """
    lines = [(line, found) for line, found in _Printer(model, tensor_kind).model() if found is not None]
    at = next(index for index, (_, found) in enumerate(lines) if found is node)
    return [(line, found) for line, found in lines[max(at - reach, 0) : at + reach + 1] if found.graph is node.graph]


def weight_hash(tensor: oir.TensorProtocol) -> str:
    """SHA-256, in hex, of the bytes of a tensor (little endian, packed); computed once and kept in `tensor.meta`."""
    kept = getattr(tensor, "meta", None)
    found: str | None = kept.get(_HASH) if kept is not None else None
    if found is None:
        state = hashlib.sha256()
        for part in _bytes_of(tensor):
            state.update(part)
        found = state.hexdigest()
        if kept is not None:
            kept[_HASH] = found
    return found


def type_text(value: oir.Value) -> str:
    """`float[N,4]`; `?` for an unknown type or size, `?[?]` for nothing known, `float[...]` for an unknown rank."""
    wrapper, kind = "{}", value.type
    while isinstance(kind, oir.SequenceType | oir.OptionalType):
        outer = "seq" if isinstance(kind, oir.SequenceType) else "optional"
        wrapper, kind = wrapper.format(f"{outer}({{}})"), kind.elem_type
    dtype = "?" if kind is None else kind.dtype.name.lower()
    if value.shape is None:
        return wrapper.format("?[?]" if kind is None else f"{dtype}[...]")
    return wrapper.format(f"{dtype}[{_dims(value.shape)}]")


def attribute_text(attribute: oir.Attr, weight: Callable[[oir.TensorProtocol], str]) -> str:
    """The value of an attribute that is no graph; long lists are hashed.

    Args:
        attribute: the attribute.
        weight: how a tensor is shown.
    """
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    kind, value = attribute.type, attribute.value
    if value is None:
        return "_"
    if kind in (oir.AttributeType.TENSOR, oir.AttributeType.TENSORS):
        tensors = [value] if kind == oir.AttributeType.TENSOR else value
        shown = ", ".join(map(weight, tensors))
        return shown if kind == oir.AttributeType.TENSOR else f"[{shown}]"
    if kind in (oir.AttributeType.FLOATS, oir.AttributeType.INTS, oir.AttributeType.STRINGS):
        shown = "[" + ",".join(_scalar(kind, item) for item in value) + "]"
        brief = len(value) <= _SHOWN_LIST
        return shown if brief else f"{kind.name.lower()}[{len(value)}] #{_short(shown)}"
    return _scalar(kind, value)


def _digest(lines: Iterator[tuple[str, oir.Node | None]]) -> str:
    state = hashlib.sha256()
    for line, _ in lines:
        state.update(line.encode(errors="surrogatepass"))
        state.update(b"\n")
    return state.hexdigest()


def _bytes_of(tensor: oir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor in parts; a contiguous array, as a memory-mapped one is, is not copied."""
    if tensor.dtype == oir.DataType.STRING:
        for item in tensor.numpy().reshape(-1):
            data = item if isinstance(item, bytes) else str(item).encode()
            yield len(data).to_bytes(8, "little") + data
        return
    array = tensor.numpy() if tensor.dtype.bitwidth >= 8 else None
    if array is None or array.dtype.byteorder == ">":
        yield tensor.tobytes()
    elif array.flags.c_contiguous:
        yield array.reshape(-1).view(np.uint8).data
    else:
        step = max(1, _CHUNK // max(1, array.nbytes // len(array)))
        for start in range(0, len(array), step):
            yield np.ascontiguousarray(array[start : start + step]).reshape(-1).view(np.uint8).data


def _dims(shape: oir.Shape | tuple[int, ...]) -> str:
    return ",".join(
        str(size) if isinstance(size, int) else "?" if size.value is None else str(size.value) for size in shape
    )


def tensor_kind(tensor: oir.TensorProtocol) -> str:
    """Dtype and shape of a tensor: `float[64,64]`."""
    return f"{tensor.dtype.name.lower()}[{_dims(tensor.shape)}]"  # type: ignore[arg-type]


def _brief(tensor: oir.TensorProtocol) -> str:
    return f"{tensor_kind(tensor)} {elements(tensor) if tensor.size <= _SHOWN else '#' + weight_hash(tensor)[:8]}"


def _full(tensor: oir.TensorProtocol) -> str:
    return f"{tensor_kind(tensor)} {elements(tensor) if tensor.size <= _SHOWN else '#' + weight_hash(tensor)}"


def elements(tensor: oir.TensorProtocol) -> str:
    """The elements of a tensor, nested as its axes are: `[[1, 2], [3, 4]]`."""

    def show(part: object) -> str:
        if not isinstance(part, np.ndarray):
            return _number(part)
        return _number(part[()]) if part.ndim == 0 else "[" + ", ".join(show(inner) for inner in part) + "]"

    return show(np.asarray(tensor.numpy()))


def _number(item: object) -> str:
    if isinstance(item, bool | np.bool_):
        return "true" if item else "false"
    if isinstance(item, bytes):
        return repr(item.decode(errors="backslashreplace"))
    return repr(item) if isinstance(item, str) else str(item)


def _quoted(name: str) -> str:
    return "%" + (name if _PLAIN.match(name) else '"' + name.replace('"', '\\"') + '"')


class _Printer:
    """Numbers values as they come up and makes the lines, each with the node it stands for, if any."""

    def __init__(self, model: oir.Model, weight: Callable[[oir.TensorProtocol], str]) -> None:
        self.source = model
        self.weight = weight
        self.labels: dict[int, str] = {}
        self.number = 0

    def model(self) -> Iterator[tuple[str, oir.Node | None]]:
        opsets = sorted((_domain(domain), version) for domain, version in self.source.opset_imports.items())
        yield "opset " + ", ".join(f"{domain} {version}".lstrip() for domain, version in opsets), None
        graph = self.source.graph
        for value in [*graph.inputs, *graph.outputs]:
            self.labels[id(value)] = _quoted(value.name or "")
        yield f"graph ({self._inputs(graph)})", None
        yield from self._body(graph, "  ")
        for function in sorted(self.source.functions.values(), key=lambda found: found.identifier()):
            self.number = 0
            name = f"{_operator(function)}({', '.join(self._label(value) for value in function.inputs)})"
            yield f"function {name}{self._attributes(function.attributes.values())}", None
            yield from self._body(function.graph, "  ")

    def _body(self, graph: oir.Graph, indent: str) -> Iterator[tuple[str, oir.Node | None]]:
        for value in _initializers(graph):
            tensor = value.const_value
            shown = self.weight(tensor) if tensor is not None else f"{type_text(value)} without values"
            yield f"{indent}{self._label(value)} = weight {shown}", None
        for node in graph:
            yield from self._node(node, indent)
        yield f"{indent}return {', '.join(self._label(value) for value in graph.outputs)}".rstrip(), None

    def _node(self, node: oir.Node, indent: str) -> Iterator[tuple[str, oir.Node | None]]:
        value = node.attributes.get("value") if node.op_type == "Constant" and _domain(node.domain) == "" else None
        if value is not None and value.type == oir.AttributeType.TENSOR and not value.is_ref():
            yield f"{indent}{self._label(node.outputs[0])} = Constant {self.weight(value.as_tensor())}", node
            return
        outputs = ", ".join("_" if _absent(out) else f"{self._label(out)}: {type_text(out)}" for out in node.outputs)
        inputs = ", ".join("_" if read is None else self._label(read) for read in node.inputs)
        plain = [found for found in node.attributes.values() if found.is_ref() or found.type not in _GRAPHS]
        yield f"{indent}{outputs} = {_operator(node)}({inputs}){self._attributes(plain)}", node
        nested = [found for found in node.attributes.values() if not found.is_ref() and found.type in _GRAPHS]
        for attribute in sorted(nested, key=lambda found: found.name):
            bodies = [attribute.as_graph()] if attribute.type == oir.AttributeType.GRAPH else attribute.as_graphs()
            for body in bodies:
                yield f"{indent}  {attribute.name} = graph ({self._inputs(body)})", None
                yield from self._body(body, indent + "    ")

    def _inputs(self, graph: oir.Graph) -> str:
        shown = []
        for value in graph.inputs:
            default = f" = {self.weight(value.const_value)}" if value.const_value is not None else ""
            shown.append(f"{self._label(value)}: {type_text(value)}{default}")
        return ", ".join(shown)

    def _label(self, value: oir.Value) -> str:
        found = self.labels.get(id(value))
        if found is None:
            found = self.labels[id(value)] = f"%{self.number}"
            self.number += 1
        return found

    def _attributes(self, attributes: Iterable[oir.Attr]) -> str:
        return "".join(f" {found.name}={self._attribute(found)}" for found in sorted(attributes, key=lambda a: a.name))

    def _attribute(self, attribute: oir.Attr) -> str:
        return attribute_text(attribute, self.weight)


def _scalar(kind: oir.AttributeType, value: object) -> str:
    if kind in (oir.AttributeType.FLOAT, oir.AttributeType.FLOATS):
        return str(np.float32(value))  # type: ignore[arg-type]
    if kind in (oir.AttributeType.STRING, oir.AttributeType.STRINGS):
        shown = _number(value)
        return shown if len(shown) <= 4 * _SHOWN_LIST else f"string[{len(shown) - 2}] #{_short(shown)}"
    return str(value)


def _short(shown: str) -> str:
    return hashlib.sha256(shown.encode(errors="surrogatepass")).hexdigest()[:8]


def _domain(domain: str) -> str:
    return "" if domain in STANDARD_DOMAINS else domain


def _operator(node: oir.Node | oir.Function) -> str:
    name = node.op_type if isinstance(node, oir.Node) else node.name
    prefix = f"{_domain(node.domain)}." if _domain(node.domain) else ""
    return f"{prefix}{name}:{node.overload}" if node.overload else f"{prefix}{name}"


def _absent(value: oir.Value) -> bool:
    return not value.name and not value.uses() and not value.is_graph_output()


def _initializers(graph: oir.Graph) -> list[oir.Value]:
    """The initializers of a graph in order of first use, unused ones last, without default values of inputs."""
    own = {id(value): value for value in graph.initializers.values() if not value.is_graph_input()}
    order: dict[int, oir.Value] = {}
    for node in graph.all_nodes() if own else ():
        for read in node.inputs:
            if read is not None and id(read) in own:
                order.setdefault(id(read), read)
    return [*order.values(), *(value for key, value in own.items() if key not in order)]
