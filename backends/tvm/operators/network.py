"""Matrix products, convolutions and pooling."""

from __future__ import annotations

from typing import Any

from tvm import relax

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators import rows, weight_only
from burnish.backends.tvm.operators.elementwise import number
from burnish.backends.tvm.operators.movement import plain
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


HALVES = ("float16", "bfloat16")
WINDOW = ("strides", "pads", "dilations", "group", "auto_pad", "kernel_shape")


def product(make: Maker, a: Any, b: Any) -> Any:
    """The matrix product; halves are summed in float32."""
    if make.rank(a) > 2 and make.rank(b) > 2:
        a, b = make.alike_batches(a, b)
    a, b = make.summed(a, b)
    dtype = make.dtype(a)
    return op.astype(op.matmul(a, b, out_dtype="float32"), dtype) if dtype in HALVES else op.matmul(a, b)


@lowers("MatMul")
def matmul(make: Maker, a: Any, b: Any) -> Any:
    for found in (_dequantized(make, a, False), rows.multiplied(make)):
        if found is not None:
            return found
    return product(make, a, b)


def _dequantized(make: Maker, a: Any, transposed: bool) -> Any:
    """The product with a quantized weight, in one kernel; None where the second factor is none."""
    taken = make.rank(a) > 1 and make.dtype(a) in ("float32", *HALVES)
    stored = weight_only.behind(make, 1, transposed) if taken else None
    if stored is None or make.shape(a)[-1] != stored.depth:
        return None
    found = weight_only.multiplied(make, a, stored)
    return found if make.dtype(a) == "float32" else make.emit(op.astype(found, make.dtype(a)))


@lowers("FusedMatMul", domain="com.microsoft")
def fused_matmul(
    make: Maker,
    a: Any,
    b: Any,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
    transBatchA: int = 0,  # noqa: N803
    transBatchB: int = 0,  # noqa: N803
) -> Any:
    if transBatchA or transBatchB or (make.rank(a) < 2 and transA) or (make.rank(b) < 2 and transB):
        raise Unsupported("a FusedMatMul of this form")
    left, right = (_last_two_swapped(make, one) if swap else one for one, swap in ((a, transA), (b, transB)))
    found = make.emit(product(make, left, right))
    return found if alpha == 1.0 else op.multiply(found, number(make, found, alpha))


def _last_two_swapped(make: Maker, x: Any) -> Any:
    rank = make.rank(x)
    return make.emit(op.permute_dims(x, [*range(rank - 2), rank - 1, rank - 2]))


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
    left = _last_two_swapped(make, a) if transA else a
    found = _dequantized(make, left, bool(transB))
    if found is None:
        found = make.emit(product(make, left, _last_two_swapped(make, b) if transB else b))
    if alpha != 1.0:
        found = make.emit(op.multiply(found, number(make, a, alpha)))
    if c is None or beta == 0.0:
        return found
    return op.add(*make.alike(found, c if beta == 1.0 else make.emit(op.multiply(c, number(make, a, beta)))))


def window_of(
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


@lowers("Conv", more=WINDOW)
def convolved(make: Maker, x: Any, w: Any, bias: Any = None, **window: Any) -> Any:
    """A convolution over one to three axes; halves are summed in float32."""
    kernel = plain(make.shape(w)[2:], "a size of the kernel")
    rank, group = len(kernel), window.get("group", 1)
    if rank not in (1, 2, 3):
        raise Unsupported(f"a convolution over {rank} axes")
    strides, pads, dilations = (window.get(name) for name in ("strides", "pads", "dilations"))
    steps, around, wide = window_of(make, x, kernel, strides, pads, dilations, window.get("auto_pad", "NOTSET"))
    function = {1: op.nn.conv1d, 2: op.nn.conv2d, 3: op.nn.conv3d}[rank]
    dtype = make.dtype(x)
    options = {"out_dtype": "float32"} if dtype in HALVES else {}
    found = function(x, w, strides=steps, padding=around, dilation=wide, groups=group, **options)
    return _with_bias(make, op.astype(make.emit(found), dtype) if options else found, bias, rank)


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
    steps, around, wide = window_of(make, x, kernel, strides, pads, dilations, auto_pad)
    if wide != [1] * rank:
        raise Unsupported("a dilated ConvTranspose")
    more = list(output_padding or [0] * rank)
    function = op.nn.conv1d_transpose if rank == 1 else op.nn.conv2d_transpose
    found = function(x, w, strides=steps, padding=around, output_padding=more, dilation=wide, groups=group)
    return _with_bias(make, found, bias, rank)
