"""Which kernel ONNX Runtime gives to each product and lookup, read from the graph that it writes behind its rewrites.

ONNX Runtime joins nodes, renames them, packs weights anew and lays values out in its own way, but makes new names of
old ones. So it is given a copy in which every name is a mark that occurs once, and what it writes is searched for the
marks: of the node, of what it computes, of its weight, and of what alone follows it (a bias, an activation, a scale).
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.ir import match, weights
from burnish.ir.walk import main_graphs

UNKNOWN = "not found"
"""What is said of a product whose kernel cannot be told: it was computed beforehand, or joined beyond recognition."""

_LINEAR = (
    "MatMul Gemm FusedMatMul FusedGemm MatMulInteger QLinearMatMul QGemm MatMulNBits DynamicQuantizeMatMul"
    " MatMulIntegerToFloat Attention QAttention MultiHeadAttention GroupQueryAttention"
).split()
_FAMILIES = {
    **dict.fromkeys(_LINEAR, "linear"),
    **dict.fromkeys(("Conv", "FusedConv", "ConvInteger", "QLinearConv", "ConvTranspose"), "convolution"),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), "recurrent"),
    "GatherBlockQuantized": "rows",
    "Gather": "rows",
}
_FLOAT = frozenset(
    "MatMul Gemm FusedMatMul FusedGemm Attention MultiHeadAttention GroupQueryAttention Conv FusedConv ConvTranspose"
    " LSTM GRU RNN Gather".split()
)
_MARK = re.compile(r"burnish\d{6}_")
_ORDER = (("own", "own"), ("own", "behind"), ("weight", "weight"), ("behind", "own"), ("behind", "behind"))
"""Kinds of marks of kernels and of products that are compared, the surest first."""

_PATH = 8
"""How many nodes behind a product are looked at."""


def assigned(model: oir.Model, *, target: str = "ort-cpu") -> dict[str, str]:
    """The kernel of each product (of matrices, convolution, recurrent layer, attention) of a model, and of each lookup
    in a table of floating-point numbers.

    Args:
        model: every node of the main graph and of the graphs nested in it has a name of its own; not changed.
        target: `ort-cpu` or `ort-cuda`.

    Returns:
        By the name of the node, in the order of the nodes: the operator, with its dtype in brackets where it computes
        in floating point (`MatMul (float32)`, also where a weight is dequantized first), or `UNKNOWN`.

    Raises:
        InputError: the model cannot be loaded.
        MissingPackageError: the runtime is not installed.
    """
    copy = model.clone()
    names = {id(new): str(old.name) for old, new in zip(_nodes(model), _nodes(copy), strict=True)}
    read = _Read(copy)
    products = [node for node in _nodes(copy) if read.family(node)]
    with tempfile.TemporaryDirectory(prefix="burnish-") as name, ExitStack() as undo:
        _mark(copy, undo)
        executor(trace=Path(name), target=target)(copy).close()
        written = oir.load(Path(name) / "optimized.onnx")
        found = _matched(products, read, _Read(written))
        return {names[id(node)]: _label(found[id(node)]) if id(node) in found else UNKNOWN for node in products}


def _nodes(model: oir.Model) -> Iterator[oir.Node]:
    for graph in main_graphs(model):
        yield from graph


def _mark(model: oir.Model, undo: ExitStack) -> None:
    """Give all nodes and values names that occur once; the tensors, which other models share, get theirs back."""
    ones: list[oir.Node | oir.Value] = []
    for graph in main_graphs(model):
        ones += [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            ones += [node, *(value for value in node.outputs if value.name != "")]
    for number, one in enumerate(dict.fromkeys(ones)):
        tensor = one.const_value if isinstance(one, oir.Value) else None
        if tensor is not None:
            undo.callback(setattr, tensor, "name", tensor.name)
        one.name = f"burnish{number:06d}_"


@dataclass
class _Evidence:
    """Marks by which a product is known, the surest first: its own, those of its weight, those of what follows it."""

    own: set[str]
    weight: set[str]
    behind: set[str]


class _Read:
    """The marks of the nodes of a model."""

    def __init__(self, model: oir.Model) -> None:
        self.nodes = list(_nodes(model))
        self._constants: dict[oir.Value, set[str]] = {}
        for node in self.nodes:
            read = [value for value in node.inputs if value is not None]
            for value in read:
                if weights.is_constant(value):
                    self._constants[value] = _marks([value.name])
            if read and all(value in self._constants for value in read):
                marks = set().union(*(self._constants[value] for value in read))
                self._constants |= {value: marks | _marks([value.name]) for value in node.outputs}

    def family(self, node: oir.Node) -> str | None:
        """What a node may become another of; None for no product, and for a Gather of what is no table."""
        if node.op_type == "Gather" and not self._is_table(node.inputs[0]):
            return None
        return _FAMILIES.get(node.op_type)

    def _is_table(self, value: oir.Value | None) -> bool:
        kind = None if value is None or value not in self._constants else _dtype(value)
        return kind is not None and kind.is_floating_point()

    def evidence(self, node: oir.Node) -> _Evidence:
        """What a node is known by."""
        own = _marks([node.name, *(value.name for value in node.outputs)])
        constants = [self._constants[value] for value in node.inputs if value in self._constants]
        behind: list[str | None] = []
        for _ in range(_PATH):
            following = match.sole_consumer(node.outputs[0])
            if following is None or self.family(following):
                break
            node = following
            behind += [node.name, node.outputs[0].name]
        return _Evidence(own, set().union(*constants), _marks(behind))


def _marks(names: Sequence[str | None]) -> set[str]:
    return {mark for name in names if name for mark in _MARK.findall(name)}


def _matched(products: Sequence[oir.Node], ours: _Read, theirs: _Read) -> dict[int, oir.Node]:
    """The kernel of each product, by the product's identity; what is less sure is only looked at for what is left."""
    wanted = {id(node): ours.evidence(node) for node in products}
    families = {id(node): ours.family(node) for node in products}
    seen = [(node, theirs.evidence(node)) for node in theirs.nodes if theirs.family(node)]
    found: dict[int, oir.Node] = {}
    for kind, of_product in _ORDER:
        owners: dict[str, list[int]] = defaultdict(list)
        for key, evidence in wanted.items():
            for mark in getattr(evidence, of_product):
                owners[mark].append(key)
        for kernel, evidence in seen:
            for mark in sorted(getattr(evidence, kind)):
                left = [key for key in owners[mark] if key not in found]
                if len(left) == 1 and families[left[0]] == theirs.family(kernel):
                    found[left[0]] = kernel
    return found


def _label(kernel: oir.Node) -> str:
    if kernel.op_type not in _FLOAT:
        return kernel.op_type
    read = kernel.inputs[:1] if kernel.op_type == "Gather" else (*kernel.inputs[1:2], *kernel.inputs[:1])
    kinds = [_dtype(value) for value in read]
    kind = next((one for one in kinds if one is not None), None)
    return kernel.op_type if kind is None else f"{kernel.op_type} ({kind.numpy().name})"


def _dtype(value: oir.Value | None) -> oir.DataType | None:
    """The element type of a value of the written graph, which declares none within, as far as nodes before it tell."""
    for _ in range(64):
        if value is None or value.dtype is not None:
            return None if value is None else value.dtype
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Cast":
            return oir.DataType(match.attribute(node, "to"))
        value = match.input_of(node, 1 if node.op_type in ("DequantizeLinear", "Where") else 0)
    return None
