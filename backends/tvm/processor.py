"""Whether this machine can run code: it has the GPU, or its processor the instructions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from burnish.backends.tvm.target import Target

_VECTOR = ("avx", "fma", "f16c", "bmi2", "amx")
"""What names of extensions begin with that LLVM writes vector code for, beyond what every x86-64 has."""
_LIST = Path("/proc/cpuinfo")


def extensions(target: Target) -> tuple[str, ...]:
    """The extensions of a processor that its code may use, as letters and digits; empty for a GPU."""
    if target.kind != "llvm":
        return ()
    from tvm.target import codegen

    found = {_plain(str(one)) for one in codegen.llvm_get_cpu_features(target.tvm())}
    return tuple(sorted(one for one in found if one.startswith(_VECTOR) and not one.startswith("avx10")))


def lacking(wanted: Sequence[str]) -> list[str]:
    """Which of the extensions this machine lacks; none where the system does not say what it has."""
    own = _own()
    return [one for one in wanted if own and one not in own]


def elsewhere(target: Target) -> str:
    """Why code for a target cannot run on this machine; empty where it can."""
    if target.kind == "cuda":
        import tvm

        from burnish.backends.tvm.target import present

        if not tvm.cuda(0).exist:
            return "there is no GPU here"
        return "" if present() == target.model else f"the GPU here is {present()}"
    missing = lacking(extensions(target))
    return f"this processor lacks {', '.join(missing)}" if missing else ""


@cache
def _own() -> frozenset[str]:
    if platform.machine() not in ("x86_64", "AMD64") or not _LIST.is_file():
        return frozenset()
    line = next((line for line in _LIST.read_text().splitlines() if line.startswith("flags")), "")
    return frozenset(_plain(one) for one in line.partition(":")[2].split())


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
