"""A low-rank change of matrices (LoRA, arXiv:2106.09685), which is added to them in the end.

peft puts its layers in the place of `nn.Linear` modules, or of parameters whose module has a `forward` that it can
wrap. The weights of a bridged module are read by the graph itself, past any such wrapper, so a node of the graph adds
the change instead.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from burnish.backends.fx.healing_factors import reading


class Change(nn.Module):
    """W + scale * down @ up, zero in the beginning."""

    def __init__(self, weight: torch.Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        first = torch.randn(rank, columns, generator=generator, dtype=torch.float32) / columns**0.5
        self.up = nn.Parameter(first.to(weight))
        self.down = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))
        self.scale = scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight."""
        return weight + self.scale * (self.down @ self.up)


def add_changes(module: fx.GraphModule, paths: list[str], rank: int, alpha: float, seed: int) -> list[str]:
    """Let matrices pass through changes on their way into the layers.

    Returns:
        The names of the new parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    changes = nn.ModuleList(
        Change(module.get_parameter(path).detach(), rank, alpha / rank, generator) for path in paths
    )
    module.add_submodule("healing_lora", changes)
    for node in list(reading(module, paths)):
        with module.graph.inserting_after(node):
            made = module.graph.call_module(f"healing_lora.{paths.index(str(node.target))}", (node,))
        node.replace_all_uses_with(made, lambda user, made=made: user is not made)
    module.recompile()
    return [f"healing_lora.{name}" for name, _ in changes.named_parameters()]


def merge_changes(module: fx.GraphModule, paths: list[str]) -> None:
    """Add the changes to the matrices themselves; the module is not to be run afterwards."""
    with torch.no_grad():
        for i, path in enumerate(paths):
            weight = module.get_parameter(path)
            weight.copy_(module.get_submodule(f"healing_lora.{i}")(weight))
