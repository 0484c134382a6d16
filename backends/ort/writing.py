"""ONNX Runtime with inputs and outputs bound to arrays of the caller: nothing is copied between two calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.backends.ort.session import OrtRunner, refusal, taken, value_of
from burnish.ir.errors import InputError

Array = NDArray[Any]


class OrtEngine:
    """An engine (`burnish.backends.decoding.engine`) of a session on the CPU."""

    writes = True

    def __init__(self, runner: OrtRunner) -> None:
        self._runner = runner
        assert runner.session is not None
        self._outputs = [one.name for one in runner.session.get_outputs()]

    def call(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name; those named in `into` are its arrays, now written.

        An array may stand in both arguments: the operator then writes the new over the old.

        Raises:
            InputError: the model refuses these inputs, or the session is closed.
        """
        session = self._runner.session
        if session is None:
            raise InputError("the session is closed")
        binding = session.io_binding()
        try:
            for name, array in feeds.items():
                if array.dtype.isbuiltin == 1:  # NumPy's own
                    binding.bind_cpu_input(name, array)
                else:
                    binding.bind_ortvalue_input(name, value_of(array))
            for name in self._outputs:
                if name in into:
                    binding.bind_ortvalue_output(name, value_of(into[name]))
                else:
                    binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            found = binding.get_outputs()
        except Exception as error:
            raise refusal(error, "ONNX Runtime refuses the inputs") from error
        return {
            name: into[name] if name in into else np.asarray(taken(value))
            for name, value in zip(self._outputs, found, strict=True)
        }

    def close(self) -> None:
        """Free the session."""
        self._runner.close()
