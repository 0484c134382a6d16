"""Activations within a budget of memory: stretches of a graph that are computed again for their gradients.

Training in sublinear memory (Chen et al., arXiv:1604.06174) with torch's own checkpoints. The stretches are the blocks
of the model.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from burnish.backends.fx import healing_graph as halves
from burnish.ir.errors import InputError


class Stretches(nn.Module):
    """A graph run in stretches.

    Args:
        module: a graph whose output is a tuple; its parameters are shared.
        marks: names of nodes behind each of which a stretch ends.

    Attributes:
        again: the stretches that are computed again when gradients are wanted, by number.
    """

    def __init__(self, module: fx.GraphModule, marks: Set[str]) -> None:
        super().__init__()
        nodes = list(module.graph.nodes)
        (end,) = (node for node in nodes if node.op == "output")
        self._inputs = [node.name for node in nodes if node.op == "placeholder"]
        self._outputs = [node.name for node in end.args[0]]
        pieces: list[list[fx.Node]] = [[]]
        for node in nodes:
            if node.op not in ("placeholder", "get_attr", "output"):
                pieces[-1].append(node)
                if node.name in marks:
                    pieces.append([])
        self.again: set[int] = set()
        self.parts = nn.ModuleList()
        self._ends: list[tuple[list[str], list[str]]] = []
        for piece in pieces:
            if piece:
                self._add(module, piece, set(end.all_input_nodes))

    def _add(self, module: fx.GraphModule, piece: list[fx.Node], wanted: set[fx.Node]) -> None:
        inside = set(piece)
        read = dict.fromkeys(one for node in piece for one in node.all_input_nodes if one not in inside)
        weights = [one for one in read if one.op == "get_attr"]
        inputs = [one for one in read if one.op != "get_attr"]
        outputs = [one for one in piece if one in wanted or any(user not in inside for user in one.users)]
        self.parts.append(halves.part(module, inputs, [*weights, *piece], outputs))
        self._ends.append(([one.name for one in inputs], [one.name for one in outputs]))

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """The outputs of the whole graph."""
        values = dict(zip(self._inputs, inputs, strict=True))
        for i in range(len(self.parts)):
            values.update(zip(self._ends[i][1], self._run(i, values), strict=True))
        return tuple(values[name] for name in self._outputs)

    def _run(self, i: int, values: dict[str, Any]) -> tuple[Any, ...]:
        given = [values[name] for name in self._ends[i][0]]
        if i in self.again and torch.is_grad_enabled():
            again: tuple[Any, ...] = checkpoint(self.parts[i], *given, use_reentrant=False)
            return again
        found: tuple[Any, ...] = self.parts[i](*given)
        return found

    def fit(self, inputs: Sequence[Any], budget: int) -> int:
        """Choose what is computed again so that all activations of one run take no more than a budget.

        Args:
            inputs: of the whole graph.
            budget: bytes.

        Returns:
            The bytes that are expected.

        Raises:
            InputError: the activations of a single stretch, with what passes between stretches, take more.
        """
        self.again.clear()
        held, passed = self._sizes(inputs)
        needed = sum(held)
        for i in range(len(held)):
            if needed <= budget:
                break
            self.again.add(i)
            kept = sum(size for k, size in enumerate(held) if k not in self.again)
            needed = kept + sum(passed[k] for k in self.again) + max(held[k] for k in self.again)
        if needed > budget:
            raise InputError(
                f"the activations of one step take {needed:,} bytes even with every block computed twice",
                place="heal",
                hint="give more `memory`, or a smaller `batch`",
            )
        return needed

    def _sizes(self, inputs: Sequence[Any]) -> tuple[list[int], list[int]]:
        """For each stretch the bytes that its gradients need, and those of what it reads."""
        besides = halves.storages(self)
        values = dict(zip(self._inputs, inputs, strict=True))
        held, passed = [], []
        for i in range(len(self.parts)):
            saved: list[torch.Tensor] = []
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_into(saved), lambda one: one):
                found = self._run(i, values)
            values.update(zip(self._ends[i][1], (_cut_off(one) for one in found), strict=True))
            held.append(halves.size_of(saved, besides))
            passed.append(halves.size_of((values[name] for name in self._ends[i][0]), besides))
        return held, passed


def _cut_off(value: Any) -> Any:
    """A value without the graph behind it, which would hold all activations while they are measured."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _into(saved: list[torch.Tensor]) -> Any:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    return pack
