"""Parts and lines of two graphs that answer to each other."""

import random

import pytest

from burnish.tools.page.alignment import Part, pair, pair_lines
from burnish.tools.page.graphs import graphs
from burnish.tools.page.parts import State


def part(name: str, lines: str, weights: str = "w", origins: tuple[str, ...] = ()) -> Part:
    words = tuple(lines.split())
    return Part(name, lines, weights, words, tuple(f"{name}/{n}" for n in range(len(words))), frozenset(origins))


def blocks(count: int, lines: str = "a b c d") -> list[Part]:
    return [part(f"block {n}", lines, f"w{n}") for n in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_every_line_of_both_is_there_once_and_in_order(seed: int) -> None:
    draw = random.Random(seed)
    old = [f"{draw.choice('abc')}({draw.randrange(3)})" for _ in range(draw.randrange(30))]
    new = [one if draw.random() < 0.6 else f"{draw.choice('abc')}({draw.randrange(3)})" for one in old]
    new = [one for one in new if draw.random() < 0.8]
    found = pair_lines(old, new)
    assert [i for i, _ in found if i is not None] == list(range(len(old)))
    assert [j for _, j in found if j is not None] == list(range(len(new)))


def test_a_line_with_another_operand_stands_beside_the_one_it_was() -> None:
    found = pair_lines(["Shape(x)", "Reshape(Conv, Concat)", "Add(x)"], ["Reshape(Conv, int64[2])", "Add(x)"])
    assert found == [(0, None), (1, 0), (2, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_every_part_of_both_is_there_once_and_in_order(seed: int) -> None:
    draw = random.Random(seed)
    old = [part(f"block {n}", " ".join(draw.choices("abcdef", k=6)), str(n)) for n in range(draw.randrange(1, 12))]
    new = [one for one in old if draw.random() < 0.8] + blocks(draw.randrange(3))
    found = pair(old, new)
    assert [one for one, _ in found if one is not None] == old
    assert [one for _, one in found if one is not None] == new


def test_of_equal_blocks_the_one_that_is_gone_is_known_by_its_weights() -> None:
    old = blocks(6)
    new = [part(f"block {n}", "a b c d", one.weights) for n, one in enumerate(old[:2] + old[3:])]
    assert [one.name for one, other in pair(old, new) if other is None and one is not None] == ["block 2"]


def test_a_rewritten_block_is_known_by_the_nodes_it_comes_from() -> None:
    old = blocks(4)
    new = [part(f"block {n}", "x y", "other", old[at].names) for n, at in enumerate((0, 1, 3))]
    assert [(one.name, other and other.name) for one, other in pair(old, new) if one is not None] == [
        ("block 0", "block 0"),
        ("block 1", "block 1"),
        ("block 2", None),
        ("block 3", "block 2"),
    ]


def test_blocks_that_differ_alike_are_one_piece() -> None:
    old = [part("before block 0", "s"), *blocks(12)]
    new = [part("before block 0", "s"), *(part(f"block {n}", "a b e", f"w{n}") for n in range(12))]
    found = graphs(pair(old, new), "before", "after")
    assert [(one.title, one.state) for one in found.pieces] == [
        ("before block 0", State.SAME),
        ("blocks 0 to 11, all alike", State.CHANGED),
    ]
    assert found.pieces[1].counts == "4 → 3 nodes each"
    assert [len(line.old_names) for line in found.pieces[1].lines] == [12, 12, 12, 12, 0]
    assert found.note == "1 part is the same, 12 parts changed."


def test_a_graph_without_blocks_answers_to_all_parts_of_the_other() -> None:
    split = [part("before block 0", "s"), *blocks(2), part("after block 1", "t"), part("function f", "q")]
    whole = [part("graph", "s a b c d a b c d t"), part("function f", "q")]
    for old, new in ((split, whole), (whole, split)):
        assert [(one and one.name, other and other.name) for one, other in pair(old, new)] == [
            ("graph", "graph"),
            ("function f", "function f"),
        ]


def test_a_function_answers_to_the_one_of_its_name_only() -> None:
    found = pair([part("graph", "a"), part("function f", "q")], [part("graph", "a"), part("function g", "q")])
    assert [(one and one.name, other and other.name) for one, other in found][1:] == [
        ("function f", None),
        (None, "function g"),
    ]
