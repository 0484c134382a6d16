"""The view of a convolution or transposed convolution with constant weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.parameter import Parameter, find_parameter, write_input
from burnish.ir.walk import is_op, walk


@dataclass(frozen=True)
class Convolution:
    """A Conv or ConvTranspose, or `com.microsoft::FusedConv`, which can only be read.

    Attributes:
        node: the node.
        parameter: the constant weight.
        bias_parameter: the constant bias, if there is one.
        transposed: it is a ConvTranspose.
        groups: groups of channels.
        in_channels: channels of the input, axis 1.
        out_channels: channels of the output, axis 1.
        kernel: kernel sizes.
    """

    node: oir.Node
    parameter: Parameter
    bias_parameter: Parameter | None
    transposed: bool
    groups: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]

    @property
    def nodes(self) -> tuple[oir.Node, ...]:
        """The nodes the layer consists of."""
        return (self.node,)

    @property
    def input(self) -> oir.Value:
        """What the layer reads."""
        return self.node.inputs[0]  # type: ignore[return-value]

    @property
    def output(self) -> oir.Value:
        """What the layer computes, bias included."""
        return self.node.outputs[0]

    @property
    def shared(self) -> list[oir.Node]:
        """Other nodes that read the same weight."""
        return self.parameter.others(self.node)

    @property
    def dtype(self) -> oir.DataType | None:
        """The dtype the layer computes in; None when unknown."""
        return self.parameter.dtype

    @property
    def read_only(self) -> str | None:
        """Why the layer cannot be rewritten exactly, in plain words; None when it can."""
        if is_op(self.node, "FusedConv", domain="com.microsoft"):
            return "an activation is fused into it"
        if self.parameter.quantized:
            return "its weight is quantized"
        return "its weight is stored in fewer bits" if self.parameter.widened else None

    @property
    def strides(self) -> tuple[int, ...]:
        """The step of the window along each axis."""
        return tuple(match.attribute(self.node, "strides") or (1,) * len(self.kernel))

    @property
    def dilations(self) -> tuple[int, ...]:
        """The spacing of the kernel's taps along each axis."""
        return tuple(match.attribute(self.node, "dilations") or (1,) * len(self.kernel))

    @property
    def pads(self) -> tuple[int, ...]:
        """Padding before each axis, then after each axis; meaningless under an `auto_pad` of SAME."""
        return tuple(match.attribute(self.node, "pads") or (0,) * (2 * len(self.kernel)))

    @property
    def auto_pad(self) -> str:
        """NOTSET, SAME_UPPER, SAME_LOWER or VALID."""
        return str(match.attribute(self.node, "auto_pad", "NOTSET"))

    @property
    def reads_only_data(self) -> bool:
        """Whether every output reads the same number of inputs and no padding, so that a constant passes through."""
        if self.transposed:
            same = all(k == 1 for k in self.kernel) and all(s == 1 for s in self.strides) and not any(self.pads)
            unusual = match.attribute(self.node, "output_padding") or match.attribute(self.node, "output_shape")
            return same and self.auto_pad in ("NOTSET", "VALID") and not any(unusual or ())
        if self.auto_pad.startswith("SAME"):
            return all(k == 1 for k in self.kernel)
        return self.auto_pad == "VALID" or not any(self.pads)

    def weight(self) -> np.ndarray:
        """The weight, float64 [out, in / groups, *kernel], for Conv and ConvTranspose alike."""
        array = self.parameter.read()
        return _swap(array, self.groups) if self.transposed else array

    def bias(self) -> np.ndarray | None:
        """The bias, float64 [out]; None when there is none."""
        return self.bias_parameter.read().reshape(-1) if self.bias_parameter is not None else None

    def write(self, model: oir.Model, weight: np.ndarray, bias: np.ndarray | None) -> Convolution:
        """Give the layer a new weight and bias; the other users of a shared weight keep the old one.

        Args:
            model: the model the layer is in.
            weight: float64 [out, in / groups, *kernel].
            bias: float64 [out], or None for no bias.

        Returns:
            The layer as it is now; this view is out of date.

        Raises:
            ValueError: the layer can only be read.
        """
        dtype = self.dtype
        if dtype is None or is_op(self.node, "FusedConv", domain="com.microsoft"):
            raise ValueError(f"{match.describe(self.node)} cannot be rewritten")
        stem = self.parameter.source.name or "weight"
        write_input(model, self.node, 1, _swap(weight, self.groups) if self.transposed else weight, dtype, stem)
        if bias is not None:
            write_input(model, self.node, 2, bias, dtype, f"{stem}_bias")
        elif match.input_of(self.node, 2) is not None:
            edit.set_input(self.node, 2, None)
            self.node.resize_inputs(2)
        found = find_convolution(self.node)
        if found is None:
            raise ValueError(f"{match.describe(self.node)} is no convolution any more")
        return found


def _swap(weight: np.ndarray, groups: int) -> np.ndarray:
    """[g * a, b, *kernel] to [g * b, a, *kernel]: between the layouts of Conv and ConvTranspose, both ways."""
    rows, columns, *kernel = weight.shape
    split = weight.reshape(groups, rows // groups, columns, *kernel)
    return split.swapaxes(1, 2).reshape(groups * columns, rows // groups, *kernel)


def find_convolution(node: oir.Node | None) -> Convolution | None:
    """The convolution of a Conv, ConvTranspose or FusedConv whose weight and bias are constants."""
    if node is None or not (is_op(node, "Conv", "ConvTranspose") or is_op(node, "FusedConv", domain="com.microsoft")):
        return None
    parameter = find_parameter(node.inputs[1])
    value = match.input_of(node, 2)
    bias = find_parameter(value)
    if parameter is None or (value is not None and bias is None) or match.input_of(node, 3) is not None:
        return None
    transposed = node.op_type == "ConvTranspose"
    groups = int(match.attribute(node, "group", 1))
    first, second, *kernel = parameter.shape
    out, features = (second * groups, first) if transposed else (first, second * groups)
    return Convolution(node, parameter, bias, transposed, groups, features, out, tuple(kernel))


def convolutions(model: oir.Model) -> Iterator[Convolution]:
    """The convolutions of all graphs of the model, in order."""
    for node in walk(model):
        found = find_convolution(node)
        if found is not None:
            yield found
