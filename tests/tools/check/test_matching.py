"""Long lists are matched as short ones are, in little time."""

from __future__ import annotations

import random
import time
from difflib import SequenceMatcher

from burnish.tools.check.matching import opcodes, pairs


def test_what_is_equal_is_equal_and_nothing_is_left_out() -> None:
    chance = random.Random(0)
    for _ in range(400):
        one = [chance.choice("abc") for _ in range(chance.randrange(12))]
        other = [item for item in one if chance.random() < 0.8]
        other.insert(chance.randint(0, len(other)), chance.choice("abcd"))
        for first, second in ((one, other), (other, one), (one, one), (one, [])):
            found = list(opcodes(first, second))
            assert [i for _, i1, i2, *_ in found for i in range(i1, i2)] == list(range(len(first)))
            assert [j for *_, j1, j2 in found for j in range(j1, j2)] == list(range(len(second)))
            assert all((first[i1:i2] == second[j1:j2]) == (tag == "equal") for tag, i1, i2, j1, j2 in found)
            assert all(first[i] == second[j] for i, j in pairs(first, second))


def test_one_change_is_found_as_difflib_finds_it() -> None:
    one, other = list("the same model as before"), list("the same models as before")
    plain = SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    assert [code for code in opcodes(one, other) if code[0] != "equal"] == [
        code for code in plain if code[0] != "equal"
    ]


def test_many_lines_that_are_alike_take_little_time() -> None:
    begin = time.process_time()
    lines = list("abc" * 20_000)
    assert [code[0] for code in opcodes(lines, [*lines[:30_000], "d", *lines[30_000:]])] == ["equal", "insert", "equal"]
    assert next(opcodes(lines, ["d", *lines[: -(1 << 13)], "e"]))[0] == "replace"
    assert time.process_time() - begin < 10
