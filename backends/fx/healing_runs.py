"""The two models of healing as functions of a sample, which compute once what is the same in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from burnish.backends.fx import healing_graph as halves
from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.healing_memory import Stretches
from burnish.backends.fx.objective import tensors
from burnish.ir.errors import BurnishError, InputError
from burnish.ir.samples import Sample
from burnish.passes.lossy import Mixed


def outputs_of(module: fx.GraphModule, names: Sequence[str]) -> dict[str, fx.Node]:
    """The nodes that compute outputs of the model, by name."""
    (end,) = (node for node in module.graph.nodes if node.op == "output")
    order = bridge_of(module).outputs
    return {name: end.args[0][order.index(name)] for name in names}


class Trained:
    """Values of a module that is trained; what is frozen before them is computed once for each sample.

    Args:
        module: a bridged module.
        wanted: nodes by name.
        trained: the names of its parameters that change, besides those of modules in its graph.
        limit: bytes that may be kept.
        ports: the names that some of its inputs have in the samples.
        mixed: what makes inputs of other sizes of what the samples hold, by their names in the module.

    Attributes:
        behind: what is computed anew in every step; takes and gives tuples.
    """

    def __init__(
        self, module: fx.GraphModule, wanted: Mapping[str, fx.Node], trained: Set[str], limit: int,
        ports: Mapping[str, str], mixed: Mapping[str, Mixed],
    ) -> None:  # fmt: skip
        roots = [node for node in module.graph.nodes if node.op == "get_attr" and node.target in trained]
        changed = [node for node in module.graph.nodes if node.op == "call_module" and _learns(module, node)]
        moving = halves.descendants([*roots, *changed]) | set(changed)
        self._module, self._names, self._ports, self._mixed = module, list(wanted), ports, mixed
        parts = halves.cut(module, list(wanted.values()), moving)
        self._before = parts.before
        self.behind: nn.Module = parts.behind
        self._kept = halves.Kept(limit, halves.storages(module))

    def __call__(self, sample: Sample, key: Any) -> dict[str, torch.Tensor]:
        """The values by name; what is kept goes under `key`.

        Raises:
            InputError: the module refuses the sample.
        """

        return _guarded(lambda: self.behind(*self._leading(sample, key)), self._names, sample)

    def feeds(self, sample: Sample) -> dict[str, np.ndarray]:
        """The inputs of the module."""
        given = sample.feeds
        found = {**given, **{mine: given[name] for mine, name in self._ports.items() if name in given}}
        taken = {name: found[name] for name in bridge_of(self._module).inputs if name in found}
        return taken | {name: mix.of(taken[name]) for name, mix in self._mixed.items() if name in taken}

    def _leading(self, sample: Sample, key: Any) -> tuple[Any, ...]:
        def compute() -> tuple[Any, ...]:
            with torch.no_grad():
                found: tuple[Any, ...] = self._before(*tensors(self._module, self.feeds(sample)))
                return found

        return self._kept.get(key, compute)

    def limit(self, marks: Set[str], budget: int, sample: Sample, key: Any) -> None:
        """Compute stretches of the graph again for their gradients, so that activations take no more than a budget.

        Args:
            marks: the names of nodes behind each of which a stretch ends.
            budget: bytes.
            sample: a large one; `key` as for a call.

        Raises:
            InputError: the budget is too small.
        """
        assert isinstance(self.behind, fx.GraphModule)
        stretches = Stretches(self.behind, marks)
        stretches.fit(self._leading(sample, key), budget)
        self.behind = stretches


class Frozen:
    """Values of a module that does not change: they are kept or, where they are too large, what leads to them is.

    Args:
        module: a bridged module.
        wanted: nodes by name.
        end: a node behind which little is left to compute; None where there is none.
        limit: bytes that may be kept.
        count: for how many samples.
    """

    def __init__(
        self, module: fx.GraphModule, wanted: Mapping[str, fx.Node], end: fx.Node | None, limit: int, count: int
    ) -> None:
        self._module, self._names, self._count, self._limit = module, list(wanted), count, limit
        nodes = list(wanted.values())
        self._whole = halves.leading_to(module, nodes)
        self._cut = halves.cut(module, nodes, halves.descendants([end])) if end is not None else None
        self._besides = halves.storages(module)
        self._kept = halves.Kept(limit, self._besides)
        self._fits: bool | None = None if end is not None else True

    def __call__(self, sample: Sample, key: Any) -> dict[str, torch.Tensor]:
        """The values by name, without gradients; what is kept goes under `key`.

        Raises:
            InputError: the module refuses the sample.
        """

        def whole() -> tuple[Any, ...]:
            found: tuple[Any, ...] = self._whole(*tensors(self._module, sample.feeds))
            return found

        def values() -> tuple[Any, ...]:
            if self._fits is None:
                first = whole()
                self._fits = halves.size_of(first, self._besides) * self._count <= self._limit
                return first
            if self._fits or self._cut is None:
                return self._kept.get(key, whole)
            before = self._cut.before
            found: tuple[Any, ...] = self._cut.behind(
                *self._kept.get(key, lambda: before(*tensors(self._module, sample.feeds)))
            )
            return found

        with torch.no_grad():
            return _guarded(values, self._names, sample)


def _learns(module: fx.GraphModule, node: fx.Node) -> bool:
    return any(one.requires_grad for one in module.get_submodule(str(node.target)).parameters())


def _guarded(function: Callable[[], tuple[Any, ...]], names: Sequence[str], sample: Sample) -> dict[str, torch.Tensor]:
    try:
        return dict(zip(names, function(), strict=True))
    except BurnishError:
        raise
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"torch refuses the inputs: {text}", place=f"sample `{sample.name}`") from error
