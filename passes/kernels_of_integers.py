"""Two kernels of ONNX Runtime that multiply integers by what they find in each run, and what their rounding costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.packing import pack, unpack
from burnish.ir.views.linear import Linear
from burnish.passes import dynamic_integers, grids, packed_layers, ranges, weight_rounding
from burnish.passes.grids import Clip, Grid, Scales
from burnish.passes.lossy import Savings
from burnish.passes.weight_rounding import Rounding, rounded
from burnish.passes.weight_sites import LEAST_BLOCK, Matrix

ROUNDED = ("levels", "scale", "zero")
"""What samples make of a weight in 4 bits."""

_LEAST_BLOCK = 32
_OUTPUTS = 256
"""Outputs of a layer that are looked at for its error, evenly spread."""


class Kernel(ABC):
    """A way to multiply integers; both sides are rounded by it."""

    name: ClassVar[str]

    @abstractmethod
    def words(self, features: Iterable[int]) -> str:
        """What it makes of layers with so many inputs each; begins with its name."""

    @abstractmethod
    def refusal(self, model: oir.Model, layer: Linear) -> str | None:
        """Why a layer that `weight_sites.refusal` allows is not computed by it; None when it can be."""

    @abstractmethod
    def savings(self, layer: Linear) -> Savings:
        """What is held less."""

    @abstractmethod
    def write(
        self, model: oir.Model, layer: Linear, given: Mapping[str, np.ndarray | None] | None = None
    ) -> float | None:
        """Let it compute a layer; `given` are integers that samples have made, where they have.

        Returns:
            The relative error of the weight, where they have not.
        """

    @abstractmethod
    def weight(self, weight: np.ndarray) -> np.ndarray:
        """A weight as it multiplies it, float64 [out, in]."""

    @abstractmethod
    def activations(self, rows: np.ndarray) -> np.ndarray:
        """Rows of one run as it multiplies them, float64 [rows, in]."""

    def error(self, rows: np.ndarray, matrices: Sequence[np.ndarray], divisors: np.ndarray | None = None) -> float:
        """The relative error of products whose sides are rounded by it.

        Args:
            rows: of one run, [rows, in].
            matrices: that multiply the rows, float64 [out, in] each.
            divisors: what rows are divided by and matrices multiplied with before, float64 [in]; None for ones.
        """
        scale = np.ones(rows.shape[1]) if divisors is None else divisors
        taken = self.activations(rows / scale)
        apart = size = 0.0
        for matrix in matrices:
            some = matrix[:: -(-len(matrix) // _OUTPUTS)]
            exact = rows @ some.T
            apart += float(((taken @ self.weight(some * scale).T - exact) ** 2).sum())
            size += float((exact**2).sum())
        return (apart / size) ** 0.5 if size else 0.0


@dataclass(frozen=True)
class Blocks(Kernel):
    """MatMulNBits: 4 bits for blocks of the weight, 8 bits for the same blocks of each row.

    Attributes:
        block: halved, down to 32, until it divides the inputs of a layer; 16 where there are no more inputs.
        rounding: of weights; without a moment `gptq` is `mse`.
    """

    name: ClassVar[str] = "int4"
    block: int = 128
    rounding: Rounding = "mse"

    def words(self, features: Iterable[int]) -> str:
        blocks = sorted({self._block(one) for one in features})
        return f"int4 block {' and '.join(map(str, blocks))}"

    def refusal(self, model: oir.Model, layer: Linear) -> str | None:
        matrix = Matrix((layer,))
        if (why := packed_layers.refusal(model, matrix, "matmul-nbits", 4)) is not None:
            return why
        return None if self.savings(layer).bytes > 0 else "4 bits with their scales take no fewer bytes"

    def savings(self, layer: Linear) -> Savings:
        matrix = Matrix((layer,))
        tensor = weights.tensor_of(matrix.parameter.source)
        assert tensor is not None
        elements, stored = packed_layers.sizes(matrix, "matmul-nbits", self._block(layer.in_features), True, 4)
        return Savings(tensor.size - elements, tensor.nbytes - stored, 0)

    def write(
        self, model: oir.Model, layer: Linear, given: Mapping[str, np.ndarray | None] | None = None
    ) -> float | None:
        levels, scale, zero = ((given or {}).get(key) for key in ROUNDED)
        lost = None
        if levels is None or scale is None or zero is None:
            found = self._rounded(layer.weight())
            lost = weight_rounding.error(layer.weight(), *found)
        else:
            found = unpack(levels, 4)[:, : layer.in_features], self._scales(scale, zero, layer.in_features)
        packed_layers.write(model, Matrix((layer,)), "matmul-nbits", *found)
        return lost

    def measured(self, layer: Linear, moment: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
        """The integers, packed, with their scales and zero points, for rows of a moment [1, in, in], and the relative
        error of what the layer computes of such rows.
        """
        weight = layer.weight()
        levels, scales = self._rounded(weight, moment)
        found = dict(zip(ROUNDED, (pack(levels, 4), scales.scale, scales.zero_point), strict=True))
        return found, weight_rounding.error(weight, levels, scales, moment)

    def weight(self, weight: np.ndarray) -> np.ndarray:
        return grids.dequantize(*self._rounded(weight))

    def activations(self, rows: np.ndarray) -> np.ndarray:
        scales = grids.fit(rows, Grid(8), 1, self._block(rows.shape[1]), "minmax")
        return grids.dequantize(grids.quantize(rows, scales), scales)

    def _rounded(self, weight: np.ndarray, moment: np.ndarray | None = None) -> tuple[np.ndarray, Scales]:
        grid, dtype = packed_layers.grid("matmul-nbits", 4, True), np.dtype(np.float32)
        block = self._block(weight.shape[1])
        return rounded(weight, grid, block, self.rounding, mirrored=True, dtype=dtype, moment=moment)

    def _scales(self, scale: np.ndarray, zero: np.ndarray, features: int) -> Scales:
        return Scales(packed_layers.grid("matmul-nbits", 4, True), scale, zero, 1, self._block(features))

    def _block(self, features: int) -> int:
        block = min(self.block, max(LEAST_BLOCK, 1 << (features - 1).bit_length()))
        while features % block and block > _LEAST_BLOCK:
            block //= 2
        return block


@dataclass(frozen=True)
class EachRun(Kernel):
    """DynamicQuantizeMatMul, MatMulIntegerToFloat: 8 bits for each output's weights, 8 bits for all rows of a run.

    Attributes:
        clip: how scales of weights are fitted.
    """

    name: ClassVar[str] = "int8"
    clip: Clip = "mse"

    def words(self, features: Iterable[int]) -> str:
        return "int8, inputs in each run"

    def refusal(self, model: oir.Model, layer: Linear) -> str | None:
        if (opset := model.opset_imports.get("", 1)) < dynamic_integers.OPSET:
            return f"opset {opset} has no {dynamic_integers.QUANTIZE}; `--opset` raises it"
        if (why := dynamic_integers.refusal(layer)) is not None:
            return why
        return None if self.savings(layer).bytes > 0 else "its integers and their scales take no fewer bytes"

    def savings(self, layer: Linear) -> Savings:
        assert layer.parameter is not None
        out = layer.out_features
        gone = [layer.parameter]
        added: list[np.ndarray] = [np.empty((out, layer.in_features), np.int8), np.empty(out, np.float32)]
        bias = dynamic_integers.bias_of(layer, (out,))
        if isinstance(bias, np.ndarray) and layer.bias_parameter is not None:
            added.append(bias)
            gone += [] if layer.bias_parameter.others(layer.nodes[-1]) else [layer.bias_parameter]
        return dynamic_integers.saved(gone, added)

    def write(
        self, model: oir.Model, layer: Linear, given: Mapping[str, np.ndarray | None] | None = None
    ) -> float | None:
        weight = layer.weight()
        levels, scales = self._rounded(weight)
        payload = {"levels": levels, "scale": scales.scale, "zero": scales.zero_point}
        dynamic_integers.write(model, (layer,), payload)
        return weight_rounding.error(weight, levels, scales)

    def weight(self, weight: np.ndarray) -> np.ndarray:
        return grids.dequantize(*self._rounded(weight))

    def activations(self, rows: np.ndarray) -> np.ndarray:
        low, high = min(float(rows.min(initial=0)), 0.0), max(float(rows.max(initial=0)), 0.0)
        scales = ranges.scales(low, high, Grid(8, signed=False, symmetric=False))
        return grids.dequantize(grids.quantize(rows, scales), scales)

    def _rounded(self, weight: np.ndarray) -> tuple[np.ndarray, Scales]:
        scales = grids.fit(weight, Grid(8), 0, clip=self.clip)
        return grids.quantize(weight, scales), scales
