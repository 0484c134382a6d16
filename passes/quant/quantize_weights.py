"""Weights of linear layers and embeddings as integers of few bits, in blocks that share a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.walk import walk
from burnish.passes import catalog, packed_layers
from burnish.passes.base import Outcome
from burnish.passes.lossy import Context, Edit, LossyPass, Savings, Undecided
from burnish.passes.packed_layers import Form
from burnish.passes.weight_rounding import rounded
from burnish.passes.weight_sites import LEAST_BLOCK, Matrix, found_again, matrices

_GRID = (8, 4, 2)


@dataclass(frozen=True)
class QuantizeWeights(LossyPass):
    """Store the weights of linear layers and embeddings in 8, 4 or 2 bits, in blocks that share a scale.

    Attributes:
        bits: 8, 4 or 2; 0 proposes all three for each layer, and a search takes one or none of them.
        block: how many neighbouring weights of an output share a scale: a power of two from 16 on. Of a layer with
            fewer inputs it is smaller.
        symmetric: the middle of the range is 0; else each block has a zero point as well.
        form: `matmul-nbits` is what ONNX Runtime runs (MatMulNBits, GatherBlockQuantized); `dequantize` is standard
            ONNX, DequantizeLinear in blocks, from opset 21 on (25 for 2 bits).
        rounding: `nearest` lets the steps reach all weights of a block; `mse` cuts a few off where the sum of the
            squared errors becomes less.
        embeddings: tables whose rows are looked up, too, and heads that share one with them.
    """

    bits: int = 0
    block: int = 32
    symmetric: bool = True
    form: Form = "matmul-nbits"
    rounding: Literal["nearest", "mse"] = "mse"
    embeddings: bool = True
    order: ClassVar[int] = 40
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")

    def __post_init__(self) -> None:
        if self.bits == 3:
            raise InputError(
                "nothing stores 3 bits",
                place="quantize-weights{bits=3}",
                hint="ONNX has no type and ONNX Runtime no kernel for them; 4 bits take the bytes that 3 in 4 would",
            )
        if self.bits not in (0, *_GRID):
            raise InputError(f"`bits` is {self.bits}", place="quantize-weights", hint="give 8, 4, 2, or 0 for a search")
        if self.block < LEAST_BLOCK or self.block & (self.block - 1):
            raise InputError(
                f"`block` is {self.block}", place="quantize-weights", hint=f"give a power of two from {LEAST_BLOCK} on"
            )

    @property
    def everywhere(self) -> bool:
        return self.bits > 0

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if not self.bits:
            raise Undecided(
                "`quantize-weights` has to be told how many bits, or how much may be lost",
                hint="give `bits=4`, or samples with `--data` and a budget with `--max-drop` or `--max-size`",
            )
        return self._edits(model, outcome)

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes."""
        return self._edits(model, outcome)

    def _edits(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        found = []
        for name, matrix, node in matrices(model):
            if isinstance(matrix, str):
                outcome.skip(node, matrix)
            elif matrix.tables and not self.embeddings:
                outcome.skip(node, "its weight is the table of an embedding, and `embeddings` is off")
            else:
                for bits in [self.bits] if self.bits else _GRID:
                    edit = self._edit(model, name, matrix, bits)
                    if isinstance(edit, str):
                        outcome.skip(node, edit)
                    else:
                        found.append(edit)
        return found

    def _edit(self, model: oir.Model, name: str, matrix: Matrix, bits: int) -> Edit | str:
        """Storing a matrix in so many bits, or why it is not."""
        reason = packed_layers.refusal(matrix, self.form, bits, model.graph.opset_imports.get("", 1))
        block = packed_layers.block_for(matrix, self.block)
        if reason is not None:
            return reason
        if block is None:
            return f"rows of {matrix.shape[1]} numbers hold no whole blocks of {LEAST_BLOCK}"
        tensor = weights.tensor_of(matrix.parameter.source)
        assert tensor is not None
        elements, stored = packed_layers.sizes(matrix, self.form, block, self.symmetric, bits)
        if stored >= tensor.nbytes:
            return f"{bits} bits with their scales take no fewer bytes"
        return Edit(
            catalog.spec(self),
            name,
            f"int{bits} block {block}",
            frozenset(str(node.name) for one in matrix.readers for node in one.nodes),
            Savings(tensor.size - elements, tensor.nbytes - stored, 0),
            anchors=tuple(str(one.node.name) for one in matrix.readers),
        )

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes = {str(node.name): node for node in walk(model)}
        for edit in edits:
            matrix = found_again(nodes, edit.anchors)
            if not outcome.take(matrix.readers[0].node):
                return
            bits, block = (int(word) for word in edit.option.removeprefix("int").split(" block "))
            grid = packed_layers.grid(self.form, bits, self.symmetric)
            assert matrix.dtype is not None
            levels, scales = rounded(
                matrix.weight(),
                grid,
                block,
                self.rounding,
                mirrored=self.form == "matmul-nbits",
                dtype=np.dtype(matrix.dtype.numpy()),
            )
            packed_layers.write(model, matrix, self.form, levels, scales)
