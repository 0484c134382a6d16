"""What `burnish bench` can run a model in: a name and a loader for each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from burnish.passes.protocols import Runner
from burnish.tools import terminal

if TYPE_CHECKING:
    import numpy as np


class Timeable(Runner, Protocol):
    """A runner that can be timed without what it takes to hand over inputs and outputs."""

    def bound(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Run the model on `feeds`, and give a call that does so again, with inputs in place, and waits for it."""
        ...


@dataclass(frozen=True)
class Request:
    """What is loaded.

    Attributes:
        path: a model's file.
        threads: threads inside an operator.
        dims: numbers that dynamic dimensions get for good where a model is compiled, `batch=1,seq=128`.
        tuning_db: the folder of tuning records for kernels; None for plain ones.
    """

    path: str
    threads: int
    dims: str = ""
    tuning_db: str | None = None


Loader = Callable[[Request], tuple[Timeable, str]]
"""Gives a runner and says in words what runs; raises InputError when that cannot be."""


def artefact(path: str, threads: int) -> tuple[Timeable, str]:
    """A compiled model from its folder."""
    from burnish.backends import tvm
    from burnish.tools.run_command import runtime

    loaded = tvm.load(path, threads=threads)
    return loaded, runtime(loaded.manifest, threads)


def _ort(target: str, asked: Request) -> tuple[Timeable, str]:
    from burnish.backends.ort import session

    loaded = session.from_path(asked.path, threads=asked.threads, target=target)
    return loaded, loaded.options


def _torch(device: str, compiled: bool, asked: Request) -> tuple[Timeable, str]:
    from burnish.ir.errors import MissingPackageError

    if find_spec("torch") is None:
        raise MissingPackageError("PyTorch is not installed", hint="pip install 'burnish[torch]'")
    from burnish.backends.fx.runner import executor
    from burnish.frontends import onnx_file

    loaded = executor(device=device, compiled=compiled, threads=asked.threads)(onnx_file.read(asked.path))
    return loaded, f"{loaded.options}, {terminal.count(asked.threads, 'thread')}"


def compiled_here(asked: Request) -> tuple[Timeable, str]:
    """The model compiled for this machine, all of it that can be, and loaded as its users would."""
    from burnish.ir.errors import BurnishError, InputError
    from burnish.tools import api

    with tempfile.TemporaryDirectory(prefix="burnish-") as aside:
        folder = Path(aside) / "out"
        try:
            api.optimize(
                asked.path,
                folder,
                target="llvm",
                regions="all",
                verify="off",
                tuning_db=asked.tuning_db,
                dims=asked.dims,
            )
        except BurnishError:
            raise
        except Exception as error:
            from burnish.backends.tvm.reasons import last_line

            raise InputError(f"TVM cannot compile it: {last_line(error)}") from error
        return artefact(str(folder), asked.threads)


BACKENDS: dict[str, Loader] = {
    "ort-cpu": partial(_ort, "ort-cpu"),
    "ort-cuda": partial(_ort, "ort-cuda"),
    "torch": partial(_torch, "cpu", False),
    "torch-compile": partial(_torch, "cpu", True),
    "torch-cuda": partial(_torch, "cuda", False),
    "torch-compile-cuda": partial(_torch, "cuda", True),
    "tvm": compiled_here,
}


def parse(text: str) -> list[str]:
    """The names in `ort-cpu,tvm`, each once.

    Raises:
        InputError: there is no such backend.
    """
    from burnish.ir.errors import InputError

    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in BACKENDS:
            raise InputError(f"there is no backend `{name}`", place="--backend", hint="it is " + ", ".join(BACKENDS))
    return names
