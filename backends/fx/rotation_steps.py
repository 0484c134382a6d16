"""Steps on orthogonal matrices and on scales, and a place to keep where they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FIRST, _SECOND = 0.9, 0.999
"""How much of the mean of the gradients, and of their squares, stays from step to step, as in Adam."""


@dataclass
class Turns:
    """Descent on orthogonal matrices [..., size, size], each with its own step.

    A gradient G moves R along R exp(-A), where A is the skew part of RᵀG: that is the steepest descent on the manifold.
    A is averaged over steps, and divided by the root of its own averaged square, one number for each matrix
    (Becigneul and Ganea 2019, arXiv:1810.00760): Adam's division of each element by its own would turn all rows alike,
    and what little noise the gradients have would undo the flatness of Hadamard matrices. exp is Cayley's map.

    Attributes:
        matrices: leaves that take gradients.
        kept: of each, rows [rows, size], orthonormal, which no step turns elsewhere; None for none.
        first, second: the averages.
        count: steps so far.
    """

    matrices: Sequence[Tensor]
    kept: Sequence[Tensor | None]
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    count: int = 0

    def step(self, angle: float) -> None:
        """Turn each matrix so that its rows move by `angle` in the mean square, in radians; gradients are dropped."""
        if not self.first:
            self.first = [torch.zeros_like(one) for one in self.matrices]
            self.second = [one.new_zeros((*one.shape[:-2], 1, 1)) for one in self.matrices]
        self.count += 1
        with torch.no_grad():
            for one, kept, first, second in zip(self.matrices, self.kept, self.first, self.second, strict=True):
                if one.grad is None:
                    continue
                skew = one.mT @ one.grad
                skew = (skew - skew.mT) / 2
                if kept is not None:
                    rows = kept @ one
                    skew = skew - rows.mT @ (rows @ skew)
                    skew = skew - (skew @ rows.mT) @ rows
                first.mul_(_FIRST).add_(skew, alpha=1 - _FIRST)
                size = skew.square().sum((-2, -1), keepdim=True)
                second.mul_(_SECOND).add_(size, alpha=1 - _SECOND)
                mean = first / (1 - _FIRST**self.count)
                length = (second / (1 - _SECOND**self.count)).sqrt().clamp_min(torch.finfo(skew.dtype).tiny)
                along = mean * (angle * one.shape[-1] ** 0.5 / 2) / length
                unit = torch.eye(one.shape[-1])
                one.copy_(_orthogonal(one @ torch.linalg.solve(unit + along, unit - along)))
                one.grad = None

    def forget(self) -> None:
        """Average anew from here on."""
        self.first, self.second, self.count = [], [], 0


def _orthogonal(matrix: Tensor) -> Tensor:
    """A matrix that is orthogonal but for rounding, without that: one step of Newton and Schulz."""
    return matrix @ (3 * torch.eye(matrix.shape[-1]) - matrix.mT @ matrix) / 2


def save(file: Path, state: dict[str, Any]) -> None:
    """Keep tensors and numbers in a file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    torch.save(state, partial)
    os.replace(partial, file)
