"""Decoders with budgets: behind a prompt, the caches let go of what they have no room for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.backends.decoding.engine import Engine
from burnish.backends.decoding.ports import CachePort
from burnish.passes.kv_budget import Budget

Array = NDArray[Any]


class Keeper:
    """Runs the graph that makes caches smaller.

    Attributes:
        budget: what the decoder says that it keeps.
        places: for each row of the budget, which of the decoder's caches have the keys and the values.
    """

    def __init__(self, budget: Budget, engine: Engine, caches: tuple[CachePort, ...]) -> None:
        """
        Args:
            budget: of the decoder.
            engine: runs the graph of `burnish.passes.kv_compress`.
            caches: of the decoder.
        """
        self.budget, self._engine = budget, engine
        places = {port.past: index for index, port in enumerate(caches)}
        self.places = [(places[one.past[0]], places[one.past[1]]) for one in budget.caches]

    def seen(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """The last queries, of the outputs of a call."""
        return {query.name: outputs[query.name] for one in self.budget.caches for query in one.queries}

    def kept(self, caches: list[Array], seen: Mapping[str, Array]) -> list[Array]:
        """The caches of rows of one length, those with a budget smaller than before.

        Args:
            caches: all caches of the decoder.
            seen: the last queries.

        Raises:
            InputError: the graph refuses them.
        """
        feeds = dict(seen)
        for one, places in zip(self.budget.caches, self.places, strict=True):
            feeds |= {name: np.ascontiguousarray(caches[at]) for name, at in zip(one.present, places, strict=True)}
        found, made = self._engine.call(feeds, {}), list(caches)
        for one, places in zip(self.budget.caches, self.places, strict=True):
            for name, at in zip(one.past, places, strict=True):
                made[at] = found[name]
        return made

    def close(self) -> None:
        """Free the graph."""
        self._engine.close()
