"""Heads of keys and values in fewer heads: averaged, chosen, or fitted to what queries and outputs see of them.

Keys k and values v of a head are rows of matrices; in the place of the heads i of a group stands one, and each head is
read through a small matrix that goes into the weights of queries and output:

    k_i ~ A_i k,  q'k_i ~ (A_i'q)'k        v_i ~ B_i v,  O v_i ~ (O B_i) v

The one head that loses the least is spanned by the leading eigenvectors of the heads' common moment, each head weighted
by what reads it. Rotary embedding turns pairs of elements by an angle that depends on the position, so between it and
the projection only multiples of rotations of each pair may stand: one complex number for each head and pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from burnish.ir.views.attention_layer import Heads

Way = Literal["fit", "mean", "first", "random"]
Groups = list[list[int]]


@dataclass(frozen=True, eq=False)
class Turn:
    """What lies between the projection of keys and their product with queries.

    Attributes:
        pairs: int64 [2, pairs], the elements that rotary embedding turns together; empty for none.
        normed: queries or keys are normed head by head, so no matrix can be moved from the one to the other.
        fixed: query heads have to stay in their order: a mask tells them apart.
    """

    pairs: np.ndarray
    normed: bool
    fixed: bool


@dataclass(frozen=True, eq=False)
class Merge:
    """How heads become fewer.

    Attributes:
        join: float64 [groups, size, heads, size], what makes the new heads of the old ones.
        part: float64 [heads, size, groups, size], what stands in the place of the old heads, made of the new ones.
    """

    join: np.ndarray
    part: np.ndarray


@dataclass(frozen=True, eq=False)
class Pooled:
    """A layer, and those that read its keys and values, with fewer heads of these.

    Attributes:
        heads: their weights, the layer's own first with key [groups, size, in]; keys and values of the others are None.
        keys, values: how they became fewer.
    """

    heads: list[Heads]
    keys: Merge
    values: Merge


@dataclass(frozen=True, eq=False)
class _Side:
    """Keys or values of a layer, as far as grouping them costs something.

    Attributes:
        blocks: for each part that is fitted alone, [heads, elements, in + 1], real or complex, weighted by what reads.
        roots: for each part the weights, [heads, elements, elements].
        moment: float64 [in + 1, in + 1].
    """

    blocks: tuple[np.ndarray, ...]
    roots: tuple[np.ndarray, ...]
    moment: np.ndarray

    @cached_property
    def grams(self) -> list[np.ndarray]:
        """[heads, elements, heads, elements] for each part."""
        found = []
        for block in self.blocks:
            flat = block.reshape(-1, block.shape[-1])
            seen = flat.real @ self.moment
            if np.iscomplexobj(flat):
                seen = seen + 1j * (flat.imag @ self.moment)
            found.append((seen @ flat.conj().T).reshape(block.shape[:2] * 2))
        return found


def pooled(
    readers: Sequence[Heads], groups: int, way: Way, turn: Turn, moments: Sequence[np.ndarray], seed: int
) -> Pooled:
    """The weights of a layer, and of those that read its keys and values, with fewer heads of keys and values.

    Args:
        readers: the layer itself, then those that read its keys and values, whose own are ignored.
        groups: how many heads of keys and values there will be; it divides their number.
        way: `mean` (Ainslie et al., arXiv:2305.13245), `first` or `random` of neighbouring heads, whose queries and
            outputs stay; or `fit`.
        turn: of the layer.
        moments: for each reader the moment of what it reads with a one behind it, float64 [in + 1, in + 1].
        seed: of `random`.
    """
    own = readers[0]
    assert own.key is not None and own.value is not None
    count = len(own.key)
    chosen = [list(range(at, at + count // groups)) for at in range(0, count, count // groups)]
    if way != "fit":
        picks = np.random.default_rng(seed).integers(0, count // groups, groups) if way == "random" else [0] * groups
        taken = chosen if way == "mean" else [[group[pick]] for group, pick in zip(chosen, picks, strict=True)]
        sides = [_averaged(chosen, taken, one.shape[1]) for one in (own.key, own.value)]
        return Pooled(_written(readers, chosen, *sides), *sides)
    shifted = own.value_bias is not None or all(one.output_bias is not None for one in readers)
    values = _values(readers, moments[0], shifted)
    keys = None if turn.normed else _keys(readers, turn, moments)
    if 1 < groups and not turn.fixed:
        costs = [_cost(side.grams) for side in (keys, values) if side is not None]
        alike = [_alike(own.key, own.key_bias, moments[0])] if keys is None else []
        chosen = _grouped(chosen, [*costs, *alike])
    value = _shared(values, chosen)
    key = _averaged(chosen, chosen, own.key.shape[1]) if keys is None else _joined(keys, turn, chosen, own.key.shape[1])
    heads = _written(readers, chosen, key, value)
    return Pooled(_shifted(readers, heads, moments[0]) if shifted else heads, key, value)


def _averaged(groups: Groups, taken: Groups, size: int) -> Merge:
    """The mean of some heads of each group in the place of all."""
    count = sum(map(len, groups))
    join, part = np.zeros((len(groups), size, count, size)), np.zeros((count, size, len(groups), size))
    for index, (group, some) in enumerate(zip(groups, taken, strict=True)):
        for head in some:
            join[index, :, head] = np.eye(size) / len(some)
        for head in group:
            part[head, :, index] = np.eye(size)
    return Merge(join, part)


def _written(readers: Sequence[Heads], groups: Groups, keys: Merge, values: Merge) -> list[Heads]:
    """The new weights; queries and outputs stand in the order of the groups."""
    own = readers[0]
    assert own.key is not None and own.value is not None
    order, found = [head for group in groups for head in group], []
    for one in readers:
        repeats = len(one.query) // len(own.key)
        take = [head * repeats + step for head in order for step in range(repeats)]
        by = np.repeat(order, repeats)
        asked, seen = keys.part.sum(2)[by], values.part.sum(2)[by]
        found.append(
            replace(
                one,
                query=asked.swapaxes(1, 2) @ one.query[take],
                query_bias=None if one.query_bias is None else np.einsum("hde,hd->he", asked, one.query_bias[take]),
                output=(one.output[:, take].swapaxes(0, 1) @ seen).swapaxes(0, 1),
                key=None,
                value=None,
            )
        )
    made = [
        None if one is None else np.tensordot(merge.join, one, 2)
        for merge, one in ((keys, own.key), (keys, own.key_bias), (values, own.value), (values, own.value_bias))
    ]
    found[0] = replace(found[0], key=made[0], key_bias=made[1], value=made[2], value_bias=made[3])
    return found


def _shifted(readers: Sequence[Heads], heads: Sequence[Heads], moment: np.ndarray) -> list[Heads]:
    """What the values lost that is the same for all tokens comes behind the outputs.

    Attention gives the values of a query shares that sum to one.
    """
    found, mean = [], moment[-1]
    before, after = (_wide(one.value, one.value_bias) @ mean for one in (readers[0], heads[0]) if one.value is not None)
    for old, new in zip(readers, heads, strict=True):
        lost = np.einsum("ohd,hd->o", old.output, np.repeat(before, len(old.query) // len(before), 0))
        again = np.einsum("ohd,hd->o", new.output, np.repeat(after, len(old.query) // len(after), 0))
        base = np.zeros(len(old.output)) if old.output_bias is None else old.output_bias
        found.append(replace(new, output_bias=base + lost - again))
    return found


def _wide(weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """[..., in + 1]: the bias is the weight of the one."""
    last = np.zeros(weight.shape[:-1]) if bias is None else bias
    return np.concatenate([weight, last[..., None]], -1)


def _values(readers: Sequence[Heads], moment: np.ndarray, shifted: bool) -> _Side:
    own = readers[0]
    assert own.value is not None
    count = len(own.value)
    seen = np.zeros((count, *own.value.shape[1:2] * 2))
    for one in readers:
        output = one.output.swapaxes(0, 1).reshape(count, -1, own.value.shape[1])
        seen += output.swapaxes(1, 2) @ output
    roots = _roots(seen)
    return _Side((roots @ _wide(own.value, own.value_bias),), (roots,), _centred(moment) if shifted else moment)


def _keys(readers: Sequence[Heads], turn: Turn, moments: Sequence[np.ndarray]) -> _Side:
    own = readers[0]
    assert own.key is not None
    count, size = own.key.shape[:2]
    asked = np.zeros((count, size, size))
    for one, moment in zip(readers, moments, strict=True):
        query = _wide(one.query, one.query_bias).reshape(count, -1, size, one.query.shape[-1] + 1)
        asked += ((query @ moment) @ query.swapaxes(-1, -2)).sum(1)
    wide = _wide(own.key, own.key_bias)
    if not turn.pairs.size:
        # what all keys have in common changes no softmax
        roots = _roots(asked)
        return _Side((roots @ wide,), (roots,), _centred(moments[0]))
    first, second = turn.pairs
    blocks, weights = [], []
    for a, b in zip(first, second, strict=True):
        weight = np.sqrt((asked[:, a, a] + asked[:, b, b]) / 2)
        blocks.append((weight[:, None] * (wide[:, a] + 1j * wide[:, b]))[:, None])
        weights.append(weight[:, None, None])
    rest = _rest(turn, size)
    if rest.size:
        weights.append(_roots(asked[:, rest][:, :, rest]))
        blocks.append(weights[-1] @ wide[:, rest])
    return _Side(tuple(blocks), tuple(weights), moments[0])


def _rest(turn: Turn, size: int) -> np.ndarray:
    return np.setdiff1d(np.arange(size), turn.pairs)


def _centred(moment: np.ndarray) -> np.ndarray:
    """The moment about the mean; the last row is the mean and a one."""
    return np.asarray(moment - np.outer(moment[-1], moment[-1]))


def _roots(squares: np.ndarray) -> np.ndarray:
    """Symmetric roots of positive semi-definite matrices [..., size, size]."""
    values, vectors = np.linalg.eigh(squares)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ vectors.swapaxes(-1, -2))


def _shared(side: _Side, groups: Groups, part: int = 0) -> Merge:
    """The heads that stand for the groups and lose the least; of pairs of elements as complex numbers, too."""
    block, roots, gram = side.blocks[part], side.roots[part], side.grams[part]
    count, size = block.shape[:2]
    made = Merge(
        np.zeros((len(groups), size, count, size), block.dtype), np.zeros((count, size, len(groups), size), block.dtype)
    )
    for index, group in enumerate(groups):
        joint = gram[group][:, :, group].reshape(len(group) * size, -1)
        leading = np.linalg.eigh(joint)[1][:, : -size - 1 : -1].reshape(len(group), size, size)
        inverse = np.linalg.pinv(roots[group], rcond=1e-6)
        join = leading.conj().swapaxes(1, 2) @ roots[group]
        # as large as the heads that it stands for, so that caches keep the range of their numbers
        was = np.linalg.norm(inverse @ block[group]) / np.sqrt(len(group))
        now = np.linalg.norm((join @ inverse @ block[group]).sum(0))
        factor = was / now if was > 0 and now > 0 else 1.0
        made.join[index][:, group] = factor * join.swapaxes(0, 1)
        made.part[group, :, index] = inverse @ leading / factor
    return made


def _joined(side: _Side, turn: Turn, groups: Groups, size: int) -> Merge:
    """`_shared` for keys whose pairs of elements are complex numbers and the others a part of their own."""
    if not turn.pairs.size:
        return _shared(side, groups)
    count = len(side.blocks[0])
    made = Merge(np.zeros((len(groups), size, count, size)), np.zeros((count, size, len(groups), size)))
    for part, (a, b) in enumerate(turn.pairs.T):
        one = _shared(side, groups, part)
        for whole, number in ((made.join, one.join[:, 0, :, 0]), (made.part, one.part[:, 0, :, 0])):
            whole[:, a, :, a] = whole[:, b, :, b] = number.real
            whole[:, b, :, a], whole[:, a, :, b] = number.imag, -number.imag
    rest = _rest(turn, size)
    if rest.size:
        one = _shared(side, groups, len(side.blocks) - 1)
        for whole, few in ((made.join, one.join), (made.part, one.part)):
            whole[np.ix_(range(len(whole)), rest, range(whole.shape[2]), rest)] = few  # type: ignore[arg-type]
    return made


Cost = Callable[[Sequence[int]], float]


def _cost(grams: Sequence[np.ndarray]) -> Cost:
    """What a group loses when one head stands for it, as a share of all that there is in all parts."""
    whole = sum(float(np.einsum("gdgd->", gram).real) for gram in grams)

    def cost(group: Sequence[int]) -> float:
        left = 0.0
        for gram in grams:
            size = gram.shape[1]
            joint = gram[list(group)][:, :, list(group)].reshape(len(group) * size, -1)
            left += float(np.linalg.eigvalsh(joint)[:-size].sum())
        return left / whole if whole else 0.0

    return cost


def _alike(weight: np.ndarray, bias: np.ndarray | None, moment: np.ndarray) -> Cost:
    """What a group loses when the mean of its heads stands for it, as a share of all that there is."""
    wide = _wide(weight, bias)
    gram = np.einsum("gdi,ij,hdj->gh", wide, moment, wide, optimize=True)
    whole = float(np.trace(gram))

    def cost(group: Sequence[int]) -> float:
        joint = gram[np.ix_(list(group), list(group))]
        return float(np.trace(joint) - joint.sum() / len(group)) / whole if whole else 0.0

    return cost


def _grouped(groups: Groups, costs: Sequence[Cost]) -> Groups:
    """Groups of the same size that cost less: two heads change places as long as that helps."""
    known: dict[tuple[int, ...], float] = {}

    def cost(group: Sequence[int]) -> float:
        key = tuple(sorted(group))
        if key not in known:
            known[key] = sum(one(key) for one in costs)
        return known[key]

    found = [list(group) for group in groups]
    while True:
        best, move = -1e-9, None
        for i, one in enumerate(found):
            for j in range(i + 1, len(found)):
                before = cost(one) + cost(found[j])
                for a in range(len(one)):
                    for b in range(len(found[j])):
                        left = [*one[:a], found[j][b], *one[a + 1 :]]
                        right = [*found[j][:b], one[a], *found[j][b + 1 :]]
                        gain = cost(left) + cost(right) - before
                        if gain < best:
                            best, move = gain, (i, sorted(left), j, sorted(right))
        if move is None:
            return sorted(found)
        found[move[0]], found[move[2]] = move[1], move[3]
