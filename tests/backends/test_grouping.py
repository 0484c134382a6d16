"""The choice of common beginnings against trying out all choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import pytest

from burnish.backends.decoding.grouping import Plan, choose

Tokens = tuple[int, ...]


def beginnings(prompts: Sequence[Tokens]) -> list[Tokens]:
    """Where two prompts part or one of them ends, without last tokens."""
    found = set()
    for one, other in combinations([prompt[:-1] for prompt in prompts], 2):
        same = next((at for at, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), None)
        found.add(one[: min(len(one), len(other)) if same is None else same])
    return sorted(found - {()}, key=len)


def cost(prompts: Sequence[Tokens], chosen: Iterable[Tokens], nested: bool, price: int, cached: Sequence[int]) -> int:
    """Tokens and prices when exactly these beginnings are computed."""

    def known(prefix: Tokens) -> int:
        return max(
            (min(c, len(prefix)) for p, c in zip(prompts, cached, strict=True) if p[: len(prefix)] == prefix), default=0
        )

    def before(text: Tokens) -> int:
        return max((len(one) for one in chosen if len(one) < len(text) and text[: len(one)] == one), default=0)

    chosen = list(chosen)
    paid = sum(price + max(0, len(one) - max(before(one) if nested else 0, known(one))) for one in chosen)
    return paid + sum(len(one) - max(before(one), c) for one, c in zip(prompts, cached, strict=True))


def paid(plan: Plan, prompts: Sequence[Tokens], nested: bool, price: int, cached: Sequence[int]) -> int:
    assert plan.tokens == cost(prompts, plan.prefixes, nested, 0, cached)
    return plan.tokens + price * len(plan.prefixes)


def random_prompts(seed: int, count: int = 7) -> list[Tokens]:
    """Prompts that go on from a beginning of an earlier one."""
    random = np.random.default_rng(seed)
    made: list[Tokens] = []
    for _ in range(count):
        start: Tokens = ()
        if made:
            one = made[random.integers(len(made))]
            start = one[: random.integers(0, len(one) + 1)]
        made.append((*start, *map(int, random.integers(0, 3, random.integers(1, 6)))))
    return made


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("price", [0, 2])
def test_no_choice_is_better(nested: bool, price: int) -> None:
    for seed in range(60):
        prompts = random_prompts(seed)
        random = np.random.default_rng(seed)
        cached = [0] * len(prompts)
        if seed % 2 and nested:  # what is held of one prompt is held of all that begin with it
            held = [one[: random.integers(0, len(one))] for one in prompts[:3]]
            cached = [
                max(next((k for k in range(min(len(h), len(p) - 1), 0, -1) if h[:k] == p[:k]), 0) for h in held)
                for p in prompts
            ]
        plan = choose(prompts, nested=nested, price=price, cached=cached)
        every = beginnings(prompts)
        best = min(
            cost(prompts, some, nested, price, cached) for n in range(len(every) + 1) for some in combinations(every, n)
        )
        assert paid(plan, prompts, nested, price, cached) == best, (seed, prompts)


def test_nested_beginnings_without_a_price_leave_each_token_of_the_tree_once() -> None:
    for seed in range(40):
        prompts = random_prompts(seed, 20)
        tree = {one[:k] for one in prompts for k in range(1, len(one))}
        assert choose(prompts).tokens == len(tree) + len(prompts)
        assert choose(prompts, nested=False).tokens >= choose(prompts).tokens


def test_the_gain_is_that_of_the_recursion_in_the_paper() -> None:
    """G(v, d) = max(sum G(child, d), -D(v) + sum G(child, D(v))), a prompt gains d."""
    for seed in range(40):
        prompts = random_prompts(seed)
        every = set(beginnings(prompts))

        def gain(start: Tokens, rest: list[Tokens], d: int, every: set[Tokens] = every) -> int:
            inside = sorted((one for one in every if len(one) > len(start) and one[: len(start)] == start), key=len)
            first = [one for one in inside if not any(other != one and one[: len(other)] == other for other in inside)]
            total, left = 0, list(rest)
            for child in first:
                mine = [one for one in left if one[:-1][: len(child)] == child]
                left = [one for one in left if one not in mine]
                total += max(gain(child, mine, d), -len(child) + gain(child, mine, len(child)))
            return total + d * len(left)

        assert choose(prompts, nested=False).tokens == sum(map(len, prompts)) - gain((), prompts, 0)


def test_uses_and_order() -> None:
    long, short = (5,) * 30, (6,) * 20
    prompts = [(*long, 1), (9, 9), (*short, 1, 1), (*long, *short, 2), (*short, 3), (*long, *short, 4, 4), (9, 8, 7)]
    plan = choose(prompts, price=4)
    assert set(plan.prefixes) == {long, (*long, *short), short}
    for prompt, numbers in zip(prompts, plan.uses, strict=True):
        for number in numbers:
            assert prompt[: len(plan.prefixes[number])] == plan.prefixes[number]
        assert [len(plan.prefixes[n]) for n in numbers] == sorted(len(plan.prefixes[n]) for n in numbers)
    assert [len(each) for each in plan.uses] == [1, 0, 1, 2, 1, 2, 0]
    assert plan.order == (4, 2, 0, 3, 5, 1, 6)
    assert choose(prompts, price=100).prefixes == ()
    alone = choose(prompts, nested=False)
    assert all(len(each) <= 1 for each in alone.uses)


def test_prompts_that_are_the_same_and_prompts_of_one_token() -> None:
    plan = choose([(1, 2, 3)] * 4 + [(7,)] * 3)
    assert plan.prefixes == ((1, 2),) and plan.tokens == 2 + 4 + 3
    assert choose([]) == Plan((), (), (), 0)


def test_deep_trees_are_no_deep_recursion() -> None:
    prompts = [(3,) * length for length in range(1, 1500)]
    assert choose(prompts).tokens == 1498 + 1499
