"""Edits that store matrices as blocks of few bits: rounded, or without loss where they lie on such integers already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.packing import pack, unpack
from burnish.passes import packed_layers, published_grids
from burnish.passes.base import Outcome
from burnish.passes.grids import Scales, signed
from burnish.passes.lossy import Edit, Savings
from burnish.passes.packed_layers import Activations, Form
from burnish.passes.published_grids import Published
from burnish.passes.stored_convolutions import bits_of
from burnish.passes.weight_rounding import Rounding, error, of_tied, rounded
from burnish.passes.weight_sites import Matrix

_EXACT = " exact"


@dataclass(frozen=True)
class Storage:
    """How matrices are stored; see the options of `quantize-weights`."""

    spec: str
    form: Form
    block: int
    symmetric: bool
    rounding: Rounding
    activations: Activations

    def exact(
        self, model: oir.Model, found: Mapping[str, Matrix], wanted: Sequence[int], outcome: Outcome
    ) -> dict[str, Edit]:
        """Storing the matrices that lie on integers of at most the most of the wanted bits, by name."""
        made = {}
        for name, matrix in found.items():
            fitting = [bits for bits in (2, 4, 8) if bits <= max(wanted)]
            possible = [bits for bits in fitting if self._refusal(model, matrix, bits) is None]
            integers = published_grids.find(
                matrix.weight(),
                possible,
                _dtype(matrix),
                signed=self.form == "dequantize",
                offsets=packed_layers.takes_offsets(model, matrix, self.form),
            )
            edit = None if integers is None else self._edit(model, name, matrix, integers, outcome)
            if edit is not None:
                made[name] = edit
        return made

    def edits(
        self,
        model: oir.Model,
        name: str,
        matrix: Matrix,
        wanted: Sequence[int],
        moment: np.ndarray | None,
        outcome: Outcome,
    ) -> list[Edit]:
        """Rounding a matrix to each of the wanted bits; where it stays, `outcome` is told why.

        Args:
            model: the model.
            name: of the matrix.
            matrix: the matrix.
            wanted: bits.
            moment: of the rows that it multiplies: integers are rounded for it. None to round later.
            outcome: takes errors and reasons.
        """
        found = []
        for bits in wanted:
            edit = self._edit(model, name, matrix, bits, outcome)
            if edit is not None:
                found.append(edit if moment is None else self._measured(edit, matrix, moment, outcome))
        return found

    def _refusal(self, model: oir.Model, matrix: Matrix, bits: int) -> str | None:
        if bits == 2 and self.activations == "float" and matrix.linears:
            return "ONNX Runtime has no quick kernel for 2 bits and activations that are not rounded"
        nested = any(layer.node.graph is not model.graph for layer in matrix.linears)
        if (
            nested
            and matrix.dtype == oir.DataType.FLOAT16
            and (self.form, self.activations) == ("matmul-nbits", "int8")
        ):
            why = "ONNX Runtime 1.32 casts scales of float16 in each run in a branch or a loop, and reads them as 0"
            return f"{why}; `activations=float` is right"
        return packed_layers.refusal(model, matrix, self.form, bits)

    def _edit(
        self, model: oir.Model, name: str, matrix: Matrix, integers: Published | int, outcome: Outcome
    ) -> Edit | None:
        """Storing a matrix as the integers that it lies on, or rounding it to so many bits."""
        exact = integers if isinstance(integers, Published) else None
        bits = integers.scales.grid.bits if isinstance(integers, Published) else integers
        block = packed_layers.block_for(matrix, self.block) if exact is None else exact.scales.block or 1
        symmetric = self.symmetric if exact is None else exact.scales.grid.symmetric
        shifted, halved = exact is not None and exact.offset is not None, bits == 8 and self.activations == "float"
        elements, stored = packed_layers.sizes(
            matrix, self.form, block, symmetric, bits, activations=self.activations, shifted=shifted
        )
        tensor, reason = weights.tensor_of(matrix.parameter.source), self._refusal(model, matrix, bits)
        assert tensor is not None
        if reason is None and stored >= tensor.nbytes:
            reason = f"{bits} bits with their scales take no fewer bytes"
        if reason is not None:
            if exact is None:
                outcome.skip(matrix.readers[0].node, reason)
            return None
        macs = None if (shifted or halved) and matrix.linears else 0
        edit = Edit(
            self.spec,
            name,
            f"int{bits} block {block}" + (_EXACT if exact is not None else ""),
            frozenset(str(node.name) for one in matrix.readers for node in one.nodes),
            Savings(tensor.size - elements, tensor.nbytes - stored, macs),
            anchors=tuple(str(one.node.name) for one in matrix.readers),
        )
        if exact is None:
            return edit
        weight = matrix.weight()
        whole = max(float(np.linalg.norm(weight)), float(np.finfo(np.float64).tiny))
        outcome.errors[edit.key] = float(np.linalg.norm(exact.numbers() - weight)) / whole
        more = {} if exact.offset is None else {"offset": exact.offset}
        return replace(edit, payload=_payload(exact.levels, exact.scales) | more)

    def _measured(self, edit: Edit, matrix: Matrix, moment: np.ndarray, outcome: Outcome) -> Edit:
        """The edit with integers and scales for a moment."""
        moment = of_tied(moment) if matrix.tables else moment
        levels, scales = self._rounded(matrix, edit, moment)
        outcome.errors[edit.key] = error(matrix.weight(), levels, scales, moment)
        return replace(edit, payload=_payload(levels, scales))

    def _rounded(self, matrix: Matrix, edit: Edit, moment: np.ndarray | None = None) -> tuple[np.ndarray, Scales]:
        bits, block = bits_of(edit), int(edit.option.split()[2])
        if edit.payload:
            grid = packed_layers.grid(self.form, bits, bool(edit.payload["symmetric"]))
            scales = Scales(grid, edit.payload["scale"], edit.payload["zero"], 1, block)
            return signed(unpack(edit.payload["levels"], bits)[:, : matrix.shape[1]], grid), scales
        grid, mirrored = packed_layers.grid(self.form, bits, self.symmetric), self.form == "matmul-nbits"
        weight = matrix.weight()
        return rounded(weight, grid, block, self.rounding, mirrored=mirrored, dtype=_dtype(matrix), moment=moment)

    def write(self, model: oir.Model, matrix: Matrix, edit: Edit, outcome: Outcome) -> None:
        """Make an edit; `outcome` takes its error where no samples made it, and that it loses nothing where it does."""
        levels, scales = self._rounded(matrix, edit)
        if edit.option.endswith(_EXACT):
            outcome.notes["on integers already, as weights published in few bits are: stored without loss"] += 1
        if not edit.payload:
            outcome.errors[edit.key] = error(matrix.weight(), levels, scales)
        offset = edit.payload.get("offset")
        packed_layers.write(model, matrix, self.form, levels, scales, activations=self.activations, offset=offset)


def _payload(levels: np.ndarray, scales: Scales) -> dict[str, np.ndarray]:
    packed, symmetric = pack(levels, scales.grid.bits), np.array(scales.grid.symmetric)
    return {"levels": packed, "scale": scales.scale, "zero": scales.zero_point, "symmetric": symmetric}


def _dtype(matrix: Matrix) -> np.dtype[np.floating]:
    assert matrix.dtype is not None
    return np.dtype(matrix.dtype.numpy())
