"""Residual sums of a run put together into blocks: what repeats is one block, and a layer begins with its mixer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from burnish.ir.views.kinds import MIXERS

_FEED = frozenset(("mlp", "moe"))
_LONGEST = 64
"""Residual sums in the longest period looked for: models that mix kinds of layers repeat within some dozen."""


def role(kinds: Sequence[str]) -> str:
    """What a residual sum is in a layer: `mixer`, `cross`, `feed`, `conv`, or `layer` when it is several of them."""
    found = {
        "mixer" if kind in MIXERS else "cross" if kind == "cross-attention" else "feed" if kind in _FEED else kind
        for kind in kinds
    }
    return found.pop() if len(found) == 1 else "layer" if found else "conv"


def group(keys: Sequence[Hashable], roles: Sequence[str], weights: Sequence[int]) -> list[tuple[int, int]]:
    """The blocks of a run as ranges (begin, end) of its residual sums.

    Args:
        keys: equal for residual sums that compute the same with weights of the same shapes.
        roles: see `role`.
        weights: how much each sum counts in the choice of what repeats.
    """
    found: list[tuple[int, int]] = []
    numbers: dict[Hashable, int] = {}
    keys = [numbers.setdefault(key, len(numbers)) for key in keys]
    for begin, period, times in _repeats(keys, roles, weights, 0, len(keys)):
        if not times:
            found += _by_roles(roles, begin, begin + period)
            continue
        part = _part(roles[begin : begin + period])
        found += [(at, at + part) for at in range(begin, begin + period * times, part)]
    return found


def _repeats(
    keys: Sequence[Hashable], roles: Sequence[str], weights: Sequence[int], low: int, high: int
) -> list[tuple[int, int, int]]:
    """Maximal repeats as (begin, period, times), the heaviest first chosen, and what lies between, with times 0."""
    if low >= high:
        return []
    best: tuple[tuple[int, int, bool, int], int, int, int] | None = None
    covered = [0]
    for weight in weights[low:high]:
        covered.append(covered[-1] + weight)
    for period in range(1, min((high - low) // 2, _LONGEST) + 1):
        same = 0  # how many sums from `begin` on are like the one a period later
        for begin in range(high - period - 1, low - 1, -1):
            same = same + 1 if keys[begin] == keys[begin + period] else 0
            times = same // period + 1
            if times > 1:
                inside = covered[begin - low + period * times] - covered[begin - low]
                score = (inside, -period, roles[begin] not in ("feed", "cross"), -begin)
                if best is None or score > best[0]:
                    best = score, begin, period, times
    if best is None:
        return [(low, high - low, 0)]
    _, begin, period, times = best
    end = begin + period * times
    return [*_repeats(keys, roles, weights, low, begin), best[1:], *_repeats(keys, roles, weights, end, high)]


def _part(roles: Sequence[str]) -> int:
    """The length of the parts of a period that are blocks: layers of the same roles, or single convolutions."""
    if any(one in ("layer",) for one in roles):
        return 1
    for length in range(1, len(roles)):
        if len(roles) % length or not {"mixer", "conv"} & set(roles[:length]):
            continue
        if all(roles[at] == roles[at % length] for at in range(len(roles))):
            return length
    return len(roles)


def _by_roles(roles: Sequence[str], begin: int, end: int) -> list[tuple[int, int]]:
    """Where nothing repeats: a layer begins with a mixer and ends behind what feeds forward."""
    found: list[tuple[int, int]] = []
    start = begin
    for at in range(begin + 1, end):
        if roles[at] in ("mixer", "conv", "layer") or roles[at - 1] in ("conv", "layer"):
            found.append((start, at))
            start = at
    return [*found, (start, end)]
