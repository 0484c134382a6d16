"""Writing matrices as blocks of few bits: MatMulNBits and GatherBlockQuantized, or DequantizeLinear.

ONNX Runtime's CPU has kernels of MatMulNBits for 2, 4 and 8 bits, with blocks of 16, 32, 64, ... numbers. They are
quick with `accuracy_level` 4, which rounds what is multiplied to 8 bits, block by block; without it 4 bits are quick as
well, but 8 bits and 2 bits up to two hundred times slower than float32. So 8 bits that multiply numbers which are not
rounded are two products of 4 bits, q = 16 * high + low. ONNX Runtime turns DequantizeLinear in blocks before a MatMul,
or a Gemm that does not transpose the weight, into the same kernels.

Zero points that are no integers have no quick kernel. Each block of a matrix can have an offset all the same: it counts
for the sum of what the block multiplies, and a product of these sums with all offsets is added, one of `block` as
large as the layer's.

MatMulNBits stores [out, blocks, bytes] and GatherBlockQuantized [rows, bytes], with the same scales, so that a table
that is also multiplied by is stored once, where whole blocks fill its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.packing import pack
from burnish.ir.views.linear import Linear
from burnish.ir.views.parameter import same_shape
from burnish.ir.walk import is_op
from burnish.passes import qdq
from burnish.passes.grids import Grid, Scales
from burnish.passes.weight_sites import LEAST_BLOCK, Matrix, Table

CONTRIB = "com.microsoft"
Form = Literal["matmul-nbits", "dequantize"]
Activations = Literal["int8", "float"]

OPSET = 21
"""The first opset whose DequantizeLinear takes blocks."""

SUMS = 13
"""The first opset whose ReduceSum reads its axes as an input: that of offsets."""


def grid(form: Form, bits: int, symmetric: bool) -> Grid:
    """The integers that a form stores."""
    return Grid(bits, signed=form == "dequantize" and symmetric, symmetric=symmetric)


def block_for(matrix: Matrix, block: int) -> int:
    """The largest block that suits a matrix and is not above `block`.

    No block is more than the next power of two above the inputs, and whole blocks fill the rows of a table that is also
    multiplied by.
    """
    size = matrix.shape[1]
    found = min(block, max(LEAST_BLOCK, 1 << (size - 1).bit_length()))
    whole = bool(matrix.tables and matrix.linears)
    while whole and size % found and found > LEAST_BLOCK:
        found //= 2
    return found


def refusal(model: oir.Model, matrix: Matrix, form: Form, bits: int) -> str | None:
    """Why a matrix cannot have a form, in plain words; None when it can."""
    if form == "matmul-nbits" and matrix.tables and matrix.linears and matrix.shape[1] % LEAST_BLOCK:
        return f"rows of {matrix.shape[1]} numbers hold no whole blocks of {LEAST_BLOCK}"
    if form == "matmul-nbits":
        parted = matrix.tables and matrix.shape[1] * bits % 8
        return f"rows of {matrix.shape[1]} numbers of {bits} bits fill no whole bytes" if parted else None
    if bits == 2:
        return "ONNX Runtime 1.32 computes other numbers from standard blocks of 2 bits; `form=matmul-nbits` is right"
    if matrix.tables:
        return "standard ONNX has no lookup in blocks of integers; `form=matmul-nbits` has one"
    if any(layer.node.graph is not model.graph for layer in matrix.linears):
        return "it is in a branch or a loop, where ONNX Runtime cannot load it; `form=matmul-nbits` runs there"
    if (opset := model.graph.opset_imports.get("", 1)) < OPSET:
        return f"blocks of integers need opset {OPSET}, and the model has {opset}: raise it with `--opset`"
    return None


def takes_offsets(model: oir.Model, matrix: Matrix, form: Form) -> bool:
    """Whether the blocks of a matrix can have offsets."""
    known = all(match.rank(one.input) or match.rank(one.node.outputs[0]) for one in matrix.linears)
    return form == "matmul-nbits" and known and not matrix.tables and model.graph.opset_imports.get("", 1) >= SUMS


def sizes(
    matrix: Matrix,
    form: Form,
    block: int,
    symmetric: bool,
    bits: int,
    *,
    activations: Activations = "int8",
    shifted: bool = False,
) -> tuple[int, int]:
    """Elements and bytes of the constants that take the place of a matrix, as `ir.cost` counts them.

    Args:
        matrix: the matrix.
        form: how it is written.
        block: how many neighbours share a scale.
        symmetric: there are no zero points.
        bits: of each integer.
        activations: `float` writes 8 bits as two times 4.
        shifted: each block has an offset.
    """
    if form == "matmul-nbits" and bits == 8 and activations == "float":
        high, low = (sizes(matrix, form, block, one, 4) for one in (symmetric, False))
        bias, stored = _bias_sizes(matrix)
        return high[0] + low[0] - bias, high[1] + low[1] - stored
    out, features = matrix.shape
    if shifted:
        elements, stored = sizes(matrix, form, block, symmetric, bits)
        width = matrix.dtype.bitwidth // 8 if matrix.dtype is not None else 4
        more = sum(len(_split(layer, features // block)) + 1 for layer in matrix.linears)
        offsets = out * (features // block)
        return elements + offsets + more, stored + offsets * width + 8 * more
    blocks = -(-features // block)
    width = matrix.dtype.bitwidth // 8 if matrix.dtype is not None else 4
    more, held = _bias_sizes(matrix)
    elements, stored = out * features + out * blocks + more, out * blocks * width + held
    if form == "dequantize":
        zeros = 0 if symmetric else out * blocks
        return elements + zeros, stored + -(-out * features * bits // 8) + -(-zeros * bits // 8)
    zeros = 0 if symmetric else out * -(-blocks * bits // 8)
    elements, stored = elements + zeros, stored + zeros
    if not matrix.linears:
        return elements, stored + out * features * bits // 8
    shapes = 2 * len(matrix.tables)
    return elements + shapes, stored + out * blocks * (block * bits // 8) + 8 * shapes


def write(
    model: oir.Model,
    matrix: Matrix,
    form: Form,
    levels: np.ndarray,
    scales: Scales,
    *,
    activations: Activations = "int8",
    offset: np.ndarray | None = None,
) -> None:
    """Let all readers of a matrix read integers.

    Args:
        model: the model.
        matrix: what is stored otherwise.
        form: how.
        levels: integers [out, in].
        scales: of blocks along the last axis.
        activations: `float` multiplies numbers as they are; of `matmul-nbits`, with 4 or 8 bits.
        offset: added to the numbers of each block, [out, blocks]; see `takes_offsets`.
    """
    stem = matrix.parameter.source.name or "weight"
    if form == "dequantize":
        value = _dequantized(model, matrix, stem, levels, scales)
        for layer in matrix.linears:
            _replace(layer.node, _multiplied(model, layer, value))
        return
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    halved = activations == "float" and scales.grid.bits == 8
    parts = _halves(levels, scales) if halved else [(levels, scales)]
    first, *others = [_packed(model, matrix, stem, *part) for part in parts]
    offsets = None if offset is None else edit.add_constant(model, f"{stem}_offset", offset.T.copy())
    for layer in matrix.linears:
        second = None if offsets is None else _shifted(model, layer, offsets)
        for other in others:
            second = _product(layer, other, activations, None)
        _replace(layer.node, _sum(layer.node, _product(layer, first, activations, _bias(model, layer)), second))
    for table in matrix.tables:
        looked = [_looked_up(model, table, stem, term, matrix) for term in (first, *others)]
        _replace(table.node, _sum(table.node, looked[0], looked[1] if others else None))


@dataclass(frozen=True)
class _Term:
    """The constants of a matrix, or of half of its bits."""

    data: oir.Value
    scale: oir.Value
    zero: oir.Value | None
    bits: int
    block: int


def _halves(levels: np.ndarray, scales: Scales) -> list[tuple[np.ndarray, Scales]]:
    """Integers of 8 bits as two times 4; the sum of what both stand for is what the integers stood for."""
    high, low = (replace(scales.grid, bits=4, symmetric=one) for one in (scales.grid.symmetric, False))
    whole, zero = levels.astype(np.uint8), scales.zero_point.astype(np.uint8)
    coarse = (scales.scale * 16).astype(scales.scale.dtype)
    return [
        (whole >> 4, replace(scales, grid=high, scale=coarse, zero_point=zero >> 4)),
        (whole & 15, replace(scales, grid=low, zero_point=zero & 15)),
    ]


def _packed(model: oir.Model, matrix: Matrix, stem: str, levels: np.ndarray, scales: Scales) -> _Term:
    bits, block = scales.grid.bits, scales.block or 1
    out, features = levels.shape
    blocks = -(-features // block)
    filled = levels.astype(np.uint8)
    if matrix.linears:
        filled = np.zeros((out, blocks * block), np.uint8)
        filled[:, :features] = levels
        filled = filled.reshape(out, blocks, block)
    data = edit.add_constant(model, f"{stem}_{bits}bit", pack(filled, bits))
    scale = edit.add_constant(model, f"{stem}_scale", scales.scale)
    zero = None
    if not scales.grid.symmetric:
        zero = edit.add_constant(model, f"{stem}_zero_point", pack(scales.zero_point, bits))
    return _Term(data, scale, zero, bits, block)


def _product(layer: Linear, term: _Term, activations: Activations, bias: oir.Value | None) -> oir.Node:
    level = 4 if activations == "int8" else 1
    attributes = {
        "K": layer.in_features,
        "N": layer.out_features,
        "bits": term.bits,
        "block_size": term.block,
        "accuracy_level": level,
    }
    inputs = [layer.input, term.data, term.scale, term.zero, None, bias]
    return edit.make("MatMulNBits", inputs, attributes, like=layer.node, domain=CONTRIB)


def _looked_up(model: oir.Model, table: Table, stem: str, term: _Term, matrix: Matrix) -> oir.Node:
    rows = term.data if not matrix.linears else _rows(model, stem, term.data, table)
    attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": term.bits, "block_size": term.block}
    inputs = [rows, table.node.inputs[1], term.scale, term.zero]
    return edit.make("GatherBlockQuantized", inputs, attributes, like=table.node, domain=CONTRIB)


def _split(layer: Linear, blocks: int) -> list[int]:
    """What a Reshape is given to let the blocks of a layer's input be rows: 0 keeps a dimension."""
    rank = match.rank(layer.input) or match.rank(layer.node.outputs[0]) or 2
    return [*[0] * (rank - 1), blocks, layer.in_features // blocks]


def _shifted(model: oir.Model, layer: Linear, offsets: oir.Value) -> oir.Node:
    """The product of the sums of the blocks of a layer's input with offsets [blocks, out]."""
    blocks = (match.static_shape(offsets) or (0,))[0]
    sizes = _split(layer, blocks)
    shape = edit.add_constant(model, "blocks", np.array(sizes, np.int64))
    parted = edit.make("Reshape", [layer.input, shape], like=layer.node)
    axis = edit.add_constant(model, "axis", np.array([len(sizes) - 1], np.int64))
    summed = edit.make("ReduceSum", [parted.outputs[0], axis], {"keepdims": 0}, like=layer.node)
    dims = layer.input.shape.dims[:-1] if layer.input.shape is not None else None
    for node, own in ((parted, (blocks, sizes[-1])), (summed, (blocks,))):
        node.outputs[0].type = layer.input.type
        node.outputs[0].shape = None if dims is None else oir.Shape([*dims, *own])
    edit.insert_before(layer.node, [parted, summed])
    return edit.make("MatMul", [summed.outputs[0], offsets], like=layer.node)


def _sum(old: oir.Node, first: oir.Node, second: oir.Node | None) -> oir.Node:
    """A node, or the sum of two, which stand before an old one then."""
    if second is None:
        return first
    edit.insert_before(old, [first, second])
    return edit.make("Add", [same_shape(one, old.outputs[0]) for one in (first, second)], like=old)


def _replace(old: oir.Node, new: oir.Node) -> None:
    new.name = old.name
    same_shape(new, old.outputs[0])
    edit.replace_node(old, new)


def _rows(model: oir.Model, stem: str, data: oir.Value, table: Table) -> oir.Value:
    """The bytes of a matrix that is also multiplied by, as the rows of a table; right before the lookup."""
    rows, blocks, each = match.static_shape(data) or (0, 0, 0)
    shape = edit.add_constant(model, f"{stem}_rows", np.array([rows, blocks * each], np.int64))
    node = edit.make("Reshape", [data, shape], like=table.node)
    node.outputs[0].type, node.outputs[0].shape = data.type, oir.Shape([rows, blocks * each])
    edit.insert_before(table.node, [node])
    return node.outputs[0]


def _dequantized(
    model: oir.Model, matrix: Matrix, stem: str, levels: np.ndarray, scales: Scales
) -> dict[oir.Graph, oir.Value]:
    """The numbers [in, out] behind a DequantizeLinear, in each graph that multiplies by them."""
    turned = Scales(scales.grid, scales.scale.T.copy(), scales.zero_point.T.copy(), 0, scales.block)
    constants = qdq.weight_constants(model, stem, levels.T, turned, zero_point=not scales.grid.symmetric)
    found: dict[oir.Graph, oir.Value] = {}
    for layer in matrix.linears:
        graph = layer.node.graph
        assert isinstance(graph, oir.Graph)
        if graph not in found:
            found[graph] = qdq.dequantized(layer.node, constants, levels.T.shape, turned)
    return found


def _multiplied(model: oir.Model, layer: Linear, matrices: dict[oir.Graph, oir.Value]) -> oir.Node:
    """A layer that reads numbers [in, out]; alpha is part of them, and beta of the bias."""
    weight = matrices[layer.node.graph]  # type: ignore[index]
    if is_op(layer.node, "MatMul"):
        return edit.make("MatMul", [layer.input, weight], like=layer.node)
    return edit.make("Gemm", [layer.input, weight, _bias(model, layer)], like=layer.node)


def _bias(model: oir.Model, layer: Linear) -> oir.Value | None:
    """The bias that the node of a layer itself adds, [out]; None where it adds none."""
    bias = None if layer.add is not None else layer.bias()
    if bias is None:
        return None
    plain = _plain_bias(layer)
    if plain is not None:
        return plain
    dtype = layer.dtype
    assert dtype is not None
    return edit.add_rounded(model, f"{layer.node.name}_bias", bias, dtype)


def _bias_sizes(matrix: Matrix) -> tuple[int, int]:
    """Elements and bytes by which the biases that the nodes add are more than those before."""
    width = matrix.dtype.bitwidth // 8 if matrix.dtype is not None else 4
    more = 0
    for layer in matrix.linears:
        if layer.bias_parameter is not None and layer.add is None and _plain_bias(layer) is None:
            more += layer.out_features - _held_alone(layer)
    return more, more * width


def _plain_bias(layer: Linear) -> oir.Value | None:
    """The bias of a Gemm as it is stored, where that is a vector [out] which counts once."""
    found = layer.bias_parameter
    if found is None or match.attribute(layer.node, "beta", 1.0) != 1.0 or found.shape != (layer.out_features,):
        return None
    return found.value


def _held_alone(layer: Linear) -> int:
    """Elements of the bias of a layer that nothing else reads."""
    found = layer.bias_parameter
    tensor = weights.tensor_of(found.source) if found is not None else None
    return 0 if tensor is None or found is None or found.others(layer.node) else tensor.size
