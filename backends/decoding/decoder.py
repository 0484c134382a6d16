"""A model that decodes: its ports, what runs it, and what it is able to do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from burnish.backends.decoding.engine import Engine
from burnish.backends.decoding.keeping import Keeper
from burnish.backends.decoding.ports import Ports
from burnish.backends.decoding.state import State
from burnish.ir.errors import InputError

_PROBE = ((1, 2, 3, 4, 5), (3, 4))
_NEXT = 6
_NEAR = 2e-3
"""Largest difference to single rows, relative to the largest score."""


class Decoder:
    """A model with caches that can be fed step by step.

    Attributes:
        ports: what it takes and gives.
        engine: what runs it.
        limit: positions that there are; None when nothing bounds them.
        name: of the model, for errors.
        keeper: lets go of tokens behind a prompt; None where caches keep every token.
    """

    def __init__(
        self,
        ports: Ports,
        engine: Engine,
        *,
        limit: int | None = None,
        name: str = "the model",
        keeper: Keeper | None = None,
    ) -> None:
        self.ports = ports
        self.engine = engine
        known = [one for one in (ports.limit, limit) if one is not None]
        self.limit = min(known, default=None)
        self.name = name
        self.keeper = keeper
        self._mixes: bool | None = None

    def close(self) -> None:
        """Free the model."""
        self.engine.close()
        if self.keeper is not None:
            self.keeper.close()

    def start(self, rows: int = 1) -> State:
        """A state of empty rows.

        Raises:
            InputError: the model is made for another number of rows.
        """
        if self.ports.rows not in (None, rows):
            raise InputError(
                f"the model takes batches of {self.ports.rows}, not of {rows}",
                place=self.name,
                hint="export it with a batch that can change",
            )
        caches = [np.zeros(port.sizes(rows, 0), port.dtype) for port in self.ports.caches]
        return State(self, np.zeros(rows, np.int64), caches)

    def check(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Refuse ids that the model has no row for, and rows longer than its range.

        Raises:
            InputError: with what is wrong.
        """
        size = self.ports.vocabulary
        wrong = min(int(ids.min(initial=0)), 0) or int(ids.max(initial=0))
        if wrong < 0 or (size is not None and wrong >= size):
            known = "" if size is None else f", it has {size}"
            raise InputError(
                f"the model has no token {wrong}{known}", place=self.name, hint="is this the model's tokenizer?"
            )
        longest = int(lengths.max(initial=0))
        if self.limit is not None and longest > self.limit:
            raise InputError(
                f"{longest} tokens are more than the {self.limit} that the model has positions for",
                place=self.name,
                hint="shorten the prompt or lower `--max-tokens`",
            )

    @property
    def mixes(self) -> bool:
        """Whether rows of different lengths can be computed together: tried out once, against single rows.

        A model without a mask cannot; one whose positions count padding, or that is wrong for another reason, is found.
        """
        if self._mixes is None:
            self._mixes = bool(self.ports.packing) and self.ports.rows is None
            self._mixes = self._mixes and self._agrees()
        return self._mixes

    def need_mixing(self) -> None:
        """Refuse where rows of different lengths cannot be computed together.

        Raises:
            InputError: they cannot.
        """
        if not self.mixes:
            raise InputError(
                "the model cannot tell rows of different lengths apart",
                place=self.name,
                hint="batch rows of one length only, or export the model with a mask and positions",
            )

    def _agrees(self) -> bool:
        """Whether two rows of different lengths give what each gives alone, at once and in the step after."""
        wide, most = len(_PROBE[0]), self.ports.vocabulary or _NEXT + 1
        ids, keep = np.zeros((2, wide), np.int64), np.zeros((2, wide), bool)
        for row, tokens in enumerate(_PROBE):
            ids[row, wide - len(tokens) :], keep[row, wide - len(tokens) :] = tokens, True
        ids, step = ids % most, np.full((1, 1), _NEXT % most)
        both = self.start(2)
        try:
            found = both.feed(ids, keep)[:, -1], both.feed(np.repeat(step, 2, 0))[:, 0]
        except InputError:
            return False
        for row in range(2):
            alone = self.start(1)
            expected = alone.feed(ids[row : row + 1, keep[row]])[0, -1], alone.feed(step)[0, 0]
            for one, other in zip(found, expected, strict=True):
                if not np.abs(one[row] - other).max() <= _NEAR * np.abs(other).max():
                    return False
        return True
