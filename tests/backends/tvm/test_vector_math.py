"""`exp` and `erf` as arithmetic on vectors: as exact as is said, NaN and infinity kept, and no calls in the code."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm import te, tirx  # noqa: E402
from tvm.s_tir import Schedule  # noqa: E402

from burnish.backends.tvm import vector_math  # noqa: E402

SIZE = 1 << 14
EDGES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, -1e-40, 88.7, 89.5, -103.5, -110.0]


def code(name: str, dtype: str, lanes: int) -> object:
    given = te.placeholder((SIZE,), dtype, name="given")
    made = te.compute((SIZE,), lambda at: getattr(tirx, name)(given[at]), name="made")
    schedule = Schedule(te.create_prim_func([given, made]))
    (loop,) = schedule.get_loops(schedule.get_sblock("made"))
    if lanes > 1:
        schedule.vectorize(schedule.split(loop, [None, lanes])[1])
    with vector_math.enabled():
        module = tvm.IRModule({"main": schedule.mod["main"].with_attr("global_symbol", "main")})
        return tvm.tirx.build(module, target=tvm.target.Target({"kind": "llvm"}))


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["exp", "erf"])
def test_it_computes_what_the_c_library_does_wherever_it_is_asked(name: str, dtype: str, lanes: int) -> None:
    points = np.linspace(-110, 95, SIZE) if name == "exp" else np.linspace(-6, 6, SIZE)
    points[: len(EDGES)] = EDGES
    points = points.astype(dtype)
    given, found = tvm.runtime.tensor(points), tvm.runtime.empty((SIZE,), dtype)
    code(name, dtype, lanes)["main"](given, found)  # type: ignore[index]
    with np.errstate(over="ignore", under="ignore"):
        if name == "exp":
            exact = np.exp(points.astype(np.float64)).astype(dtype)
        else:
            exact = np.array([math.erf(one) for one in points.astype(np.float64)]).astype(dtype)
    finite = np.isfinite(exact)
    result = found.numpy()
    assert np.array_equal(np.isnan(result), np.isnan(exact))
    assert np.array_equal(np.isinf(result), np.isinf(exact))
    errors = np.abs(result[finite] - exact[finite])
    if name == "exp":
        assert (errors <= 2 * np.spacing(exact[finite])).all()
    else:
        assert errors.max() <= 4e-7


@pytest.mark.parametrize("name", ["exp", "erf"])
def test_no_function_of_the_c_library_is_called_for_float32(name: str) -> None:
    said = code(name, "float32", 8).inspect_source("ll")  # type: ignore[attr-defined]
    assert not re.search(rf"@(llvm\.)?{name}f?[.(\s]", said)


def test_other_targets_have_no_erf_of_vectors() -> None:
    with vector_math.enabled():
        assert tvm.ir.Op.get("tirx.erf").get_attr("TVectorizable")
    assert tvm.ir.Op.get("tirx.erf").get_attr("TVectorizable") is None
