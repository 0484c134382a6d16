"""Matrix products, convolutions and pooling."""

from __future__ import annotations

from typing import Any

from tvm import relax

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.elementwise import number
from burnish.backends.tvm.operators.movement import plain
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


@lowers("MatMul")
def matmul(make: Maker, a: Any, b: Any) -> Any:
    return op.matmul(a, b)


@lowers("Gemm", since=7)
def gemm(
    make: Maker,
    a: Any,
    b: Any,
    c: Any = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Any:
    left = op.permute_dims(a, [1, 0]) if transA else a
    right = op.permute_dims(b, [1, 0]) if transB else b
    product = op.matmul(left, right)
    if alpha != 1.0:
        product = op.multiply(product, number(make, a, alpha))
    if c is None or beta == 0.0:
        return product
    return op.add(product, c if beta == 1.0 else op.multiply(c, number(make, a, beta)))


def _window(
    make: Maker,
    x: Any,
    kernel: list[int],
    strides: tuple[int, ...] | None,
    pads: tuple[int, ...] | None,
    dilations: tuple[int, ...] | None,
    auto_pad: str,
) -> tuple[list[int], list[int], list[int]]:
    """Strides, pads (begins, then ends) and dilations of a window."""
    rank = len(kernel)
    steps, wide = list(strides or [1] * rank), list(dilations or [1] * rank)
    if auto_pad in ("NOTSET", ""):
        return steps, list(pads or [0] * 2 * rank), wide
    if auto_pad == "VALID":
        return steps, [0] * 2 * rank, wide
    sizes = plain(make.shape(x)[2:], "a size under automatic padding")
    begins, ends = [], []
    for size, window, step, far in zip(sizes, kernel, steps, wide, strict=True):
        total = max(0, (-(-size // step) - 1) * step + (window - 1) * far + 1 - size)
        small = total // 2
        begins.append(total - small if auto_pad == "SAME_LOWER" else small)
        ends.append(small if auto_pad == "SAME_LOWER" else total - small)
    return steps, [*begins, *ends], wide


@lowers("Conv")
def conv(
    make: Maker,
    x: Any,
    w: Any,
    bias: Any = None,
    *,
    strides: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: tuple[int, ...] | None = None,
) -> Any:
    kernel = plain(make.shape(w)[2:], "a size of the kernel")
    rank = len(kernel)
    if rank not in (1, 2, 3):
        raise Unsupported(f"a convolution over {rank} axes")
    steps, around, wide = _window(make, x, kernel, strides, pads, dilations, auto_pad)
    function = {1: op.nn.conv1d, 2: op.nn.conv2d, 3: op.nn.conv3d}[rank]
    found = function(x, w, strides=steps, padding=around, dilation=wide, groups=group)
    return _with_bias(make, found, bias, rank)


def _with_bias(make: Maker, found: Any, bias: Any, rank: int) -> Any:
    if bias is None:
        return found
    return op.add(make.emit(found), make.emit(op.reshape(bias, [1, -1, *[1] * rank])))


@lowers("ConvTranspose")
def conv_transpose(
    make: Maker,
    x: Any,
    w: Any,
    bias: Any = None,
    *,
    strides: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: tuple[int, ...] | None = None,
    output_padding: tuple[int, ...] | None = None,
    output_shape: tuple[int, ...] | None = None,
) -> Any:
    kernel = plain(make.shape(w)[2:], "a size of the kernel")
    rank = len(kernel)
    if rank not in (1, 2) or output_shape is not None or auto_pad not in ("NOTSET", "VALID"):
        raise Unsupported("a ConvTranspose of this form")
    steps, around, wide = _window(make, x, kernel, strides, pads, dilations, auto_pad)
    if wide != [1] * rank:
        raise Unsupported("a dilated ConvTranspose")
    more = list(output_padding or [0] * rank)
    function = op.nn.conv1d_transpose if rank == 1 else op.nn.conv2d_transpose
    found = function(x, w, strides=steps, padding=around, output_padding=more, dilation=wide, groups=group)
    return _with_bias(make, found, bias, rank)


@lowers("MaxPool")
def max_pool(
    make: Maker,
    x: Any,
    *,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
) -> Any:
    if len(make.node.outputs) > 1:
        raise Unsupported("the indices of MaxPool")
    rank = len(kernel_shape)
    steps, around, wide = _window(make, x, list(kernel_shape), strides, pads, dilations, auto_pad)
    function = {1: op.nn.max_pool1d, 2: op.nn.max_pool2d, 3: op.nn.max_pool3d}[rank]
    return function(x, list(kernel_shape), steps, around, wide, bool(ceil_mode))


@lowers("AveragePool")
def average_pool(
    make: Maker,
    x: Any,
    *,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Any:
    if ceil_mode:
        raise Unsupported("an AveragePool that rounds up")
    rank = len(kernel_shape)
    steps, around, wide = _window(make, x, list(kernel_shape), strides, pads, dilations, auto_pad)
    function = {1: op.nn.avg_pool1d, 2: op.nn.avg_pool2d, 3: op.nn.avg_pool3d}[rank]
    return function(x, list(kernel_shape), steps, around, wide, False, bool(count_include_pad))


@lowers("GlobalAveragePool")
def global_average_pool(make: Maker, x: Any) -> Any:
    return op.mean(x, list(range(2, make.rank(x))), True)


@lowers("GlobalMaxPool")
def global_max_pool(make: Maker, x: Any) -> Any:
    return op.max(x, list(range(2, make.rank(x))), True)


@lowers("Resize", since=11, sizes=(3,))
def resize(
    make: Maker,
    x: Any,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    antialias: int = 0,
    keep_aspect_ratio_policy: str = "stretch",
    axes: tuple[int, ...] | None = None,
) -> Any:
    shape = make.shape(x)
    if len(shape) != 4 or antialias or axes is not None or keep_aspect_ratio_policy != "stretch":
        raise Unsupported("a Resize of this form")
    if coordinate_transformation_mode not in ("half_pixel", "align_corners", "asymmetric"):
        raise Unsupported(f"Resize with {coordinate_transformation_mode}")
    if mode == "nearest" and nearest_mode not in ("floor", "round_prefer_floor", "ceil"):
        raise Unsupported(f"Resize with {nearest_mode}")
    if sizes is None:
        array = make.array(scales)
        if array is None:
            raise Unsupported("the scales depend on data")
        factors = array.reshape(-1).tolist()
        if len(factors) != 4 or factors[:2] != [1.0, 1.0] or any(one != int(one) for one in factors):
            raise Unsupported("a Resize by such scales")
        sizes = [size * int(factor) for size, factor in zip(shape, factors, strict=True)]
    method = {"nearest": "nearest_neighbor", "linear": "linear", "cubic": "cubic"}[mode]
    rounding = {"floor": "floor", "round_prefer_floor": "round_prefer_floor", "ceil": "ceil"}[nearest_mode]
    return op.image.resize2d(
        x,
        relax.ShapeExpr(sizes[2:]),
        layout="NCHW",
        method=method,
        coordinate_transformation_mode=coordinate_transformation_mode,
        rounding_method=rounding if mode == "nearest" else "",
        cubic_alpha=cubic_coeff_a,
        cubic_exclude=exclude_outside,
        extrapolation_value=extrapolation_value,
    )
