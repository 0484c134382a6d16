"""Kernels compiled by Apache TVM, and what runs them. `tvm` is imported in this folder only.

>>> from burnish.backends import tvm
>>> runner = tvm.load("out/")  # doctest: +SKIP
>>> outputs = runner.run({"image": image})  # doctest: +SKIP
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from burnish.backends.tvm.loading import ArtifactRunner

__all__ = ["load"]


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> ArtifactRunner:
    """A runner of a compiled model. Every file is compared with its hash before code is loaded; torch is not imported.

    Only TVM's runtime is loaded where `tvm` was not imported before; that process can then run models, not compile.

    Args:
        path: the folder that `optimize --target llvm` wrote.
        threads: threads inside a kernel, for all runners of the process; None leaves TVM's setting.

    Raises:
        InputError: it is no artefact, is damaged, was written by other versions, or cannot run on this machine.
        MissingPackageError: TVM, or ONNX Runtime where a part needs it, is not installed.
    """
    from burnish.backends.tvm import loading

    return loading.load(path, threads=threads)
