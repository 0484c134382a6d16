"""Checks of an untrusted ModelProto, before it is used: versions, structure, tensors and types.

All work on the weightless message of `burnish.ir.wire`, so they cost milliseconds whatever the model weighs.
"""

from __future__ import annotations

import graphlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as oir

from burnish.frontends.function_checks import check_calls
from burnish.ir.errors import InputError
from burnish.ir.opsets import MISJUDGED

_OLDEST_OPSET = 7
_RAISED_OPSET = 9
_LARGEST_TYPE_CHECK = 1 << 28
_EXPORT_AGAIN = "export the model again, or look for a damaged download"


def quoted(name: str) -> str:
    """`name` in back-quotes, at most 80 characters, with control characters written out."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return f"`{text[:77]}...`" if len(text) > 80 else f"`{text}`"


def describe(node: onnx.NodeProto) -> str:
    """How an error names a node: its operator, and its name or its first output."""
    name = node.name or next((output for output in node.output if output), "?")
    return f"node {quoted(name)} ({node.op_type[:80]})"


def check_versions(proto: onnx.ModelProto, place: str) -> None:
    """Raise InputError when the model is empty, or of a version that is not understood."""
    if not proto.HasField("graph") or not (proto.ir_version or proto.opset_import):
        raise InputError("this is not an ONNX model: it holds no graph", place=place, hint="give an .onnx file")
    if proto.ir_version > onnx.IR_VERSION:
        cause = f"the file has IR version {proto.ir_version}; the installed `onnx` reads up to {onnx.IR_VERSION}"
        raise InputError(cause, place=place, hint="pip install --upgrade onnx")
    domains = [entry.domain for entry in proto.opset_import]
    if not domains:
        raise InputError("the model does not say which operator set it uses", place=place, hint=_EXPORT_AGAIN)
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            continue
        if entry.version > newest:
            cause = f"the model uses opset {entry.version}; the installed `onnx` knows up to {newest}"
            raise InputError(cause, place=place, hint="pip install --upgrade onnx, or export with an older opset")
    for graph in _graphs(proto):
        if graph.sparse_initializer:
            hint = "store the weights as dense initializers"
            raise InputError("sparse initializers are not supported", place=place, hint=hint)


def add_opset(proto: onnx.ModelProto) -> bool:
    """Say which version of com.microsoft a model uses that has its operators and does not say it.

    ONNX Runtime's own optimizer writes such models, and ONNX Runtime runs them.

    Returns:
        Whether `proto` was changed.
    """
    domain = "com.microsoft"
    known = {entry.domain for entry in proto.opset_import}
    used = any(node.domain == domain for node in _nodes(proto.graph.node))
    if domain in known or not used:
        return False
    proto.opset_import.add(domain=domain, version=1)
    return True


def check_text(proto: onnx.ModelProto, place: str) -> None:
    """Raise InputError when a name or a text is not valid UTF-8: protobuf then gives bytes in the place of a str."""
    for text in _texts(proto):
        if not isinstance(text, str):
            cause = f"a name in the model is not valid UTF-8: {text[:40]!r}"
            raise InputError(cause, place=place, hint=_EXPORT_AGAIN)


def check_structure(proto: onnx.ModelProto, place: str) -> bool:
    """Check that every value is made once and before it is read, and that nothing depends on itself.

    Returns:
        Whether the nodes of every graph are in an order in which they can run.

    Raises:
        InputError: a value is made twice or never, nodes or functions form a cycle, or functions stand for too much.
    """
    _, ordered = _check_graph(proto.graph, frozenset(), place)
    for function in proto.functions:
        graph = onnx.GraphProto(node=function.node)
        graph.input.extend(onnx.ValueInfoProto(name=name) for name in function.input)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in function.output)
        in_function = f"{place}: function {quoted(function.name)}"
        free, good = _check_graph(graph, frozenset(), in_function)
        ordered &= good
    check_calls(proto, place, _nodes, quoted, _EXPORT_AGAIN)
    return ordered


def check_tensors(proto: onnx.ModelProto, place: str) -> Iterator[tuple[onnx.TensorProto, str]]:
    """Check dtype, dims and amount of data of every tensor in the model.

    Yields:
        The tensors whose data lie in another file, and the place to name in an error about them.

    Raises:
        InputError: a tensor is not what its dims and dtype say.
    """
    for tensor, where in _tensors(proto, place):
        size = tensor_bytes(tensor, where)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor, where
        elif tensor.data_type == onnx.TensorProto.STRING:
            _expect(len(tensor.string_data), _count(tensor), "strings", where)
        elif tensor.HasField("raw_data"):
            _expect(len(tensor.raw_data), size, "bytes", where)
        else:
            _check_typed_data(tensor, where)


def tensor_bytes(tensor: onnx.TensorProto, place: str) -> int:
    """The bytes that the data of `tensor` must have; 0 for strings. Raises InputError for impossible dims or dtype."""
    try:
        dtype = oir.DataType(tensor.data_type)
    except ValueError:
        dtype = oir.DataType.UNDEFINED
    if dtype == oir.DataType.UNDEFINED:
        raise InputError(f"unknown tensor data type {tensor.data_type}", place=place, hint="pip install --upgrade onnx")
    if any(size < 0 for size in tensor.dims):
        raise InputError(f"a tensor has the negative dim {min(tensor.dims)}", place=place, hint=_EXPORT_AGAIN)
    count = _count(tensor)
    if count >= 1 << 60:
        raise InputError(f"a tensor claims {count} elements", place=place, hint=_EXPORT_AGAIN)
    return 0 if dtype == oir.DataType.STRING else -(-count * dtype.bitwidth // 8)


def raised(proto: onnx.ModelProto, whole: Callable[[], onnx.ModelProto], place: str) -> onnx.ModelProto | None:
    """A model of the first opsets, whose operators broadcast by attributes, in opset 9; None when it is newer.

    Args:
        proto: the model, its weights left out.
        whole: reads the model with its weights.
        place: the file.

    Raises:
        InputError: the `onnx` package cannot convert it.
    """
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), _OLDEST_OPSET)
    if opset >= _OLDEST_OPSET:
        return None
    from onnx import version_converter

    try:
        return version_converter.convert_version(whole(), _RAISED_OPSET)
    except Exception as error:
        reason = str(error).strip().splitlines()[0].rpartition(" failed: ")[2]
        cause = f"opset {opset} is too old, and `onnx` cannot raise it: {reason}"
        raise InputError(cause, place=place, hint=_EXPORT_AGAIN) from error


def check_types(proto: onnx.ModelProto, place: str) -> list[tuple[str, onnx.TypeProto]]:
    """Check that operators get the number and dtypes of inputs they accept, and infer the types of the values.

    Declared shapes of inner values and outputs are not believed: exporters write wrong ones.

    Args:
        proto: the model; its declared inner types and output types are removed.
        place: the file.

    Returns:
        The inferred (name, type) of the values of the main graph.

    Raises:
        InputError: an operator gets too few inputs, or a dtype that it does not accept.
    """
    declared = {output.name: output.type.tensor_type.elem_type for output in proto.graph.output}
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.ClearField("type")
    data = proto.SerializeToString()
    if len(data) > _LARGEST_TYPE_CHECK:
        return []
    try:
        inferred = onnx.shape_inference.infer_shapes(data, check_type=True).graph
    except Exception as error:
        where, cause = _inference_error(str(error))
        hint = "this model was not valid before; check it with onnx.checker.check_model"
        raise InputError(cause, place=f"{place}: {where}" if where else place, hint=hint) from error
    for output in inferred.output:
        made, said = output.type.tensor_type.elem_type, declared.get(output.name, 0)
        if made and said and made != said:
            cause = f"output {quoted(output.name)} is declared {_dtype(said)} but is computed as {_dtype(made)}"
            raise InputError(cause, place=place, hint=_EXPORT_AGAIN)
    if any(node.op_type in MISJUDGED for graph in _graphs(proto) for node in graph.node):
        return []
    return [(info.name, info.type) for info in (*inferred.value_info, *inferred.output)]


def _check_graph(graph: onnx.GraphProto, outer: frozenset[str], place: str) -> tuple[set[str], bool]:
    """Check one graph and those in its nodes; give the outer names it reads and whether its nodes are in order."""
    made: dict[str, str] = {}
    for info in graph.input:
        _define(made, info.name, "a graph input", place)
    initializers: dict[str, str] = {}
    for tensor in graph.initializer:
        _define(initializers, tensor.name, "an initializer", place)
    made.update(initializers)
    ready = set(made)
    for node in graph.node:
        for name in node.output:
            if name:
                _define(made, name, describe(node), place)
    visible = outer.union(made)
    free: set[str] = set()
    reads: list[set[str]] = []
    ordered = True
    for node in graph.node:
        read = {name for name in node.input if name}
        for name in sorted(read - visible):
            cause = f"input {quoted(name)} is made by nothing in the graph"
            raise InputError(cause, place=f"{place}: {describe(node)}", hint=_EXPORT_AGAIN)
        for body in _bodies(node):
            inside, good = _check_graph(body, visible, f"{place}: {describe(node)}")
            read |= inside
            ordered &= good
        reads.append(read & made.keys())
        free.update(name for name in read if name not in made)
        ordered = ordered and reads[-1] <= ready
        ready.update(node.output)
    for info in graph.output:
        if info.name not in visible:
            cause = f"output {quoted(info.name)} is made by nothing in the graph"
            raise InputError(cause, place=place, hint=_EXPORT_AGAIN)
        if info.name not in made:
            free.add(info.name)
    if not ordered:
        _check_acyclic(graph, reads, place)
    return free, ordered


def _check_acyclic(graph: onnx.GraphProto, reads: Sequence[set[str]], place: str) -> None:
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    needs = {index: {maker[name] for name in read if name in maker} for index, read in enumerate(reads)}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(describe(graph.node[index]) for index in error.args[1][:6])
        raise InputError(f"nodes depend on each other in a cycle: {cycle}", place=place, hint=_EXPORT_AGAIN) from None


def _define(made: dict[str, str], name: str, maker: str, place: str) -> None:
    if not name:
        raise InputError(f"{maker} has no name", place=place, hint=_EXPORT_AGAIN)
    if name in made:
        cause = f"value {quoted(name)} is made twice: by {made[name]} and by {maker}"
        raise InputError(cause, place=place, hint="export the model again with unique value names")
    made[name] = maker


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    found: list[onnx.GraphProto] = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from _nodes(body.node)


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield proto.graph
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in _nodes(nodes):
            yield from _bodies(node)


def _texts(proto: onnx.ModelProto) -> Iterator[str]:
    yield from (proto.producer_name, proto.producer_version, proto.domain, proto.doc_string)
    yield from _metadata(proto)
    for entry in proto.opset_import:
        yield entry.domain
    for function in proto.functions:
        yield from (function.name, function.domain, function.doc_string, function.overload)
        yield from (*function.input, *function.output, *function.attribute)
        yield from _metadata(function)
    for graph in _graphs(proto):
        yield from (graph.name, graph.doc_string)
        yield from _metadata(graph)
        for info in (*graph.input, *graph.output, *graph.value_info):
            yield from (info.name, info.doc_string)
            yield from _metadata(info)
            for dim in info.type.tensor_type.shape.dim:
                yield from (dim.dim_param, dim.denotation)
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in _nodes(nodes):
            yield from (node.name, node.op_type, node.domain, node.overload, node.doc_string)
            yield from node.input
            yield from node.output
            yield from _metadata(node)
            for attribute in node.attribute:
                yield from (attribute.name, attribute.ref_attr_name, attribute.doc_string)
    for tensor, _ in _tensors(proto, ""):
        yield from (tensor.name, tensor.doc_string)
        yield from _metadata(tensor)


def _metadata(message: Any) -> Iterator[str]:
    for entry in message.metadata_props:
        yield entry.key
        yield entry.value


def _tensors(proto: onnx.ModelProto, place: str) -> Iterator[tuple[onnx.TensorProto, str]]:
    for graph in _graphs(proto):
        for tensor in graph.initializer:
            yield tensor, f"{place}: initializer {quoted(tensor.name)}"
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in _nodes(nodes):
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.UNDEFINED and not attribute.ref_attr_name:
                    cause = f"the attribute {quoted(attribute.name)} has no type"
                    raise InputError(cause, place=f"{place}: {describe(node)}", hint=_EXPORT_AGAIN)
                if attribute.type == onnx.AttributeProto.TENSOR and not attribute.ref_attr_name:
                    yield attribute.t, f"{place}: {describe(node)}"
                for tensor in attribute.tensors:
                    yield tensor, f"{place}: {describe(node)}"


def _count(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def _check_typed_data(tensor: onnx.TensorProto, place: str) -> None:
    dtype, count = oir.DataType(tensor.data_type), _count(tensor)
    if dtype in (oir.DataType.FLOAT, oir.DataType.COMPLEX64):
        held, expected = len(tensor.float_data), count * dtype.bitwidth // 32
    elif dtype in (oir.DataType.DOUBLE, oir.DataType.COMPLEX128):
        held, expected = len(tensor.double_data), count * dtype.bitwidth // 64
    elif dtype == oir.DataType.INT64:
        held, expected = len(tensor.int64_data), count
    elif dtype in (oir.DataType.UINT32, oir.DataType.UINT64):
        held, expected = len(tensor.uint64_data), count
    else:
        held, expected = len(tensor.int32_data), -(-count * min(dtype.bitwidth, 8) // 8)
    _expect(held, expected, "values", place)


def _expect(held: int, expected: int, unit: str, place: str) -> None:
    if held != expected:
        raise InputError(f"a tensor holds {held} {unit}, its dims need {expected}", place=place, hint=_EXPORT_AGAIN)


def _dtype(number: int) -> str:
    return oir.DataType(number).name.lower()


def _inference_error(text: str) -> tuple[str, str]:
    """The node and the cause in the text of an `onnx` inference error."""
    found = re.search(r"\(op_type:([^,()]*)(?:, node name: ([^)]*))?\):?\s*", text)
    where = ""
    if found:
        where = f"node {quoted(found[2])} ({found[1]})" if found[2] else f"a node {quoted(found[1])}"
        text = text[found.end() :]
    cause = re.sub(r"\[\w*Error\]\s*", "", text).strip().splitlines()
    return where, quoted(cause[0])[1:-1] if cause and cause[0] else "the types of its inputs do not fit"
