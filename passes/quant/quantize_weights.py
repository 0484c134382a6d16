"""Weights of linear layers and embeddings as integers of few bits, in blocks that share a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.convolution import Convolution, convolutions
from burnish.ir.walk import walk
from burnish.passes import catalog, stored_convolutions
from burnish.passes.base import Outcome
from burnish.passes.layers import Layer
from burnish.passes.lossy import Context, Edit, LossyPass, Undecided
from burnish.passes.moments import moments
from burnish.passes.packed_layers import Activations, Form
from burnish.passes.stored_matrices import Storage
from burnish.passes.weight_rounding import MEASURED, Rounding, clip_of
from burnish.passes.weight_sites import LEAST_BLOCK, Matrix, found_again, matrices

_PLACE = "quantize-weights"
_GRID = (8, 4, 2)


@dataclass(frozen=True)
class QuantizeWeights(LossyPass):
    """Store the weights of linear layers and embeddings in 8, 4 or 2 bits, in blocks that share a scale.

    Weights that were published in few bits lie on such integers already: they are found, and stored without loss.

    Attributes:
        bits: 8, 4 or 2; 0 proposes all three for each layer, and a search takes one or none of them.
        block: how many neighbouring weights of an output share a scale: a power of two from 16 on. Of a layer with
            fewer inputs it is smaller.
        symmetric: the middle of the range is 0; else each block has a zero point as well.
        form: `matmul-nbits` is what ONNX Runtime runs (MatMulNBits, GatherBlockQuantized); `dequantize` is standard
            ONNX, DequantizeLinear in blocks of 8 or 4 bits, from opset 21 on.
        rounding: `nearest` lets the steps reach all weights of a block; `mse` cuts a few off where the sum of the
            squared errors becomes less; `hqq` is half-quadratic quantization; `gptq` makes the change of the outputs
            small, and needs samples; `adaround` also learns where each weight of a convolution is rounded up or down.
        steps: of learning by `adaround`, for each convolution.
        published: weights that lie on integers of at most `bits` bits already are stored as these, whatever `block`,
            `symmetric` and `rounding` say; off rounds them like others.
        activations: `int8` rounds what is multiplied to 8 bits in each run, which is fastest; `float` multiplies it as
            it is, 8 bits as two times 4. Of `matmul-nbits`.
        embeddings: tables whose rows are looked up, too, and heads that share one with them.
        convolutions: those too, in 8 or 4 bits behind a DequantizeLinear, which only makes the file smaller. `gptq` and
            `adaround` round them for their patches, in turn with `bits` and no budget; transposed ones by `mse`.
        memory: MiB of statistics that are held at once while samples are run, and of activations; less takes more runs.
    """

    bits: int = 0
    block: int = 32
    symmetric: bool = True
    form: Form = "matmul-nbits"
    rounding: Rounding = "mse"
    steps: int = 1000
    published: bool = True
    activations: Activations = "int8"
    embeddings: bool = True
    convolutions: bool = False
    memory: int = 1024
    order: ClassVar[int] = 40
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")
    prepare: ClassVar[tuple[str, ...]] = ("fold-codebook", "fold-batchnorm")

    def __post_init__(self) -> None:
        if self.bits == 3:
            hint = "ONNX has no type and ONNX Runtime no kernel for them; 4 bits take the bytes that 3 in 4 would"
            raise InputError("nothing stores 3 bits", place="quantize-weights{bits=3}", hint=hint)
        if self.bits not in (0, *_GRID):
            raise InputError(f"`bits` is {self.bits}", place=_PLACE, hint="give 8, 4, 2, or 0 for a search")
        if self.block < LEAST_BLOCK or self.block & (self.block - 1):
            raise InputError(f"`block` is {self.block}", place=_PLACE, hint=f"a power of two from {LEAST_BLOCK} on")
        if self.activations == "float" and self.form == "dequantize":
            hint = "leave `activations` out: ONNX Runtime chooses for this form"
            raise InputError("`activations=float` is for `form=matmul-nbits`", place=_PLACE, hint=hint)
        if self.memory < 1:
            raise InputError(f"`memory` is {self.memory}", place=_PLACE, hint="give some MiB")
        if self.steps < 1:
            raise InputError(f"`steps` is {self.steps}", place=_PLACE, hint="`rounding=gptq` learns nothing")
        if self.rounding == "adaround" and not self.convolutions:
            hint = "add `convolutions=true`, or take `rounding=gptq`, which is what linear layers get"
            raise InputError("`rounding=adaround` is for convolutions, which are left alone", place=_PLACE, hint=hint)

    @property
    def decided(self) -> bool:
        return self.bits > 0 and self.rounding in MEASURED

    @property
    def everywhere(self) -> bool:
        return self.bits > 0 and self.rounding not in MEASURED

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if not self.everywhere:
            raise Undecided(
                "`quantize-weights` has to be told how many bits, or how much may be lost",
                hint="give `bits=4` and a `rounding` that needs no samples, or samples with `--data`, and a budget",
            )
        images = stored_convolutions.found(model, self.convolutions)
        found = self._found(model, outcome)
        exact = self._exact(model, found, outcome)
        return [*exact.values(), *self._plain(model, found, exact, images, outcome)]

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds `levels`, packed, `scale` and `zero` (and `offset`), where samples
        made them or the weight lies on them.
        """
        found, images = self._found(model, outcome), stored_convolutions.of(model, self.convolutions, context, outcome)
        samples, limit = self.rounding in MEASURED, self.memory << 20
        seen = {name: one for name, one in images.items() if samples and stored_convolutions.measured(one)}
        exact = self._exact(model, found, outcome)
        left = {name: one for name, one in found.items() if self._left(exact.get(name))}
        measured: dict[str, Sequence[Layer]] = {n: one.linears for n, one in left.items() if samples and one.linears}
        plain = {name: one for name, one in left.items() if name not in measured}
        stored = {name: one for name, one in images.items() if name not in seen}
        edits = [*exact.values(), *self._plain(model, plain, exact, stored, outcome)]
        turned, how = self.bits > 0 and not context.searched, (self.bits, self._steps)
        measured |= {} if turned else {name: [one] for name, one in seen.items()}
        for name, moment in moments(model, measured, context, limit):
            known = None if isinstance(moment, str) else moment
            if name in found:
                made = self._storage.edits(model, name, found[name], self._left(exact.get(name)), known, outcome)
            else:
                made = self._stored(model, name, images[name], known, outcome)
            if made and isinstance(moment, str):
                outcome.notes[f"rounded by `mse` in place of `{self.rounding}`: {moment}"] += 1
            edits += made
        if turned and seen:
            edits += stored_convolutions.edits_in_turn(model, self, how, seen, edits, context, limit, outcome)
        places = {name: index for index, name in enumerate((*found, *images))}
        return sorted(edits, key=lambda edit: places[edit.site])

    def _plain(
        self,
        model: oir.Model,
        found: dict[str, Matrix],
        exact: dict[str, Edit],
        images: dict[str, Convolution],
        outcome: Outcome,
    ) -> list[Edit]:
        """The edits that need no samples, but those that lose nothing."""
        edits = []
        for name, one in found.items():
            edits += self._storage.edits(model, name, one, self._left(exact.get(name)), None, outcome)
        return edits + [e for name, one in images.items() for e in self._stored(model, name, one, None, outcome)]

    def _stored(
        self, model: oir.Model, name: str, layer: Convolution, moment: np.ndarray | None, outcome: Outcome
    ) -> list[Edit]:
        return stored_convolutions.edits(
            model, catalog.spec(self), name, layer, self._wanted, moment, self._steps, outcome
        )

    def _found(self, model: oir.Model, outcome: Outcome) -> dict[str, Matrix]:
        found = {}
        for name, matrix, node in matrices(model):
            if isinstance(matrix, str):
                outcome.skip(node, matrix)
            elif matrix.tables and not self.embeddings:
                outcome.skip(node, "its weight is the table of an embedding, and `embeddings` is off")
            else:
                found[name] = matrix
        for layer in [] if self.convolutions else convolutions(model):
            outcome.skip(layer.node, "it is a convolution, and `convolutions` is off")
        return found

    @property
    def _storage(self) -> Storage:
        return Storage(catalog.spec(self), self.form, self.block, self.symmetric, self.rounding, self.activations)

    @property
    def _steps(self) -> int:
        return self.steps if self.rounding == "adaround" else 0

    @property
    def _wanted(self) -> tuple[int, ...]:
        return (self.bits,) if self.bits else _GRID

    def _exact(self, model: oir.Model, found: dict[str, Matrix], outcome: Outcome) -> dict[str, Edit]:
        return self._storage.exact(model, found, self._wanted, outcome) if self.published else {}

    def _left(self, exact: Edit | None) -> list[int]:
        """The bits in which a matrix is rounded."""
        return [bits for bits in self._wanted if exact is None or bits < stored_convolutions.bits_of(exact)]

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes = {str(node.name): node for node in walk(model)}
        for edit in edits:
            if not outcome.take(nodes[edit.anchors[0]]):
                return
            if edit.option.endswith("per channel"):
                stored_convolutions.write(model, nodes[edit.anchors[0]], edit, clip_of(self.rounding), outcome)
                continue
            self._storage.write(model, found_again(nodes, edit.anchors), edit, outcome)
