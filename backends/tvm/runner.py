"""Run compiled functions: NumPy arrays or DLPack tensors in, the same out."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm.runtime import vm

from burnish.backends.tvm.reasons import last_line
from burnish.ir.errors import InputError


class TvmRunner:
    """One compiled function with its weights on a device. Threads take turns: TVM's machine has one state.

    Attributes:
        inputs, outputs: names in the order of the function's.
    """

    def __init__(
        self,
        code: Any,
        device: Any,
        inputs: Sequence[str],
        outputs: Sequence[str],
        weights: Sequence[Any],
        function: str = "main",
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._device, self._lock = device, threading.Lock()
        self._machine: Any = vm.VirtualMachine(code, device)
        try:
            self._function: Any = self._machine[function]
        except AttributeError:
            raise InputError(f"the library has no function `{function}`") from None
        self._weights = [tensor_on(device, one) for one in weights]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, as arrays on the host.

        Raises:
            InputError: the function refuses these inputs, or the runner is closed.
        """
        given = [tensor_on(self._device, feeds[name]) for name in self.inputs]
        return {name: host_array(one) for name, one in zip(self.outputs, self.run_tensors(given), strict=True)}

    def run_tensors(self, given: Sequence[Any]) -> list[Any]:
        """The outputs as TVM tensors on the device, in order.

        Args:
            given: torch, TVM or other tensors that DLPack hands over, in order. Those of the device, contiguous and at
                multiples of 64 bytes, are not copied.

        Raises:
            InputError: the function refuses these inputs, or the runner is closed.
        """
        with self._lock:
            if self._machine is None:
                raise InputError("the runner is closed")
            tensors = [tensor_on(self._device, one) for one in given]
            try:
                return list(self._function(*tensors, *self._weights))
            except Exception as error:
                text = str(error)
                empty = "(0 vs. 1)" in text and "T.max(" in text  # as `Maker.filled` has it
                said = "an axis that is summed or searched over is empty" if empty else last_line(error)
                raise InputError(f"the compiled code refuses the inputs: {said}") from error

    def close(self) -> None:
        """Free the code and the weights."""
        with self._lock:
            self._machine = self._function = None
            self._weights = []


def use_threads(count: int | None = None) -> None:
    """Run kernels on so many threads, in all of this process; on as many as until now when it is not told."""
    count = count or int(tvm.get_global_func("runtime.NumThreads")())
    configure = tvm.get_global_func("runtime.config_threadpool")
    # Names of cores, as many as threads (none is bound to one): without them TVM asks the system for the number of its
    # cores at each kernel, which takes 5 us. The pool is as large as at the first call, so that has to be the most.
    most = max(count, os.cpu_count() or 1)
    for wanted in (most, count):
        configure(1, wanted, [str(core) for core in range(wanted)])


def tensor_on(device: Any, given: Any) -> Any:
    """A TVM tensor on a device: the same memory where that can be, else a copy.

    Raises:
        InputError: it is nothing that TVM can take.
    """
    try:
        if isinstance(given, tvm.runtime.Tensor):
            return given if given.device == device else given.copyto(device)
        if isinstance(given, np.ndarray | np.generic):
            return _copied(np.asarray(given), device)
        try:
            found = tvm.runtime.from_dlpack(given)
        except Exception:  # not contiguous, not at a multiple of 64 bytes, or no DLPack at all, which NumPy then says
            found = _copied(np.from_dlpack(given), device)
        if 0 in found.shape:  # the strides that others give to no elements are none of TVM's
            return tvm.runtime.empty(found.shape, found.dtype, device)
        return found if found.device == device else found.copyto(device)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"TVM cannot take this input: {last_line(error)}") from error


def shared(array: np.ndarray, device: Any) -> Any:
    """A tensor on the memory of an array that is at a multiple of 64 bytes, where the device and dtype allow it."""
    if device.dlpack_device_type() != _CPU or array.dtype.kind not in _PASSED or not array.size:
        return tvm.runtime.tensor(array, device)
    return tvm.runtime.from_dlpack(array)


def host_array(tensor: Any) -> np.ndarray:
    """A copy of a tensor as an array on the host."""
    if tensor.device.dlpack_device_type() != _CPU or str(tensor.dtype) not in _NAMES or 0 in tensor.shape:
        return np.asarray(tensor.numpy())
    return np.from_dlpack(tensor).copy()


def _copied(array: np.ndarray, device: Any) -> Any:
    """A copy of an array as a tensor on a device."""
    if device.dlpack_device_type() != _CPU or array.dtype.kind not in _PASSED or not array.size:
        return tvm.runtime.tensor(np.asarray(array, order="C"), device)
    memory = np.empty(array.nbytes + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    placed = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return tvm.runtime.from_dlpack(placed)


_CPU = 1
_ALIGNED = 64
"""Bytes that TVM's code takes the memory of its arguments to be at a multiple of."""
_PASSED = "biuf"
"""Kinds of dtypes that NumPy hands over by DLPack, within a microsecond; copies of TVM take 10 to 100."""
_NAMES = frozenset({"bool", *(np.dtype(code).name for code in "bBhHiIlLefd")})
