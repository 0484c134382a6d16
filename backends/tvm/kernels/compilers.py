"""nvcc and g++: found, checked and run; what they say is an error of the user's machine, not a traceback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from burnish.backends.tvm.target import Target
from burnish.ir.errors import InputError

_SAID, _WIDTH = 6, 300
"""Lines of a compiler's complaint that are shown, and how much of each."""


def library(source: Path, out: Path, target: Target, *, objects: Sequence[Path] = ()) -> None:
    """Compile the C++ source of a model to a shared library that needs libtvm_ffi.so.

    Raises:
        InputError: there is no compiler, it does not know the architecture, or it fails.
    """
    import tvm_ffi

    include = [f"-I{one}" for one in tvm_ffi.libinfo.include_paths()]
    link = [f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi"]
    common = ["-shared", "-std=c++17", *include, str(source), *map(str, objects), "-o", str(out), *link]
    if target.kind == "cuda":
        _run(
            [
                _nvcc(target),
                "-O3",
                "-no-compress",
                "-Xcompiler",
                "-fPIC",
                "-Xlinker",
                "-Bsymbolic",
                *_generate(target),
                *common,
            ]
        )
    else:
        _run([_cxx(), "-O2", "-fPIC", "-fopenmp", "-Wl,-Bsymbolic", *common])


def version(target: Target) -> str:
    """The line in which the compiler of a target tells its version; raises as `library` does."""
    said = _run([_nvcc(target) if target.kind == "cuda" else _cxx(), "--version"])
    lines = [line for line in said.splitlines() if "release" in line] or said.splitlines()
    return lines[0].strip() if lines else ""


def check(target: Target) -> None:
    """See that the compiler of a target is there and knows it, before anything long is begun; raises as `library`."""
    if target.kind == "cuda":
        _nvcc(target)
    else:
        _cxx()


def _generate(target: Target) -> list[str]:
    number = target.model.removeprefix("sm_")
    return ["-gencode", f"arch=compute_{number},code=sm_{number}"]


def _nvcc(target: Target) -> str:
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [shutil.which("nvcc", path=str(Path(root) / "bin")) for root in roots if root]
    nvcc = next(filter(None, found), None) or shutil.which("nvcc")
    if nvcc is None:
        raise InputError(
            "kernels for a GPU are compiled by nvcc, which is not here",
            place=str(target),
            hint="install the CUDA toolkit (no GPU is needed), and put its `bin` on PATH or its root in CUDA_HOME",
        )
    known = re.findall(r"sm_\w+", _run([nvcc, "--list-gpu-code"]))
    if target.model not in known:
        raise InputError(
            f"this nvcc compiles no code for `{target.model}`",
            place=nvcc,
            hint=f"it knows {', '.join(known)}; take a toolkit whose nvcc knows `{target.model}`",
        )
    return nvcc


def _cxx() -> str:
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise InputError(
            "a C++ compiler links the library, and there is none", place=name, hint="install g++, or set CXX"
        )
    return found


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        said = "\n".join(line[:_WIDTH] for line in ([line for line in lines if "error" in line] or lines)[:_SAID])
        full = "No space left on device" in said
        raise InputError(
            f"it ended with {done.returncode}:\n{said}",
            place=command[0],
            hint="free space on the disk of the folder and of TMPDIR"
            if full
            else "it has to know C++17; the source is ours, so please report what it says",
        )
    return done.stdout
