"""`exp` and `erf` in float32 as arithmetic that LLVM keeps in vectors.

Without this they are calls of the C library, one for each element: most of the time of a softmax or a Gelu on a CPU.
The rules work where code is made, so kernels, and what tuned records are found by, stay as they are. A process that
builds candidates of tuning needs them too; this module is sent to it by value, and so imports nothing of the package.

`exp` is that of the Cephes library (Moshier, `expf`; 2 units in the last place), scaled in two steps so that infinity
and subnormal numbers come out; `erf` the rational function of degree 13 over 8 of Eigen (`generic_fast_erf_float`; off
by at most 4e-7). NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_ERF = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_LOWEST, _HIGHEST = -104.0, 89.0
"""Where `exp` is 0 and infinity in float32."""
_ROUNDING = 12582912.0
"""1.5 times 2 to the 23: added to a float32 it leaves the nearest integer in the last bits."""
_LEVEL = 99
"""Of priority among rules; those of TVM have 10."""


@contextmanager
def enabled() -> Iterator[None]:
    """Build code for LLVM with these rules. Not for two threads at a time."""
    import tvm
    from tvm import ir, tirx

    if tvm.get_global_func("burnish.vector_math", allow_missing=True) is None:  # once in a process
        for name, rule, other in (
            ("tirx.exp", _exp, ir.Op.get("tirx.exp").get_attr("llvm.FLowerIntrinsic")),
            ("tirx.erf", _erf, _one_by_one),
        ):
            tirx.register_intrin_lowering(name, target="llvm", f=_of_floats(rule, other), level=_LEVEL)
        tvm.register_global_func("burnish.vector_math", lambda: None)
    ir.Op.get("tirx.erf").set_attr("TVectorizable", True)
    try:
        yield
    finally:
        ir.Op.get("tirx.erf").reset_attr("TVectorizable")  # other targets have no `erf` of vectors


def _of_floats(rule: Callable[[Any], Any], other: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A rule for float32 and vectors of it, and another for calls of other dtypes."""

    def lowered(call: Any) -> Any:
        from tvm import tirx

        given = call.args[0]
        kind = str(given.ty.dtype)
        if kind.partition("x")[0] != "float32":
            return other(call)
        held = tirx.Var("given", kind)
        return tirx.Let(held, given, rule(held))

    return lowered


def _one_by_one(call: Any) -> Any:
    """A call of `erf` for each element of a vector; TVM has a rule for one."""
    from tvm import tirx

    given = call.args[0]
    count = given.ty.dtype.lanes
    if count == 1:
        return call
    held = tirx.Var("given", str(given.ty.dtype))
    parts = [tirx.erf(tirx.Shuffle([held], [place])) for place in range(count)]
    return tirx.Let(held, given, tirx.Shuffle(parts, list(range(count))))


def _exp(x: Any) -> Any:
    """2^n e^r with n the nearest integer to x / ln 2 and r = x - n ln 2, the power of two in two factors."""
    from tvm import tirx

    kind = str(x.ty.dtype)
    whole = kind.replace("float", "int")

    def number(value: float, dtype: str = kind) -> Any:
        return tirx.const(value, dtype)

    def power(exponent: Any) -> Any:
        return tirx.reinterpret(kind, tirx.shift_left(exponent + number(127, whole), number(23, whole)))

    within, rounded, rest = (tirx.Var(name, kind) for name in ("within", "rounded", "rest"))
    exponent, half = tirx.Var("exponent", whole), tirx.Var("half", whole)
    count = rounded - number(_ROUNDING)
    low = tirx.Select(x < number(_LOWEST), number(_LOWEST), x)
    grown = _polynomial(rest, _EXP) * rest * rest + rest + number(1.0)
    return _bound(
        (
            (within, tirx.Select(low > number(_HIGHEST), number(_HIGHEST), low)),
            (rounded, within * number(_LOG2E) + number(_ROUNDING)),
            (rest, within - count * number(_LN2_HIGH) - count * number(_LN2_LOW)),
            (exponent, tirx.reinterpret(whole, rounded) - tirx.reinterpret(whole, number(_ROUNDING))),
            (half, tirx.shift_right(exponent, number(1, whole))),
        ),
        grown * power(half) * power(exponent - half),
    )


def _erf(x: Any) -> Any:
    """x P(x^2) / Q(x^2) between -4 and 4, outside of which it is 1 in float32."""
    from tvm import tirx

    kind = str(x.ty.dtype)
    within, square = tirx.Var("within", kind), tirx.Var("square", kind)
    end = tirx.const(4.0, kind)
    low = tirx.Select(x < -end, -end, x)
    return _bound(
        ((within, tirx.Select(low > end, end, low)), (square, within * within)),
        within * _polynomial(square, _ERF) / _polynomial(square, _ERF_BELOW),
    )


def _bound(given: Sequence[tuple[Any, Any]], result: Any) -> Any:
    """A result in which variables stand for what is given."""
    from tvm import tirx

    for variable, value in reversed(given):
        result = tirx.Let(variable, value, result)
    return result


def _polynomial(x: Any, factors: Sequence[float]) -> Any:
    """By Horner's scheme, the factor of the highest power first."""
    from tvm import tirx

    kind = str(x.ty.dtype)
    sum_ = tirx.const(factors[0], kind)
    for one in factors[1:]:
        sum_ = sum_ * x + tirx.const(one, kind)
    return sum_
