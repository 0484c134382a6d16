"""Prompts computed behind what is held of earlier ones: the same tokens, each beginning computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from burnish.backends.decoding import grouping, loop
from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.grouping import Plan
from burnish.backends.decoding.radix import Counting, Node, Rule, Store, Tokens, Tree, Work
from burnish.backends.decoding.rows import Array
from burnish.backends.decoding.state import State
from burnish.ir.errors import InputError

Scores = NDArray[np.float32]
PRICE = 16
"""Tokens that a run of the model costs beside its own: about 11 for SmolLM2 on one thread, and copies of caches."""
ALPHAS = tuple(step / 10 for step in range(21))
"""Weights of the work that are tried out (Marconi, arXiv:2411.19379, section 4.2)."""


class Caches:
    """A store of a tree: keys and values of a decoder, one array of one row for each of its caches."""

    def __init__(self, decoder: Decoder) -> None:
        """
        Raises:
            InputError: the model is made for several rows, so that no beginning can be computed alone, or its caches
                have budgets, so that they do not hold every token, or prompts decide as a whole what is computed.
        """
        if decoder.keeper is not None:
            raise InputError(
                "the caches of the model have budgets, and beginnings of prompts are whole",
                place=decoder.name,
                hint="leave out `--prefix-memory`",
            )
        if decoder.ports.decides:
            raise InputError(
                "a prompt decides as a whole what the model computes, so nothing is computed of its beginning alone",
                place=decoder.name,
                hint="leave out `--prefix-memory`",
            )
        if decoder.ports.rows not in (None, 1):
            raise InputError(
                f"the model takes batches of {decoder.ports.rows}, and a beginning of prompts is one row",
                place=decoder.name,
                hint="export it with a batch that can change, or leave out `--prefix-memory`",
            )
        self._times = [port.time for port in decoder.ports.caches]
        sizes = [int(np.prod(port.sizes(1, 1))) * port.dtype.itemsize for port in decoder.ports.caches]
        self.token_bytes, self.part_bytes = sum(sizes), max(sizes)

    def part(self, held: list[Array], at: int) -> tuple[list[Array], list[Array]]:
        """See `burnish.backends.decoding.radix.Store`; an array is freed before the next one is parted."""
        heads: list[Array] = []
        tails: list[Array] = []
        for time in self._times:
            one = np.moveaxis(held.pop(0), time, 0)
            for piece, parts in ((one[:at], heads), (one[at:], tails)):
                parts.append(np.moveaxis(piece, 0, time).copy())
        return heads, tails


@dataclass
class Counts:
    """What was done.

    Attributes:
        prompts: tokens of the prompts.
        computed: tokens that were computed for them, without padding.
        work: of those.
        most: bytes that the tree held, the most at any time.
        evicted: tokens that had to go.
    """

    prompts: int = 0
    computed: int = 0
    work: float = 0.0
    most: int = 0
    evicted: int = 0


class Sharing:
    """Computes batches of prompts, and holds in a tree what others begin with.

    With a plan of all prompts, their common beginnings are held from the first prompt that has one to the last one, and
    nothing is held in the end. Without, whole prompts are held until they have to go, and of each batch what its own
    prompts have in common is computed first.

    Attributes:
        tree: what is held.
        counts: what was done.
    """

    def __init__(
        self,
        tree: Tree,
        decoder: Decoder | None,
        *,
        mixes: bool,
        work: Work,
        plan: Plan | None = None,
        prompts: Sequence[Tokens] = (),
    ) -> None:
        """
        Args:
            tree: empty; of `Caches` of the decoder, or of `Counting`.
            decoder: what computes; None counts what would be computed.
            mixes: whether rows of different lengths can be computed together.
            work: that tokens take.
            plan: of all prompts that come, each once.
            prompts: that the plan was made for.
        """
        self.tree, self.counts = tree, Counts()
        self._decoder, self._mixes, self._work, self._planned = decoder, mixes, work, plan is not None
        self._uses: dict[Tokens, list[Tokens]] = {}
        self._left: Counter[Tokens] = Counter()
        self._pins: dict[Tokens, Node] = {}
        self._fed = 0
        for prompt, numbers in zip(prompts, plan.uses, strict=True) if plan is not None else ():
            assert plan is not None
            self._uses[prompt] = [plan.prefixes[number] for number in numbers]
            self._left.update(self._uses[prompt])

    def prefill(self, decoder: Decoder, prompts: Sequence[Tokens]) -> tuple[State, Scores]:
        """As `loop.prefill` has it, of the decoder that this was made for."""
        found = self.run(prompts)
        assert found is not None and decoder is self._decoder
        return found

    def run(self, prompts: Sequence[Tokens]) -> tuple[State, Scores] | None:
        """Compute a batch: its state and scores; None where it is only counted."""
        self.counts.prompts += sum(map(len, prompts))
        uses = [self._uses[prompt] for prompt in prompts] if self._planned else self._own(prompts)
        # What a row goes on from stays until the row is held itself.
        pins = [] if self._planned else [self.tree.pin(prompt[:-1]) for prompt in prompts]
        try:
            state, scores = self._computed(prompts, uses)
            for row, prompt in enumerate(() if self._planned else prompts):
                self.tree.unpin(pins.pop(0))
                self._add(prompt, state, row)
        finally:
            for node in pins:
                self.tree.unpin(node)
        self.counts.most, self.counts.evicted = self.tree.most, self.tree.evicted
        if state is None or scores is None:
            return None
        state.fed, self._fed = state.fed + self._fed, 0
        return state, scores

    def _computed(self, prompts: Sequence[Tokens], uses: list[list[Tokens]]) -> tuple[State | None, Scores | None]:
        """The beginnings of a batch first, then its rows: those with few and those with many tokens left apart."""
        try:
            for prefix in sorted({one for each in uses for one in each}, key=len):
                self._hold(prefix)
            starts = self._starts(prompts)
            parts = parted([len(prompt) - start for prompt, start in zip(prompts, starts, strict=True)])
            begun = [self._begin([prompts[row][: starts[row]] for row in rows]) for rows in parts]
        finally:
            self._done(uses)
        found = []
        for rows, state in zip(parts, begun, strict=True):
            ends = [len(prompts[row]) for row in rows]
            found.append(self._feed(state, [prompts[row] for row in rows], [starts[row] for row in rows], ends))
        return self._joined(begun, found, parts)

    def _own(self, prompts: Sequence[Tokens]) -> list[list[Tokens]]:
        """What the prompts of a batch have in common that is not held."""
        cached = [self.tree.match(prompt[:-1]).length for prompt in prompts]
        plan = grouping.choose(prompts, price=PRICE, cached=cached)
        uses = [[plan.prefixes[number] for number in each] for each in plan.uses]
        for each in uses:
            self._left.update(each)
        return uses

    def _hold(self, prefix: Tokens) -> None:
        """Have a beginning in the tree that stays, as much of it as there is room for."""
        start, end = self.tree.match(prefix).length, self.tree.reserve(prefix)
        if end > start:
            state = self._begin([prefix[:start]])
            self._feed(state, [prefix], [start], [end])
            self._add(prefix[:end], state, 0)
            self._fed += 0 if state is None else state.fed
        before, self._pins[prefix] = self._pins.get(prefix), self.tree.pin(prefix)
        if before is not None:
            self.tree.unpin(before)

    def _starts(self, prompts: Sequence[Tokens]) -> list[int]:
        """How many tokens of each prompt are held; the last one is computed in any case."""
        starts = [self.tree.match(prompt[:-1]).length for prompt in prompts]
        return starts if self._mixes else [min(starts)] * len(starts)

    def _begin(self, texts: Sequence[Tokens]) -> State | None:
        """Rows of what is held of texts that are held as a whole."""
        if self._decoder is None:
            return None
        return State.laid(self._decoder, [list(self.tree.match(text).pieces()) for text in texts])

    def _joined(
        self, states: Sequence[State | None], scores: Sequence[Scores | None], parts: Sequence[Sequence[int]]
    ) -> tuple[State | None, Scores | None]:
        """The rows of a batch that was computed in parts, in order."""
        if len(parts) == 1 or self._decoder is None:
            return states[0], scores[0]
        rows: list[list[tuple[list[Array], int]]] = [[] for _ in range(sum(map(len, parts)))]
        last = np.zeros((len(rows), scores[0].shape[1] if scores[0] is not None else 0), np.float32)
        fed = 0
        for part, state, found in zip(parts, states, scores, strict=True):
            assert state is not None and found is not None
            last[part] = found
            fed += state.fed
            for place, row in enumerate(part):
                rows[row] = [(state.viewed(place, 0, state.length(place)), state.length(place))]
        joined = State.laid(self._decoder, rows)
        joined.fed = fed
        return joined, last

    def _feed(self, state: State | None, texts: Sequence[Tokens], starts: list[int], ends: list[int]) -> Scores | None:
        """Compute the tokens of each text from `start` to `end`, and count them."""
        scores = None
        if state is not None:
            starts = state.lengths.tolist()
            scores = loop.fed(state, [text[a:b] for text, a, b in zip(texts, starts, ends, strict=True)])
            ends = state.lengths.tolist()
        self.counts.computed += sum(ends) - sum(starts)
        self.counts.work += sum(self._work.between(start, end) for start, end in zip(starts, ends, strict=True))
        return scores

    def _add(self, text: Tokens, state: State | None, row: int) -> None:
        self.tree.add(text, lambda start, end: None if state is None else state.kept(row, start, end))

    def _done(self, uses: Sequence[Sequence[Tokens]]) -> None:
        """Let go of beginnings that no other prompt of the plan has, and of what a batch held for itself."""
        for prefix in (one for each in uses for one in reversed(each)):
            self._left[prefix] -= 1
            if not self._left[prefix]:
                del self._left[prefix]
                if prefix in self._pins:
                    self.tree.unpin(self._pins.pop(prefix), drop=self._planned)


def parted(counts: Sequence[int]) -> list[list[int]]:
    """Which rows with so many tokens each are computed together, so that the least is paid.

    A run of the model costs `PRICE` and as many tokens for each of its rows as its longest row has.
    """
    order = sorted(range(len(counts)), key=lambda row: counts[row])
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        longest = counts[order[end - 1]]
        best.append(min((best[start][0] + PRICE + longest * (end - start), start) for start in range(end)))
    parts, end = [], len(order)
    while end:
        start = best[end][1]
        parts.append(sorted(order[start:end]))
        end = start
    return parts[::-1]


@dataclass(frozen=True)
class Schedule:
    """In which batches requests are computed, and what that will take.

    Attributes:
        batches: numbers of the requests.
        predicted: from the tokens alone, by going through the batches without computing.
        alpha: of the rule by which leaves go; None where common beginnings are planned.
    """

    batches: tuple[tuple[int, ...], ...]
    predicted: Counts
    alpha: float | None
    _start: Callable[[Decoder | None], Sharing]

    def start(self, decoder: Decoder) -> Sharing:
        """What computes these batches, in this order."""
        return self._start(decoder)


def grouped(decoder: Decoder, prompts: Sequence[Tokens], size: int, budget: int) -> Schedule:
    """Prompts with common beginnings are neighbours, and each beginning is computed once where there is room for it.

    Args:
        decoder: what will compute.
        prompts: of all requests.
        size: rows of a batch at most.
        budget: bytes for beginnings.

    Raises:
        InputError: see `Caches`.
    """
    plan = grouping.choose(prompts, price=PRICE)
    return _schedule(decoder, prompts, loop.batches(decoder, prompts, size, plan.order), budget, plan, None, Work())


def in_order(
    decoder: Decoder, prompts: Sequence[Tokens], size: int, budget: int, alphas: Sequence[float], work: Work
) -> Schedule:
    """Prompts stay in their order, and what was computed is held until it has to go.

    Args:
        decoder, prompts, size, budget: as for `grouped`.
        alphas: for the rule by which leaves go; that with the least work is taken, the first of several. 0 is least
            recently used.
        work: that tokens take.

    Raises:
        InputError: see `Caches`.
    """
    batches = list(loop.batches(decoder, prompts, size, range(len(prompts))))
    tried = (_schedule(decoder, prompts, batches, budget, None, Rule(alpha, work), work) for alpha in alphas)
    return min(tried, key=lambda one: one.predicted.work)


def _schedule(
    decoder: Decoder,
    prompts: Sequence[Tokens],
    batches: Iterable[Sequence[int]],
    budget: int,
    plan: Plan | None,
    rule: Rule | None,
    work: Work,
) -> Schedule:
    store = Caches(decoder)

    def start(computes: Decoder | None) -> Sharing:
        held: Store = store if computes is not None else Counting(store.token_bytes, store.part_bytes)
        tree = Tree(held, budget, rule)
        return Sharing(tree, computes, mixes=decoder.mixes, work=work, plan=plan, prompts=prompts)

    trial, given = start(None), tuple(map(tuple, batches))
    for batch in given:
        trial.run([prompts[index] for index in batch])
    return Schedule(given, trial.counts, None if rule is None else rule.alpha, start)
