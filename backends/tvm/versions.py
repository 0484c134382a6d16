"""The two wheels that work together, and importing them: as the compiler, or as the small runtime alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from burnish.ir.errors import InputError, MissingPackageError

WORKING = {"0.27.0.post1": ("0.1.14.post1", "0.1.14.post0")}
"""Versions of apache-tvm, and those of apache-tvm-ffi that work with each.

With apache-tvm-ffi 0.1.15 importing, compiling and running look fine, and the process dies when kernels are tuned.
"""
_HINT = "pip install 'burnish[tvm]'"
_SMOKE = "from burnish.backends.tvm import versions; versions.make_tune_context()"


def found() -> dict[str, str]:
    """The installed versions, by distribution.

    Raises:
        MissingPackageError: one is missing, or the two do not work together.
    """
    return dict(_found())


@cache
def _found() -> tuple[tuple[str, str], ...]:
    if find_spec("tvm") is None or find_spec("tvm_ffi") is None:
        raise MissingPackageError("kernels need Apache TVM, which is not installed", hint=_HINT)
    versions = {}
    for name in ("apache-tvm", "apache-tvm-ffi"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise MissingPackageError(f"there is no telling which version of {name} is installed", hint=_HINT) from None
    own, other = versions["apache-tvm"], versions["apache-tvm-ffi"]
    if other not in WORKING.get(own, ()):
        raise MissingPackageError(f"apache-tvm {own} and apache-tvm-ffi {other} are not known to work", hint=_HINT)
    os.environ.setdefault("TVM_BIND_THREADS", "0")  # else the caller's thread, and all it starts, stay on one core
    return tuple(versions.items())


def compiler() -> Any:
    """The whole `tvm` module.

    Raises:
        MissingPackageError: it is missing or does not work.
        InputError: this process has loaded the small runtime already; one process cannot have both.
    """
    found()
    with _without_torch():
        import tvm
    if tvm._RUNTIME_ONLY:
        raise InputError(
            "this process holds the runtime of compiled models, and cannot compile",
            hint="compile in a process of its own, or `import tvm` before the first model is loaded",
        )
    return tvm


def runtime(*, whole: bool = False) -> Any:
    """The `tvm` module for running: only its runtime, 3 MB in place of 260, where it was not imported before.

    Args:
        whole: with the compiler, which the loaders of other devices come with.

    Raises:
        MissingPackageError: it is missing or does not work.
    """
    found()
    if not whole and "tvm" not in sys.modules:
        with _without_torch(), _environment("TVM_USE_RUNTIME_LIB", "1"):
            import tvm
    else:
        with _without_torch():
            import tvm
    return tvm


def check_tuning() -> None:
    """Make a `TuneContext` in a process of its own: with the wrong pair of wheels that kills the process.

    Raises:
        MissingPackageError: the process died.
    """
    found()
    places = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run([sys.executable, "-c", _SMOKE], capture_output=True, check=False, env=places)
    if ran.returncode:
        said = ran.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else f"the process ended with {ran.returncode}"
        raise MissingPackageError(f"kernels cannot be tuned with these wheels: {reason}", hint=_HINT)


def make_tune_context() -> None:
    """Make a `TuneContext` for a small kernel of this machine, in this process."""
    compiler()
    from tvm import te
    from tvm.s_tir import meta_schedule

    from burnish.backends.tvm import intrinsics
    from burnish.backends.tvm.target import parse

    intrinsics.load()
    given = te.placeholder((8,), name="given")
    doubled = te.compute((8,), lambda i: given[i] * 2, name="doubled")
    meta_schedule.TuneContext(te.create_prim_func([given, doubled]), target=parse("llvm").tvm())


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keep tvm-ffi from importing torch, which takes seconds and which nothing here needs; one that is there stays."""
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
