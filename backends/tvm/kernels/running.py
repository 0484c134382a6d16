"""Run the one library of a model with its weights bound; the interface of the other runners of compiled code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from burnish.backends.tvm.reasons import last_line
from burnish.backends.tvm.runner import host_array, tensor_on
from burnish.ir.errors import InputError


class KernelsRunner:
    """A library that `emitting.emit` wrote. Threads run it at the same time: a call has memory of its own.

    Attributes:
        inputs, outputs: names in the order of the function's.
    """

    def __init__(
        self, library: Path, device: Any, inputs: Sequence[str], outputs: Sequence[str], weights: Sequence[Any]
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._device = device
        try:
            self._library: Any = tvm_ffi.load_module(str(library.resolve()))
        except Exception as error:
            raise InputError(f"it cannot be loaded: {last_line(error)}", place=str(library)) from error
        self._bound: Any = self._library.bind(*(tensor_on(device, one) for one in weights))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, as arrays on the host; raises as `run_tensors`."""
        found = self.run_tensors([feeds[name] for name in self.inputs])
        return {name: host_array(one) for name, one in zip(self.outputs, found, strict=True)}

    def run_tensors(self, given: Sequence[Any]) -> list[Any]:
        """The outputs as tensors on the device, in order.

        Raises:
            InputError: the library refuses these inputs, or the runner is closed.
        """
        if self._bound is None:
            raise InputError("the runner is closed")
        try:
            return list(self._bound(*(tensor_on(self._device, one) for one in given)))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the library refuses the inputs: {last_line(error)}") from error

    def close(self) -> None:
        """Free the weights; it cannot run afterwards."""
        self._bound = None
