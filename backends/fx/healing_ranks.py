"""Several processes that train one model together, started by `torchrun` or `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from burnish.ir.errors import MissingPackageError


class Ranks:
    """The processes of this run; one alone unless a launcher has started several.

    Every process has all weights and takes its share of the rows of each step; gradients are added up.

    Args:
        device: where a process alone trains; of several, accelerate chooses the device.

    Attributes:
        rank, world: the number of this process, and how many there are.
        device: where it trains.

    Raises:
        MissingPackageError: a launcher has started several, and accelerate is missing.
    """

    def __init__(self, device: str) -> None:
        self._accelerator: Any = None
        self.rank, self.world, self.device = 0, 1, torch.device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise MissingPackageError(
                    "training in several processes needs accelerate", hint="pip install 'burnish[heal]'"
                ) from error
            self._accelerator = Accelerator(cpu=device == "cpu")
            self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
            self.device = self._accelerator.device

    def total(self, numbers: Iterable[float]) -> list[float]:
        """Numbers added up over all processes."""
        found = list(numbers)
        if self._accelerator is None or not found:
            return found
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        made = self._accelerator.reduce(torch.tensor(found, dtype=dtype, device=self.device), "sum")
        return [float(one) for one in made]

    def first(self, number: float) -> float:
        """The number that the first process has."""
        return self.total([number if self.rank == 0 else 0.0])[0]

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Let the gradient of each parameter be the sum of those of all processes."""
        if self._accelerator is None:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(parameter.grad, "sum")
