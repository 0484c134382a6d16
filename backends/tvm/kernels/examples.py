"""Examples beside the library: the model called from Python and from C++."""

from __future__ import annotations

from pathlib import Path

from tvm import tirx

from burnish.backends.tvm.kernels import expressions
from burnish.backends.tvm.kernels.entry import rendered
from burnish.backends.tvm.kernels.plan import Plan, Tensor
from burnish.backends.tvm.target import Target

_ONES = {
    "float16": ("uint16_t", "0x3c00"),
    "bfloat16": ("uint16_t", "0x3f80"),
    "float32": ("float", "1"),
    "float64": ("double", "1"),
}
_BUILD = {
    "cuda": "nvcc example.cc model.so -I$(tvm-ffi-config --includedir) -L$(tvm-ffi-config --libdir) -ltvm_ffi",
    "llvm": "g++ example.cc ./model.so -I$(tvm-ffi-config --includedir) -L$(tvm-ffi-config --libdir) -ltvm_ffi",
}


def write(folder: Path, plan: Plan, target: Target) -> None:
    """Write `example.py` and `example.cc`; symbolic dimensions are 1 in them."""
    cuda = target.kind == "cuda"
    python = rendered(
        "example.py.jinja",
        device="cuda" if cuda else "cpu",
        weights=len(plan.weights),
        inputs=[(one.dtype, f"[{_sizes(one)}]") for one in plan.inputs],
    )
    cxx = rendered(
        "example.cc.jinja",
        cuda=cuda,
        compile=_BUILD[target.kind],
        inputs=[(expressions.dlpack(one.dtype), *_one(one.dtype), _sizes(one)) for one in plan.inputs],
        outputs=[(expressions.dlpack(one.dtype), _one(one.dtype)[0], len(one.shape)) for one in plan.outputs],
    )
    (folder / "example.py").write_text(python, encoding="utf-8")
    (folder / "example.cc").write_text(cxx, encoding="utf-8")


def _one(dtype: str) -> tuple[str, str]:
    """The C++ type of an element, and 1 in it."""
    return _ONES.get(dtype) or ("bool" if dtype == "bool" else f"{dtype}_t", "1")


def _sizes(one: Tensor) -> str:
    return ", ".join(str(int(size)) if isinstance(size, int | tirx.IntImm) else "1" for size in one.shape)
