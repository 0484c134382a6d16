"""Changes of size of images."""

from __future__ import annotations

from typing import Any

from tvm import relax

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


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
