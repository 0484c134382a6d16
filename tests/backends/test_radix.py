"""Trees of token sequences against plain dictionaries: what is found, what it holds, and that no byte is too many."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from burnish.backends.decoding.radix import Counting, Node, Rule, Tree, Work

BYTES = 24


class Arrays:
    """Holds a number for each token that tells all tokens before it."""

    token_bytes, part_bytes = BYTES, 8

    def part(self, held: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray]:
        return held[:at].copy(), held[at:].copy()


class Watched(Tree):
    """Counts nothing beyond its budget."""

    def _count(self, more: int) -> None:
        super()._count(more)
        assert 0 <= self.bytes <= self.budget


def marks(ids: tuple[int, ...]) -> np.ndarray:
    """Three numbers of eight bytes for each token: itself, its place, and a hash of all up to it."""
    return np.asarray([(one, at, hash(ids[: at + 1])) for at, one in enumerate(ids)], np.int64).reshape(-1, 3)


def taking(ids: tuple[int, ...]) -> Callable[[int, int], np.ndarray]:
    return lambda start, end: marks(ids)[start:end].copy()


def sequences(count: int, seed: int, alphabet: int = 3, longest: int = 12) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    return [tuple(map(int, random.integers(0, alphabet, random.integers(1, longest)))) for _ in range(count)]


def sound(tree: Tree) -> None:
    """What is counted is there, tokens of children differ, and arrays own their memory."""
    nodes = list(tree.nodes())
    assert sum(node.held.nbytes for node in nodes) == tree.bytes == len(tree) * BYTES
    for node in nodes:
        assert node.parent is not None and node.parent.children[node.tokens[0]] is node
        assert len(node.held) == len(node.tokens) > 0 and node.held.base is None
        assert node.end == node.parent.end + len(node.tokens)
    assert {id(one) for one in tree._leaves} == {id(one) for one in nodes if not one.children}


@pytest.mark.parametrize("seed", range(6))
def test_the_longest_beginning_of_all_is_found_with_what_it_holds(seed: int) -> None:
    tree, added = Watched(Arrays(), 1 << 20), set[tuple[int, ...]]()
    for ids in sequences(120, seed, alphabet=2 + seed % 3):
        found = tree.match(ids)
        assert found.length == max((k for k in range(len(ids) + 1) if ids[:k] in added), default=0)
        pieces = [held[:count] for held, count in found.pieces()]
        np.testing.assert_array_equal(np.concatenate([np.zeros((0, 3), np.int64), *pieces]), marks(ids)[: found.length])
        assert tree.add(ids, taking(ids)).length == len(ids)
        added |= {ids[:k] for k in range(len(ids) + 1)}
        sound(tree)
    assert len(tree) == len(added) - 1 and tree.evicted == 0


@pytest.mark.parametrize("budget", [0, BYTES - 1, BYTES, 5 * BYTES, 30 * BYTES + 7])
@pytest.mark.parametrize("rule", [None, Rule(), Rule(1.0, Work(1.0, 0.1))])
def test_the_budget_holds_at_every_step(budget: int, rule: Rule | None) -> None:
    tree = Watched(Arrays(), budget, rule)
    random = np.random.default_rng(1)
    pins: list[tuple[tuple[int, ...], Node]] = []
    for ids in sequences(300, 5):
        length = tree.add(ids, taking(ids)).length
        assert tree.match(ids).length == length <= len(ids)
        if random.random() < 0.2 and length:
            pins.append((ids[:length], tree.pin(ids[:length])))
        if len(pins) > 3:
            tree.unpin(pins.pop(0)[1])
        for held, _ in pins:
            assert tree.match(held).length == len(held)
        sound(tree)
    assert tree.most <= budget
    if rule is None:
        assert tree.evicted == 0
    elif budget >= BYTES:
        assert tree.evicted > 0


def test_reserving_says_what_adding_holds() -> None:
    for rule in (None, Rule()):
        tree = Watched(Arrays(), 12 * BYTES, rule)
        for ids in sequences(200, 3):
            wanted = tree.reserve(ids)
            assert tree.add(ids, taking(ids)).length == wanted


def test_counting_holds_what_arrays_hold() -> None:
    one, other = Tree(Arrays(), 14 * BYTES, Rule(0.5)), Tree(Counting(BYTES, 8), 14 * BYTES, Rule(0.5))
    for ids in sequences(200, 7):
        assert one.add(ids, taking(ids)).length == other.add(ids, lambda start, end: None).length
        assert (one.bytes, one.most, one.evicted) == (other.bytes, other.most, other.evicted)


def test_what_failed_to_be_taken_is_not_counted() -> None:
    tree = Watched(Arrays(), 1 << 10, Rule())
    tree.add((1, 2, 3), taking((1, 2, 3)))

    def fails(start: int, end: int) -> np.ndarray:
        raise MemoryError

    with pytest.raises(MemoryError):
        tree.add((1, 2, 4, 5), fails)
    sound(tree)
    assert tree.match((1, 2, 4, 5)).length == 2 and tree.match((1, 2, 3)).length == 3


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = Tree(Arrays(), 6 * BYTES, Rule())
    for ids in ((1, 1), (2, 2), (3, 3), (1, 1)):
        tree.add(ids, taking(ids))
    tree.add((4, 4), taking((4, 4)))
    assert [tree.match((one, one)).length for one in (1, 2, 3, 4)] == [2, 0, 2, 2]
    tree.add((3, 3, 3, 3), taking((3, 3, 3, 3)))  # what lies before a leaf stays with it
    assert [tree.match((one,) * 4).length for one in (1, 3, 4)] == [0, 4, 2]


def test_the_score_is_that_of_the_paper() -> None:
    """Three leaves under work of n ** 2: the values of S by hand.

    Ages 3, 2 and 1 (one more than the uses behind): 1 / age is 1/3, 1/2 and 1, scaled 0, 1/4 and 1. Work for each token
    is the sum of where it begins and ends: 8 + 0, 2 + 0 and 4 + 0, scaled 1, 0 and 1/3.
    """
    lengths, root = (8, 2, 4), Node(None, (), None, 0)
    leaves = [Node(root, (at,) * length, None, at) for at, length in enumerate(lengths)]
    work = Work(0.0, 1.0)
    for alpha, gone in ((0.0, 0), (0.2, 0), (0.3, 1), (2.0, 1)):
        scores = [alpha, 0.25, 1 + alpha / 3]
        assert gone == scores.index(min(scores))
        assert Rule(alpha, work).first(leaves, 2) is leaves[gone]
    deep = Node(leaves[0], (9, 9), None, 0)  # behind 8 tokens: 8 + 10 for each, the most
    assert Rule(2.0, work).first([leaves[1], deep], 2) is leaves[1]
    assert Rule(0.0, work).first([leaves[1], deep], 2) is deep


def test_a_pinned_end_keeps_what_is_before_it_and_drops_it_in_the_end() -> None:
    tree = Watched(Arrays(), 1 << 10)
    outer, inner = (1, 2, 3), (1, 2, 3, 4, 5)
    for ids in (outer, inner):
        tree.add(ids, taking(ids))
    pins = [tree.pin(outer), tree.pin(inner)]
    other = (1, 2, 9)
    tree.add(other, taking(other))  # parts the pinned node
    sound(tree)
    tree.unpin(pins[0], drop=True)
    assert tree.match(inner).length == 5
    tree.unpin(pins[1], drop=True)
    assert tree.match(inner).length == 2 and tree.match(other).length == 3
    tree.unpin(tree.pin(other), drop=True)
    assert tree.bytes == 0 and not list(tree.nodes())


def test_sequences_of_any_length_are_no_deep_recursion() -> None:
    tree = Tree(Counting(1), 1 << 40, Rule())
    for length in range(1, 1200):
        tree.add((7,) * length, lambda start, end: None)
    assert len(tree) == 1199 and tree.match((7,) * 5000).length == 1199
