"""The machines that kernels are compiled for: `llvm`, `llvm:znver4`, `cuda`, `cuda:sm_90`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from burnish.ir.errors import InputError

ARCHITECTURES = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
_SHARED = 49152
"""Bytes of shared memory that every architecture gives a block without being asked twice."""
_ASKED = {"sm_70": 96, "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""KiB that a block of an architecture may have where its launch asks for them (CUDA C++ Programming Guide, table of
compute capabilities). TVM's launches do for the scope `shared.dyn`, and nothing can for `shared`."""
_CPU = re.compile(r"[A-Za-z0-9_.-]+\Z")


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    Attributes:
        kind: `llvm` or `cuda`.
        model: the processor (`znver4`, `native`) or architecture (`sm_90`); empty for any x86-64.
    """

    kind: str
    model: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.model}" if self.model else self.kind

    def tvm(self, *, threads: int = 1, host: str = "llvm", asking: bool = False) -> Any:
        """The `tvm.target.Target`.

        Args:
            threads: cores that CPU code is scheduled for; part of what tuned records are found by.
            host: what launches kernels: `llvm`, or `cuda_host` for C++ source.
            asking: with the shared memory of a GPU that a launch has to ask for: for schedules that put it into
                `shared.dyn`, which rules of dlight do not.
        """
        import tvm

        if self.kind == "cuda":
            shared = _ASKED[self.model] << 10 if asking else _SHARED
            limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": shared, "thread_warp_size": 32}
            return tvm.target.Target({"kind": "cuda", "arch": self.model, **limits}, host={"kind": host})
        return tvm.target.Target({"kind": "llvm", "num-cores": threads} | ({"mcpu": self.model} if self.model else {}))


def parse(text: str) -> Target:
    """The target that `text` names.

    Raises:
        InputError: no such kind, processor or architecture.
    """
    kind, _, model = text.partition(":")
    if kind == "cuda":
        if model and model not in ARCHITECTURES:
            known = ", ".join(f"`cuda:{one}`" for one in ARCHITECTURES)
            raise InputError(f"`{model}` is no architecture that kernels are written for", place=text, hint=known)
        return Target(kind, model or present())
    if kind == "llvm":
        if model and (not _CPU.match(model) or not _knows(model)):
            hint = "give a name that LLVM knows, such as `llvm:znver4`, or `llvm` alone for this machine"
            raise InputError(f"LLVM knows no processor `{model}`", place=text, hint=hint)
        return Target(kind, model or _own())
    raise InputError(f"there is no target `{kind}`", place=text, hint="targets are `llvm`, `llvm:CPU`, `cuda:sm_90`")


def present() -> str:
    """The architecture of the GPU of this machine.

    Raises:
        InputError: there is none.
    """
    import tvm

    device = tvm.cuda(0)
    if not device.exist:
        raise InputError(
            "there is no GPU here to take the architecture from", place="cuda", hint="name it: `cuda:sm_90`"
        )
    major, _, minor = str(device.compute_version).partition(".")
    return f"sm_{major}{minor}"


def _own() -> str:
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def _knows(model: str) -> bool:
    from tvm.target import codegen

    return bool(codegen.llvm_is_valid_cpu(model, codegen.llvm_get_system_triple()))
