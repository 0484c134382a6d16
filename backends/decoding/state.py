"""The caches of a batch of rows, and how tokens are added to them and taken back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from burnish.backends.decoding import feeding
from burnish.backends.decoding.rows import Span, laid, moved, packed
from burnish.ir.errors import InputError

if TYPE_CHECKING:
    from burnish.backends.decoding.decoder import Decoder

Array = NDArray[Any]
_GROWTH = 64
"""A buffer grows by at least this many slots."""


class State:
    """The caches of some rows. Rows may be of different lengths; nothing depends on how they were fed.

    A state is changed by `feed` and `truncate` only. States made of it by `fork` and `select` live on their own.

    Attributes:
        decoder: what computes.
        lengths: tokens that each row remembers, int64 [rows]; not to be written.
        fed: tokens computed so far for this state, padding included; `fork` and `select` hand the count on.
        prompt_bytes: of the caches of the longest row before `release` let go of some; 0 where it did not.
    """

    def __init__(
        self,
        decoder: Decoder,
        lengths: NDArray[np.int64],
        caches: list[Array],
        fed: int = 0,
        lost: NDArray[np.int64] | None = None,
    ) -> None:
        self.decoder = decoder
        self.lengths = lengths
        self.fed = fed
        self.prompt_bytes = 0
        self._caches = caches
        self._lost = np.zeros((len(caches), len(lengths)), np.int64) if lost is None else lost
        self._seen: dict[str, Array] = {}
        self._spare: list[Array | None] = [None] * len(caches)
        self._shared = False

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.lengths)

    def length(self, row: int = 0) -> int:
        """Tokens that a row remembers."""
        return int(self.lengths[row])

    @property
    def cache_bytes(self) -> int:
        """Bytes of the arrays that hold the keys and values now."""
        return sum(cache.nbytes for cache in self._caches)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all arrays that this state holds: the caches, and those that the next call writes into."""
        return self.cache_bytes + sum(spare.nbytes for spare in self._spare if spare is not None)

    def feed(self, ids: NDArray[np.int64], keep: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Add tokens to the rows and give the scores of the token after each.

        Args:
            ids: int64 [rows, n], n at least 1; a prompt, one token, or several to be verified.
            keep: [rows, n]; False where a row has no token (padding, anywhere in the row). None: all are tokens.

        Returns:
            float32 [rows, n, vocabulary]; zeros where there is no token, and before the last one of a model that
            scores the last token only.

        Raises:
            InputError: there is no token, the ids are not of this vocabulary, a row grows beyond the model's range,
                rows of different lengths are mixed in a model that cannot tell them apart, or the model refuses its
                inputs. The state is as before then.
        """
        ids = np.ascontiguousarray(ids, np.int64)
        if ids.ndim != 2 or len(ids) != self.rows or not ids.size:
            raise InputError(f"ids of shape {list(ids.shape)} are no tokens for {self.rows} rows")
        whole = keep is None or bool(np.all(keep))
        kept = np.ones(ids.shape, bool) if keep is None else np.asarray(keep, bool)
        if kept.shape != ids.shape:
            raise InputError(f"a mask of shape {list(kept.shape)} does not fit ids of shape {list(ids.shape)}")
        counts = kept.sum(1)
        if not counts.any():
            raise InputError("there is no token in what is fed")
        after = self.lengths + counts
        self.decoder.check(ids[kept], after)
        self._distinguish(after)
        if whole:
            return self._computed(ids, counts)
        tokens, places = packed(ids, kept)
        scores = self._computed(tokens, counts)
        given = np.zeros((*ids.shape, scores.shape[2]), np.float32)
        row, place = np.nonzero(places >= 0)
        given[row, places[row, place]] = scores[row, place]
        return given

    def truncate(self, lengths: int | Sequence[int] | NDArray[np.int64]) -> None:
        """Forget the latest tokens: each row goes back to so many, one number for all rows or one for each.

        Raises:
            InputError: a length is negative, or larger than the row's.
        """
        wanted = np.broadcast_to(np.asarray(lengths, np.int64), self.lengths.shape).copy()
        if np.any(wanted < 0) or np.any(wanted > self.lengths):
            raise InputError(f"rows of {self.lengths.tolist()} tokens cannot be cut to {wanted.tolist()}")
        if np.any(self._lost > wanted):
            raise InputError("the caches do not hold every token of the prompt, so it cannot be cut")
        self._distinguish(wanted)
        if np.any(wanted != self.lengths):
            self._drop(wanted)

    def select(self, rows: Sequence[int]) -> State:
        """A new state of some rows, in this order; a row may be taken several times or not at all."""
        chosen = list(rows)
        made = self._moved(chosen, self.lengths[chosen])
        return State(self.decoder, self.lengths[chosen].copy(), made, self.fed, self._lost[:, chosen].copy())

    def fork(self) -> State:
        """A new state with the same rows, at no cost until one of the two is fed."""
        if any(self._in_place):
            return self.select(range(self.rows))
        self._shared = True
        made = State(self.decoder, self.lengths.copy(), list(self._caches), self.fed, self._lost.copy())
        made._shared, made._seen = True, self._seen
        return made

    def lent(self, decoder: Decoder) -> State:
        """A new state with the same rows that another decoder feeds, whose caches are laid out as these."""
        made = self.fork()
        made.decoder = decoder
        return made

    @staticmethod
    def joined(states: Sequence[State]) -> State:
        """A new state of all rows of several states of one decoder, in order.

        Raises:
            InputError: the rows have different lengths and the model cannot tell them apart.
        """
        decoder = states[0].decoder
        lengths = np.concatenate([state.lengths for state in states])
        lost = np.concatenate([state._lost for state in states], 1)
        states[0]._distinguish(lengths)
        slots = (lengths - lost).max(1, initial=0).tolist()
        parts = [state._moved(range(state.rows), state.lengths, slots) for state in states]
        caches = [
            np.concatenate(each, port.batch)
            for each, port in zip(zip(*parts, strict=True), decoder.ports.caches, strict=True)
        ]
        made = State(decoder, lengths, caches, sum(state.fed for state in states), lost)
        made.prompt_bytes = max(state.prompt_bytes for state in states)
        return made

    def release(self) -> None:
        """Let go of what the caches have no room for; to be called behind a prompt, for rows of one length.

        Nothing happens where the decoder has no budget, or the caches hold less than it. The last tokens that were fed
        at once, as many as the budget's window, say what is kept.
        """
        keeper = self.decoder.keeper
        if keeper is None or not self._seen:
            return
        length = self.length()
        assert not self._lost.any() and np.all(self.lengths == length)
        if np.all(keeper.budget.counts(length) >= length):
            return
        whole = self._moved(range(self.rows), self.lengths) if any(self._in_place) else self._caches
        self.prompt_bytes = sum(cache.nbytes for cache in whole)
        self._caches = keeper.kept(whole, self._seen)
        self._spare = [None] * len(self._caches)
        for index, port in enumerate(self.decoder.ports.caches):
            self._lost[index] = length - self._caches[index].shape[port.time]
        self._seen = {}

    @staticmethod
    def laid(decoder: Decoder, rows: Sequence[Sequence[tuple[list[Array], int]]]) -> State:
        """A new state whose rows remember what `kept` gave, piece by piece.

        Args:
            decoder: what computed the pieces.
            rows: for each row its pieces, from the first token on, and how many tokens of each are meant.

        Raises:
            InputError: the rows have different lengths and the model cannot tell them apart.
        """
        state = decoder.start(len(rows))
        lengths = np.asarray([sum(count for _, count in row) for row in rows], np.int64)
        state._distinguish(lengths)
        longest, at_end = int(lengths.max(initial=0)), state._at_end
        caches = [
            laid(
                [[(piece[index], count) for piece, count in row] for row in rows],
                port.sizes(len(rows), longest), port.dtype, port.batch, port.time, at_end,
            )
            for index, port in enumerate(decoder.ports.caches)
        ]  # fmt: skip
        return State(decoder, lengths, caches)

    def kept(self, row: int, start: int, end: int) -> list[Array]:
        """The caches of some tokens of a row, each with one row and a slot for each token, in memory of their own."""
        return [one.copy() for one in self.viewed(row, start, end)]

    def viewed(self, row: int, start: int, end: int) -> list[Array]:
        """The same in the memory of this state, to be read before it is fed."""
        assert not self._lost.any()
        first = start + (self._slots - self.length(row) if self._at_end else 0)
        found = []
        for cache, port in zip(self._caches, self.decoder.ports.caches, strict=True):
            index = [slice(None)] * cache.ndim
            index[port.batch], index[port.time] = slice(row, row + 1), slice(first, first + end - start)
            found.append(cache[tuple(index)])
        return found

    @property
    def _at_end(self) -> bool:
        return self.decoder.ports.packing != "start"

    @property
    def _slots(self) -> int:
        """Slots of caches that keep every token; with buffers that are written in place, those in use."""
        return int(self.lengths.max(initial=0))

    def _slots_of(self, index: int) -> int:
        """Slots of one cache."""
        return int((self.lengths - self._lost[index]).max(initial=0))

    def _hidden(self) -> NDArray[np.int64]:
        """How many slots at the start of each cache with a budget hold nothing, [caches, rows], or tokens are lost."""
        keeper = self.decoder.keeper
        places = [] if keeper is None else [keys for keys, _ in keeper.places]
        if not self._at_end:
            return self._lost[places]
        own = np.array([self._slots_of(index) for index in places], np.int64)
        return own[:, None] - (self.lengths - self._lost[places])

    @property
    def _in_place(self) -> list[bool]:
        """Which caches are buffers that the model writes into."""
        writes = self.decoder.engine.writes and not self._at_end
        return [writes and port.in_place for port in self.decoder.ports.caches]

    def _distinguish(self, lengths: NDArray[np.int64]) -> None:
        """Refuse rows of different lengths where the model cannot tell them apart."""
        if len(set(lengths.tolist())) > 1:
            self.decoder.need_mixing()

    def _moved(self, rows: Iterable[int], lengths: Iterable[int], slots: Sequence[int] | None = None) -> list[Array]:
        """The caches with the first tokens of some rows, so many of each; with so many slots, or the fewest."""
        wanted, made = list(zip(rows, map(int, lengths), strict=True)), []
        for index, (cache, port) in enumerate(zip(self._caches, self.decoder.ports.caches, strict=True)):
            lost, own = self._lost[index], self._slots_of(index)
            spans = [
                Span(row, own - int(self.lengths[row] - lost[row]) if self._at_end else 0, length - int(lost[row]))
                for row, length in wanted
            ]
            most = max((span.length for span in spans), default=0) if slots is None else slots[index]
            made.append(moved(cache, port.batch, port.time, spans, most, self._at_end))
        return made

    def _computed(self, tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the model on the first tokens of every row; the scores of all, [rows, n, vocabulary].

        Rows with fewer tokens than the longest are computed with more, behind them, which no earlier token sees, and
        which are dropped. Rows go one by one where that cannot be: there is no place for more, the model scores the
        last token only, or decides by the first tokens of a row, or com.microsoft GroupQueryAttention has several
        tokens behind a cache.
        """
        decoder, new = self.decoder, tokens.shape[1]
        ragged = bool(np.any(counts != new))
        full = decoder.limit is not None and int(self.lengths.max()) + new > decoder.limit
        behind = not self._at_end and new > 1 and bool(self.lengths.any())
        decides = decoder.ports.decides and not self.lengths.all()
        if self.rows > 1 and (behind or (ragged and (full or decides or decoder.ports.last_only))):
            return self._one_by_one(tokens, counts)
        after = self.lengths + counts
        scores = self._scores(self._call(tokens), new)
        if ragged:
            self._drop(after)
        return scores

    def _one_by_one(self, tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the model on each row alone, without a token more than it has."""
        in_place, after = all(self._in_place), self.lengths + counts
        for index in range(len(self._caches)) if in_place else ():
            self._grow(index, int((after - self._lost[index]).max()))
        alone = [self._view(row) if in_place else self.select([row]) for row in range(self.rows)]
        scores: NDArray[np.float32] | None = None
        for row, one in enumerate(alone):
            count = int(counts[row])
            if count:
                found = self._scores(one._call(tokens[row : row + 1, :count]), count)
                if scores is None:
                    scores = np.zeros((*tokens.shape, found.shape[2]), np.float32)
                scores[row, :count] = found[0]
        assert scores is not None
        if not in_place:
            self._caches, self._shared = State.joined(alone)._caches, False
        self.lengths = after
        self.fed += int(counts.sum())
        return scores

    def _view(self, row: int) -> State:
        """A row in the same memory; for buffers that are written in place."""
        ports = self.decoder.ports.caches
        caches = [
            cache[(slice(None),) * port.batch + (slice(row, row + 1),)]
            for cache, port in zip(self._caches, ports, strict=True)
        ]
        return State(self.decoder, self.lengths[row : row + 1], caches, lost=self._lost[:, row : row + 1])

    def _call(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the model once."""
        decoder, new = self.decoder, tokens.shape[1]
        feeds = feeding.inputs(decoder.ports, tokens, self.lengths, self._slots)
        into: dict[str, Array] = {}
        totals = [self._slots_of(index) + new for index in range(len(self._caches))]
        in_place = self._in_place
        for index, port in enumerate(decoder.ports.caches):
            if in_place[index]:
                self._grow(index, totals[index])
                into[port.present] = self._caches[index]
            elif decoder.engine.writes:
                into[port.present] = self._room(index, port.sizes(self.rows, totals[index]), port.dtype)
            feeds[port.past] = self._caches[index]
        if decoder.keeper is not None:
            feeds[decoder.keeper.budget.hidden] = self._hidden()
        found = decoder.engine.call(feeds, into)
        self._seen = {} if decoder.keeper is None else decoder.keeper.seen(found)
        for index, port in enumerate(decoder.ports.caches):
            made = found[port.present]
            if not in_place[index] and made.shape != port.sizes(self.rows, totals[index]):
                raise InputError(
                    f"`{port.present}` has shape {list(made.shape)} after {totals[index]} tokens",
                    hint="the model does not keep every token, which only whole caches can be run with",
                )
        for index, port in enumerate(decoder.ports.caches):
            old, self._caches[index] = self._caches[index], found[port.present]
            owner = old.base
            mine = not (self._shared or in_place[index]) and isinstance(owner, np.ndarray) and owner.dtype == np.uint8
            self._spare[index] = owner if mine else None
        self._shared = False
        self.lengths = self.lengths + new
        self.fed += tokens.size
        logits = found[decoder.ports.logits]
        return logits.astype(np.float32, copy=False)

    def _scores(self, found: NDArray[np.float32], new: int) -> NDArray[np.float32]:
        """The scores of each token, [rows, new, vocabulary], of a model that may give those of the last only."""
        if found.shape[1] == new:
            return found
        whole = np.zeros((len(found), new, found.shape[2]), np.float32)
        whole[:, -1:] = found[:, -1:]
        return whole

    def _drop(self, lengths: NDArray[np.int64]) -> None:
        """Keep the first tokens of each row; where tokens lie at the start, they stay and only the count changes."""
        if not all(self._in_place):
            self._caches = self._moved(range(self.rows), lengths)
            self._shared = False
        self.lengths = lengths

    def _grow(self, index: int, slots: int) -> None:
        """Make a buffer that is written in place long enough."""
        port, cache = self.decoder.ports.caches[index], self._caches[index]
        have = cache.shape[port.time]
        if have >= slots:
            return
        wanted = max(slots, min(2 * have, have + 16 * _GROWTH), _GROWTH)
        limit = self.decoder.limit
        wanted = wanted if limit is None else max(slots, min(wanted, limit))
        spans = [Span(row, 0, have) for row in range(self.rows)]
        self._caches[index] = moved(cache, port.batch, port.time, spans, wanted, at_end=False)

    def _room(self, index: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of this shape whose content is of no account, in memory that is used again."""
        wanted = math.prod(shape) * dtype.itemsize
        spare = self._spare[index]
        if spare is None or spare.nbytes < wanted:
            spare = np.empty(wanted + wanted // 16 + 1024, np.uint8)
        return spare[:wanted].view(dtype).reshape(shape)
