"""Which beginnings of prompts are computed once, for all prompts that have them: exact, on the tree of all prompts.

BatchLLM (arXiv:2412.03594) gives each prompt one shared beginning. The best choice is a recursion over the nodes of the
tree and the beginnings that may lie before each: G(v, d) = max(sum of G(child, d),
-D(v) + sum of G(child, D(v))), where D is the length of the beginning that ends at v, d that of the nearest chosen one
before it, and G of a prompt is d, what it need not compute. Here costs are added up, and a chosen beginning may go on
from the one before it (`nested`), so that it costs D(v) - d.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from burnish.backends.decoding.radix import Tokens, common


@dataclass(frozen=True)
class Plan:
    """What is computed once.

    Attributes:
        prefixes: the chosen beginnings, each behind those that are its own beginning.
        uses: for each prompt, the numbers of those that it begins with, the shortest first.
        order: all prompts, such that those of one beginning are neighbours; of these, the shorter ones first. Those of
            none come last.
        tokens: that are computed, where there is room for the beginnings.
    """

    prefixes: tuple[Tokens, ...]
    uses: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    tokens: int


class _Node:
    """A beginning that several prompts have, or a prompt without its last token, which no cache can replace."""

    def __init__(self, parent: _Node | None, end: int) -> None:
        self.parent = parent
        self.end = end
        self.children: list[_Node] = []
        self.prompts: list[int] = []
        self.cached = 0
        self.level = 0
        self.costs = np.zeros(0)
        self.takes = np.zeros(0, bool)


def choose(
    prompts: Sequence[Tokens], *, nested: bool = True, price: int = 0, cached: Sequence[int] | None = None
) -> Plan:
    """The beginnings that are worth computing once: no other choice has fewer tokens and prices to pay.

    Args:
        prompts: tokens of each, at least one.
        nested: a chosen beginning goes on from the longest chosen one before it; else each is computed alone, and a
            prompt goes on from one.
        price: of a beginning, in tokens, beside its own; it is a run of the model of its own.
        cached: tokens of each prompt that need not be computed anyway.
    """
    known = [0] * len(prompts) if cached is None else cached
    root = _tree(prompts)
    nodes = list(_downwards(root))
    for node in reversed(nodes):
        below = [known[index] for index in node.prompts] + [child.cached for child in node.children]
        node.cached = min(node.end, max(below, default=0))
    for node in nodes:
        node.level = node.parent.level + 1 if node.parent is not None else 0
    for node in reversed(nodes):
        _weigh(node, prompts, known, nested, price)
    prefixes: list[Tokens] = []
    uses: list[tuple[int, ...]] = [()] * len(prompts)
    left: list[tuple[_Node, int, tuple[int, ...]]] = [(root, 0, ())]
    while left:
        node, state, before = left.pop()
        if node.parent is not None and node.takes[state]:
            one = _below(node)
            state, before = node.level, (*(before if nested else ()), len(prefixes))
            prefixes.append(tuple(prompts[one][: node.end]))
        for index in node.prompts:
            uses[index] = before
        left.extend((child, state, before) for child in reversed(node.children))
    return Plan(tuple(prefixes), tuple(uses), _order(prompts, uses), int(root.costs[0]) - price * len(prefixes))


def _tree(prompts: Sequence[Tokens]) -> _Node:
    """The tree of all prompts without their last tokens; a node ends where prompts part or end."""
    root = _Node(None, 0)
    way: list[_Node] = [root]
    last: Tokens = ()
    for index in sorted(range(len(prompts)), key=lambda index: tuple(prompts[index][:-1])):
        text = tuple(prompts[index][:-1])
        same = common(last, text, 0)
        below = None
        while way[-1].end > same:
            below = way.pop()
        if way[-1].end < same:
            assert below is not None
            made = _Node(way[-1], same)
            way[-1].children[-1] = made
            made.children.append(below)
            below.parent = made
            way.append(made)
        if len(text) > same:
            made = _Node(way[-1], len(text))
            way[-1].children.append(made)
            way.append(made)
        way[-1].prompts.append(index)
        last = text
    return root


def _downwards(root: _Node) -> Iterator[_Node]:
    """Each node after its parent."""
    left = [root]
    while left:
        node = left.pop()
        yield node
        left.extend(reversed(node.children))


def _weigh(node: _Node, prompts: Sequence[Tokens], known: Sequence[int], nested: bool, price: int) -> None:
    """What all below a node costs, for each node on the way to it that may be the nearest chosen one.

    The root stands for none. Of `costs`, the number of a state is the level of that node.
    """
    ends, one = [], node.parent
    while one is not None:
        ends.append(one.end)
        one = one.parent
    before = np.asarray(ends[::-1] or [0], np.int64)
    leaves = node.costs = np.zeros(len(before) + 1, np.int64)
    states = np.append(before, node.end)
    for index in node.prompts:
        leaves += len(prompts[index]) - np.maximum(states, known[index])
    for child in node.children:
        leaves += child.costs if node.parent is not None else child.costs[[0, 0]]
        child.costs = np.zeros(0)
    own = node.end - np.maximum(before, node.cached) if nested else np.full(len(before), node.end - node.cached)
    taken = price + np.maximum(own, 0) + leaves[-1]
    node.takes = taken < leaves[:-1]
    node.costs = np.minimum(taken, leaves[:-1])


def _below(node: _Node) -> int:
    """A prompt that begins with what ends at a node."""
    while not node.prompts:
        node = node.children[0]
    return node.prompts[0]


def _order(prompts: Sequence[Tokens], uses: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    longest: dict[int, int] = {}
    for prompt, each in zip(prompts, uses, strict=True):
        if each:
            longest[each[0]] = max(longest.get(each[0], 0), len(prompt))

    def key(index: int) -> tuple[bool, int, tuple[int, ...], int, int]:
        each, length = uses[index], len(prompts[index])
        return not each, longest[each[0]] if each else length, each, length, index

    return tuple(sorted(range(len(prompts)), key=key))
