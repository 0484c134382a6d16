"""Run compiled functions: NumPy arrays or DLPack tensors in, the same out."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm.runtime import vm

from burnish.ir.errors import InputError


class TvmRunner:
    """One compiled function with its weights on a device. Threads take turns: TVM's machine has one state.

    Attributes:
        inputs, outputs: names in the order of the function's.
    """

    def __init__(
        self, code: Any, device: Any, inputs: Sequence[str], outputs: Sequence[str], weights: Sequence[np.ndarray]
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._device, self._lock = device, threading.Lock()
        self._machine: Any = vm.VirtualMachine(code, device)
        self._weights = [tvm.runtime.tensor(np.asarray(one, order="C"), device) for one in weights]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, as arrays on the host.

        Raises:
            InputError: the function refuses these inputs, or the runner is closed.
        """
        given = [tvm.runtime.tensor(np.asarray(feeds[name], order="C"), self._device) for name in self.inputs]
        return {name: one.numpy() for name, one in zip(self.outputs, self.run_tensors(given), strict=True)}

    def run_tensors(self, given: Sequence[Any]) -> list[Any]:
        """The outputs as TVM tensors on the device, in order.

        Args:
            given: what DLPack can hand over without a copy (torch and TVM tensors of the device), in order.

        Raises:
            InputError: the function refuses these inputs, or the runner is closed.
        """
        with self._lock:
            if self._machine is None:
                raise InputError("the runner is closed")
            tensors = [one if isinstance(one, tvm.runtime.Tensor) else tvm.runtime.from_dlpack(one) for one in given]
            try:
                return list(self._machine["main"](*tensors, *self._weights))
            except Exception as error:
                raise InputError(f"the compiled code refuses the inputs: {_reason(error)}") from error

    def close(self) -> None:
        """Free the code and the weights."""
        with self._lock:
            self._machine = None
            self._weights = []


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
