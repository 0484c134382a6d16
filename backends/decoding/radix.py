"""A radix tree of token sequences that holds something for each token, in so many bytes and never more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Tokens = tuple[int, ...]


class Store(Protocol):
    """What is held for tokens."""

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes."""
        ...

    @property
    def part_bytes(self) -> int:
        """Bytes for each token of a node that are taken beside those while the node is parted."""
        ...

    def part(self, held: Any, at: int) -> tuple[Any, Any]:
        """What is held for the first `at` tokens and for the others; `held` is not used again.

        Neither of the two may keep the memory of the other.
        """
        ...


@dataclass(frozen=True)
class Counting:
    """Holds nothing and counts as a store of that many bytes does: to try out what would be held."""

    token_bytes: int
    part_bytes: int = 0

    def part(self, held: Any, at: int) -> tuple[Any, Any]:
        """See `Store`."""
        return None, None


@dataclass(frozen=True)
class Work:
    """What tokens cost to compute: those of a text of n tokens `linear` * n + `square` * n ** 2."""

    linear: float = 1.0
    square: float = 0.0

    def between(self, start: int, end: int) -> float:
        """Of the tokens of a text from `start` to `end`."""
        return self.linear * (end - start) + self.square * (end * end - start * start)


@dataclass(frozen=True)
class Rule:
    """Which leaf goes first: the one of the smallest sum of how recently it was used and how much work it saves.

    S = r + alpha * e, where r is 1 / age and e is the work saved for each byte, both scaled to 0..1 over the leaves
    that may go (Marconi, arXiv:2411.19379, equation 2). With plain caches of attention nothing is freed where an inner
    node goes, so that leaves only are looked at.

    Attributes:
        alpha: weight of the work; 0 is least recently used.
        work: that tokens take.
    """

    alpha: float = 0.0
    work: Work = Work()

    def first(self, leaves: Sequence[Node], now: int) -> Node:
        """The leaf to let go; of equals, the one that was used longer ago, then the one that is a leaf for longer."""
        recent = _scaled(np.asarray([1 / (1 + now - leaf.used) for leaf in leaves]))
        if self.alpha:
            saved = [self.work.between(leaf.end - len(leaf.tokens), leaf.end) / len(leaf.tokens) for leaf in leaves]
            recent = recent + self.alpha * _scaled(np.asarray(saved))
        least = float(recent.min())
        return min((leaf for leaf, score in zip(leaves, recent, strict=True) if score == least), key=_age)


def _age(node: Node) -> int:
    return node.used


def _scaled(values: np.ndarray) -> np.ndarray:
    """To 0..1; zeros where all are equal."""
    least, most = values.min(), values.max()
    return np.zeros(len(values)) if most == least else (values - least) / (most - least)


class Node:
    """Tokens behind those of another node.

    Attributes:
        parent: the node before; None for the root.
        tokens: of this node, at least one but in the root.
        end: tokens up to the last one of this node, from the root on.
        children: by their first token.
        held: for the tokens of this node.
        used: when it was looked up or held the last time.
        pins: reasons why it must stay.
    """

    __slots__ = ("children", "end", "held", "parent", "pins", "tokens", "used")

    def __init__(self, parent: Node | None, tokens: Tokens, held: Any, used: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.end: int = len(tokens) + (parent.end if parent is not None else 0)
        self.children: dict[int, Node] = {}
        self.held = held
        self.used = used
        self.pins = 0


@dataclass(frozen=True)
class Match:
    """The longest beginning of a sequence that is in a tree.

    Attributes:
        node: the last node that a token of it is in; the root when there is none.
        length: tokens of the beginning; it may end inside the node.
    """

    node: Node
    length: int

    def pieces(self) -> Iterator[tuple[Any, int]]:
        """What is held for each node on the way, and how many of its tokens are meant; from the first token on."""
        way, node = [], self.node
        while node.parent is not None:
            way.append(node)
            node = node.parent
        for node in reversed(way):
            yield node.held, min(len(node.tokens), self.length - (node.end - len(node.tokens)))


class Tree:
    """Beginnings of token sequences, each token held once.

    Attributes:
        budget: bytes that are never exceeded, neither while a node is parted or added.
        bytes: held now.
        most: held at any time so far.
        evicted: tokens that had to go for others so far.
    """

    def __init__(self, store: Store, budget: int, rule: Rule | None = None) -> None:
        """
        Args:
            store: how many bytes a token takes, and how what is held is parted.
            budget: bytes.
            rule: which leaf goes where there is no room; None lets none go.
        """
        self.budget = budget
        self.bytes = self.most = self.evicted = 0
        self._store, self._rule = store, rule
        self._now = 0
        self._root = Node(None, (), None, 0)
        self._leaves: dict[Node, None] = {}

    def match(self, ids: Sequence[int]) -> Match:
        """The longest beginning of `ids` that is held."""
        ids, node, length = tuple(ids), self._root, 0
        while length < len(ids):
            child = node.children.get(ids[length])
            if child is None:
                break
            node, same = child, common(child.tokens, ids, length)
            length += same
            if same < len(child.tokens):
                break
        return Match(node, length)

    def reserve(self, ids: Sequence[int]) -> int:
        """How many tokens of a sequence are held already or can be; others have gone for them where they had to."""
        return self._reserved(ids)[1]

    def add(self, ids: Sequence[int], take: Callable[[int, int], Any]) -> Match:
        """Hold a sequence, or as much of its beginning as there is room for; what is held of it counts as used now.

        Args:
            ids: tokens.
            take: `take(start, end)` gives what to hold for those tokens, in memory of its own.

        Returns:
            What is held of it now.
        """
        found, end = self._reserved(ids)
        node, start = found.node, found.length
        self._now += 1
        if end > start:
            if parts := self._parts(found):
                node = self._part(node, len(node.tokens) - (node.end - start), parts)
            size = (end - start) * self._store.token_bytes
            self._count(size)
            try:
                held = take(start, end)
            except BaseException:
                self._count(-size)
                raise
            made = Node(node, tuple(ids[start:end]), held, self._now)
            node.children[made.tokens[0]] = made
            self._leaves.pop(node, None)
            self._leaves[made] = None
            node = made
        found = Match(node, end)
        while node.parent is not None:
            node.used, node = self._now, node.parent
        return found

    def pin(self, ids: Sequence[int]) -> Node:
        """The last node with a token of `ids`, which stays until `unpin`, and with it all before it."""
        node = self.match(ids).node
        node.pins += 1
        return node

    def unpin(self, node: Node, *, drop: bool = False) -> None:
        """Take back a pin.

        Args:
            node: that was pinned.
            drop: let the node go, and those before it that nothing else needs, where nothing lies behind it.
        """
        node.pins -= 1
        while drop and node.parent is not None and not (node.pins or node.children):
            node = self._drop(node)

    def __len__(self) -> int:
        """Tokens that are held."""
        return sum(len(node.tokens) for node in self.nodes())

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, each after its parent."""
        left = list(self._root.children.values())
        while left:
            node = left.pop()
            left.extend(node.children.values())
            yield node

    def _reserved(self, ids: Sequence[int]) -> tuple[Match, int]:
        """What is held of a sequence, and how many of its tokens can be."""
        found = self.match(ids)
        missing, parts = len(ids) - found.length, self._parts(found)
        if not missing:
            return found, found.length
        found.node.pins += 1
        self._make_room(max(parts, missing * self._store.token_bytes))
        found.node.pins -= 1
        free = self.budget - self.bytes
        return found, found.length + (min(missing, free // self._store.token_bytes) if parts <= free else 0)

    def _parts(self, found: Match) -> int:
        """Bytes that are taken beside others while the node is parted that a match ends inside of."""
        node = found.node
        return len(node.tokens) * self._store.part_bytes if found.length < node.end else 0

    def _make_room(self, wanted: int) -> None:
        """Let leaves go until so many bytes are free, or none is left that may go."""
        while self._rule is not None and self.budget - self.bytes < wanted:
            leaves = [leaf for leaf in self._leaves if not leaf.pins]
            if not leaves:
                return
            gone = self._rule.first(leaves, self._now)
            self.evicted += len(gone.tokens)
            self._drop(gone)

    def _part(self, node: Node, at: int, extra: int) -> Node:
        """Part a node behind its first `at` tokens; the node is the latter of the two then, and keeps its pins."""
        parent = node.parent
        assert parent is not None
        self._count(extra)
        head, tail = self._store.part(node.held, at)
        self._count(-extra)
        made = Node(parent, node.tokens[:at], head, node.used)
        parent.children[made.tokens[0]] = made
        node.parent, node.tokens, node.held = made, node.tokens[at:], tail
        made.children[node.tokens[0]] = node
        return made

    def _drop(self, leaf: Node) -> Node:
        """Remove a leaf; its parent."""
        parent = leaf.parent
        assert parent is not None and not leaf.children
        del parent.children[leaf.tokens[0]], self._leaves[leaf]
        leaf.held = None
        self._count(-len(leaf.tokens) * self._store.token_bytes)
        if parent.parent is not None and not parent.children:
            self._leaves[parent] = None
        return parent

    def _count(self, more: int) -> None:
        self.bytes += more
        self.most = max(self.most, self.bytes)


def common(edge: Tokens, ids: Tokens, start: int) -> int:
    """How many tokens of `edge` are those of `ids` from `start` on."""
    length = min(len(edge), len(ids) - start)
    if edge[:length] == ids[start : start + length]:
        return length
    return next(at for at in range(length) if edge[at] != ids[start + at])
