"""What runs a decoder once: any runner of a model, or one that writes into arrays it is handed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from burnish.passes.protocols import Runner

Array = NDArray[Any]


class Engine(Protocol):
    """Runs a decoder once.

    Attributes:
        writes: whether outputs are written into the arrays handed in, and may be written over an input where the
            operator allows that.
    """

    writes: bool

    def call(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name.

        Args:
            feeds: the inputs by name, in C order.
            into: arrays for some of the outputs, of their exact shapes; an engine that does not write ignores them.

        Raises:
            InputError: the model refuses these inputs.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class RunnerEngine:
    """An engine of any runner: of fx, of TVM, of the reference."""

    writes = False

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def call(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine`."""
        return {name: np.asarray(found) for name, found in self._runner.run(feeds).items()}

    def close(self) -> None:
        """See `Engine`."""
        self._runner.close()
