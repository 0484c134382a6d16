"""What a node calls when it needs more than a function: nested graphs, and layers that behave otherwise in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from burnish.backends.fx.values import Value, flat, host, integer, tensor, tensors

Empty = tuple[torch.dtype, tuple[int, ...]]
"""The dtype and the row shape of an output that may collect no rows."""


def truth(x: Value) -> bool:
    """The only element of a condition."""
    (only,) = flat(host(x))
    return bool(only)


class Branch(nn.Module):
    """`If`: one of two graphs, chosen when it runs."""

    def __init__(self, then_branch: nn.Module, else_branch: nn.Module) -> None:
        super().__init__()
        self.then_branch = then_branch
        self.else_branch = else_branch

    def forward(self, condition: Value, then: tuple[Value, ...], otherwise: tuple[Value, ...]) -> tuple[Value, ...]:
        """The outputs of the chosen graph; each gets the outer values that it reads."""
        result: tuple[Value, ...] = self.then_branch(*then) if truth(condition) else self.else_branch(*otherwise)
        return result


class Repeat(nn.Module):
    """`Loop`: a graph run while its condition holds, at most as often as it is told."""

    def __init__(self, body: nn.Module, empties: Sequence[Empty]) -> None:
        super().__init__()
        self.body = body
        self.empties = list(empties)

    def forward(
        self, limit: Value, condition: Value, carried: tuple[Value, ...], outer: tuple[Value, ...]
    ) -> tuple[Value, ...]:
        """The last carried values, then what every iteration gave, stacked."""
        count = None if limit is None else integer(limit)
        going = True if condition is None else truth(condition)
        rows: list[list[Value]] = [[] for _ in self.empties]
        state, step = tuple(carried), 0
        while going and (count is None or step < count):
            condition, *found = self.body(step, going, *state, *outer)
            going = truth(condition)
            state = tuple(found[: len(state)])
            for column, item in zip(rows, found[len(state) :], strict=True):
                column.append(item)
            step += 1
        return *state, *(stacked(column, empty) for column, empty in zip(rows, self.empties, strict=True))


class Each(nn.Module):
    """`SequenceMap`: a graph run once for every tensor of a sequence."""

    def __init__(self, body: nn.Module, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.outputs = outputs

    def forward(
        self, sequence: tuple[Value, ...], others: tuple[Value, ...], outer: tuple[Value, ...]
    ) -> tuple[Value, ...]:
        """One sequence for each output; of `others`, sequences give one tensor at a time, tensors are taken whole."""
        rows = []
        for i, item in enumerate(sequence):
            rows.append(self.body(item, *(o[i] if isinstance(o, tuple) else o for o in others), *outer))
        return tuple(tuple(tensor(row[k]) for row in rows) for k in range(self.outputs))


class Walk(nn.Module):
    """`Scan`: a graph run once for every slice of its scanned inputs."""

    def __init__(
        self, body: nn.Module, empties: Sequence[Empty], in_axes: Sequence[int], in_back: Sequence[int],
        out_axes: Sequence[int], out_back: Sequence[int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.body = body
        self.empties = list(empties)
        self.in_axes, self.in_back = list(in_axes), list(in_back)
        self.out_axes, self.out_back = list(out_axes), list(out_back)

    def forward(
        self, carried: tuple[Value, ...], scanned: tuple[Value, ...], outer: tuple[Value, ...]
    ) -> tuple[Value, ...]:
        """The last carried values, then what every step gave, stacked."""
        parts = []
        for value, axis, back in zip(scanned, self.in_axes, self.in_back, strict=True):
            slices = tensor(value).unbind(axis)
            parts.append(slices[::-1] if back else slices)
        rows: list[list[Value]] = [[] for _ in self.empties]
        state = tuple(carried)
        for items in zip(*parts, strict=True):
            found = self.body(*state, *items, *outer)
            state = tuple(found[: len(state)])
            for column, item in zip(rows, found[len(state) :], strict=True):
                column.append(item)
        made = []
        for column, empty, axis, back in zip(rows, self.empties, self.out_axes, self.out_back, strict=True):
            made.append(stacked(column[::-1] if back else column, empty, axis))
        return *state, *made


def stacked(rows: list[Value], empty: Empty, axis: int = 0) -> torch.Tensor:
    """Rows as one tensor along a new axis, of no rows when there are none."""
    if not rows:
        dtype, shape = empty
        return torch.zeros((0, *shape), dtype=dtype).movedim(0, axis)
    return torch.stack(tensors(*rows), axis)


class BatchNorm(nn.Module):
    """BatchNormalization that uses and records the statistics of the batch while the module is in training."""

    def __init__(self, epsilon: float, momentum: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.momentum = momentum

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """x normalized; `mean` and `variance` are updated in place in training, as torch's own layer does."""
        share = 1.0 - self.momentum
        return (F.batch_norm(x, mean, variance, scale, bias, self.training, share, self.epsilon),)


class Dropout(nn.Module):
    """Dropout that drops while the module is in training."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x with elements dropped and the rest scaled up, and which were kept."""
        if not self.training:
            return x, torch.ones_like(x, dtype=torch.bool)
        kept = torch.rand_like(x) >= self.ratio
        scale: Any = 1.0 / (1.0 - self.ratio) if self.ratio < 1.0 else 0.0
        return x * kept * scale, kept
