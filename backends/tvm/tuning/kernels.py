"""The kernels of a module: which are the same, how often each is called, and about how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

_FLOPS_PER_BYTE = {"llvm": 5.0, "cuda": 20.0}
"""Arithmetic that a machine does while a byte comes from memory: what divides kernels bound by one from the other."""


@dataclass(frozen=True)
class Kernel:
    """Kernels of a module that are the same function.

    Attributes:
        names: of the module's functions that are this kernel.
        calls: how often they are called in a run of the module.
        module: with the function as `main`; what is scheduled and what records are about.
        hash: of its structure, 16 hexadecimal digits.
        arguments: (dtype, sizes) of every argument; None when a size is symbolic.
        flops: operations of one call, as far as TVM counts them.
    """

    names: tuple[str, ...]
    calls: int
    module: Any
    hash: str
    arguments: tuple[tuple[str, tuple[int, ...]], ...] | None
    flops: float

    @property
    def name(self) -> str:
        """The name of the first of the functions."""
        return self.names[0]

    @property
    def signature(self) -> str:
        """Types of the arguments: `float32[512,512] float32[512,512]`."""
        return " ".join(f"{dtype}[{','.join(map(str, sizes))}]" for dtype, sizes in self.arguments or ())

    @property
    def is_short(self) -> bool:
        """Whether it reads numbers that tensor cores take: halves or 8-bit integers."""
        return any(dtype in ("float16", "bfloat16", "int8", "uint8") for dtype, _ in self.arguments or ())

    def cost(self, kind: str) -> float:
        """What all calls take, in no unit: for shares only. By operations or by bytes, whichever is more."""
        moved = sum(tvm.DataType(dtype).bits / 8 * _product(sizes) for dtype, sizes in self.arguments or ())
        return float(self.calls * max(self.flops / _FLOPS_PER_BYTE[kind], moved, 1.0))


def kernels(module: Any) -> list[Kernel]:
    """The kernels of a fused module, in the order of its functions' names.

    Functions are one kernel when their structure is the same; names of functions and variables do not count.
    """
    calls = _calls(module)
    groups: dict[str, list[str]] = {}
    functions: dict[str, Any] = {}
    for variable, function in module.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc) and not (function.attrs and "tirx.is_scheduled" in function.attrs):
            alone = tvm.IRModule({"main": function.without_attr("global_symbol")})
            key = f"{tvm_ffi.structural_hash(alone) & (2**64 - 1):016x}"
            while key in functions and not tvm_ffi.structural_equal(functions[key], alone):
                key += "'"
            functions.setdefault(key, alone)
            groups.setdefault(key, []).append(str(variable.name_hint))
    return [
        Kernel(
            tuple(sorted(names)),
            sum(calls.get(name, 0) for name in names),
            functions[key],
            key,
            _arguments(functions[key]["main"]),
            _flops(functions[key]),
        )
        for key, names in sorted(groups.items(), key=lambda item: min(item[1]))
    ]


def _calls(module: Any) -> dict[str, int]:
    """How often each kernel is called."""
    found: dict[str, int] = {}

    def visit(expression: Any) -> None:
        if isinstance(expression, relax.Call):
            for argument in expression.args:
                if isinstance(argument, tvm.ir.GlobalVar):
                    found[str(argument.name_hint)] = found.get(str(argument.name_hint), 0) + 1

    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return found


def _arguments(function: Any) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo

    try:
        given = ArgInfo.from_prim_func(function)
        return tuple((str(one.dtype), tuple(int(size) for size in one.shape)) for one in given)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None


def _flops(module: Any) -> float:
    from tvm.s_tir.analysis import estimate_tir_flops

    try:
        return float(estimate_tir_flops(module))
    except Exception:  # sizes that are symbolic, intrinsics that are not counted: bytes alone tell
        return 0.0


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
