"""What layers save with fewer heads of keys and values, found on a copy, and what their new weights are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as oir

from burnish.passes import kv_operators
from burnish.passes.factors import steadied
from burnish.passes.gram import Gram
from burnish.passes.kv_families import Family, families, obstacle, rebuilt, turn_of
from burnish.passes.kv_heads import Pooled, Way, pooled
from burnish.passes.kv_layers import KeyLayer, KeyLayers
from burnish.passes.kv_pooling import pool, settle
from burnish.passes.lossy import Context, Savings
from burnish.passes.sites import Site, refusal


def tried(
    found: KeyLayers, wanted: Iterable[tuple[Family, int]], way: Way, dims: Mapping[str, int]
) -> Iterator[tuple[Family, int, Savings | str]]:
    """What layers save when they have so many heads of keys and values, or why they cannot.

    It is done on a copy, which is read again: what the view does not find there as it should be is left alone.

    Args:
        found: the layers of a model, which is not changed.
        wanted: layers, and numbers that divide that of their heads of keys and values.
        way: as for `kv_heads.pooled`; there are no samples.
        dims: numbers for symbolic dimensions, for multiply-adds.
    """
    asked = list(wanted)
    reasons = {family: obstacle(found, family) for family, _ in asked}
    results: dict[tuple[Family, int], Savings | str] = {}
    for groups in dict.fromkeys(number for _, number in asked):
        for some in _apart(found, [f for f, number in asked if number == groups and reasons[f] is None]):
            own = {f.layer.anchor.name: f for f in some}
            copy = KeyLayers(found.model.clone())
            stored = []
            for family in families(copy):
                if family.layer.anchor.name in own:
                    before = _stored(copy.model)
                    pool(copy, [(family, groups, weights_of(copy, family, groups, way, {}, 0))], settled=False)
                    left = {str(node.name) for node in copy.model.graph}
                    stored.append((own[family.layer.anchor.name], before, _stored(copy.model), left))
            settle(copy.model)
            seen = {one.layer.anchor.name: one for one in KeyLayers(copy.model).layers}
            for family, before, after, left in stored:
                if all(_as_before(one, seen.get(one.layer.anchor.name), groups) for one in family.readers):
                    macs = _multiply_adds(found, family, groups, left, dims)
                    results[family, groups] = Savings(*_saved(found, family, before, after), macs)
                else:
                    results[family, groups] = "its keys and values are laid out in an unknown way"
    for family, number in asked:
        yield family, number, reasons[family] or results[family, number]


def _apart(found: KeyLayers, asked: Sequence[Family]) -> list[list[Family]]:
    """Layers in lists, of which one copy tells what each of them saves alone: one matrix is of one of them only."""
    every = Counter(node for family in families(found) for node in _nodes(family))
    alone = [family for family in asked if any(every[node] > 1 for node in _nodes(family))]
    rest = [family for family in asked if family not in alone]
    return [*([rest] if rest else []), *([family] for family in alone)]


def _nodes(family: Family) -> set[oir.Node]:
    return {node for one in family.readers for node in (*one.layer.nodes, one.layer.anchor)}


def _stored(model: oir.Model) -> dict[str, tuple[int, int]]:
    """Elements and bytes of the constants of a model."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: (one.size, one.nbytes) for name, one in tensors.items() if one is not None}


def _saved(
    found: KeyLayers,
    family: Family,
    before: Mapping[str, tuple[int, int]],
    after: Mapping[str, tuple[int, int]],
) -> tuple[int, int]:
    """The elements and bytes that a layer saves that changes alone: constants that others read as well stay."""
    own, held = _nodes(family), found.model.graph.initializers
    gone = [name for name in before.keys() - after.keys() if all(use.node in own for use in held[name].uses())]
    parameters, size = (
        sum(before[name][i] for name in gone) - sum(after[name][i] for name in after.keys() - before.keys())
        for i in (0, 1)
    )
    return parameters, size


def _as_before(old: KeyLayer, new: KeyLayer | None, groups: int) -> bool:
    """Whether a layer with fewer heads of keys and values is read as what it was."""
    if new is None or new.layer.kv_heads != groups or (old.index, old.owner) != (new.index, new.owner):
        return False
    a, b = old.layer, new.layer
    same = [(x.heads, x.head_size, x.value_size, x.causal, x.window, x.softcap, x.cache.kind, x.cross) for x in (a, b)]
    return same[0] == same[1] and bool(np.isclose(a.scale, b.scale)) and len(a.mask) == len(b.mask)


def weights_of(
    found: KeyLayers, family: Family, groups: int, way: Way, payload: Mapping[str, np.ndarray], seed: int
) -> Pooled:
    """The new weights of the layers of a family.

    Args:
        found: the layers of the model.
        family: some of them.
        groups: heads of keys and values that there will be.
        way: as for `kv_heads.pooled`.
        payload: a `moment` for each of the layers, numbered; all inputs count alike without.
        seed: of the way `random`, beside the number of the layer.
    """
    read = [one.layer.read() for one in family.readers]
    sizes = [one.query.shape[-1] + 1 for one in read]
    moments = [payload.get(f"moment {i}", np.eye(size)) for i, size in enumerate(sizes)]
    return pooled(read, groups, way, turn_of(found, family), moments, seed + family.readers[0].index)


def _multiply_adds(
    found: KeyLayers, family: Family, groups: int, left: Container[str], dims: Mapping[str, int]
) -> int | None:
    """What projections multiply less with so many heads of keys and values; None when the rows are not known.

    A packed matrix goes with all that it makes, or stays whole, as `left` has its node, where it makes something else.
    """
    layer, total, gone = family.layer, 0, set[oir.Node]()
    sources = (layer.source, layer.memory, layer.value_memory)
    for index, (part, source) in enumerate(zip(layer.projections[:3], sources, strict=True)):
        if index == 0 and not kv_operators.shares_matrix(layer):
            continue
        assert part is not None and part.linear is not None
        shape = found.facts.shape(source) or ("?",)
        rows = [one if isinstance(one, int) else dims.get(str(one)) for one in shape[:-1]]
        if not rows or any(one is None for one in rows):
            return None
        less = -(groups if index else part.heads) * part.size
        if part.holder not in gone and not (rebuilt(layer) and str(part.holder.name) in left):
            less += part.linear.out_features
            gone.add(part.holder)
        total += less * part.linear.in_features * int(np.prod([one or 0 for one in rows]))
    return total


def observed(
    model: oir.Model, wanted: Iterable[Family], context: Context
) -> Iterator[tuple[Family, list[np.ndarray] | str]]:
    """For each layer of a family the moment of what it reads with a one behind it, or why there is none."""
    families = list(wanted)
    sources = {one.layer.source for family in families for one in family.readers}
    reasons = {value: refusal(model, value) for value in sources}
    places = {str(value.name): (value, -1) for value, reason in reasons.items() if reason is None}
    keeps = dict(context.keeps(model, places)) if places else {}
    sites = {name: Site(places[name][0], keep) for name, keep in keeps.items() if not isinstance(keep, str)}
    grams = {name: Gram() for name in sites}
    if sites:
        observer = context.observe(model)
        grams = observer.observe(sites, grams, context.samples)  # type: ignore[assignment]
        observer.close()
    for family in families:
        found: list[np.ndarray] = []
        why: str | None = None
        for one in family.readers:
            name = str(one.layer.source.name)
            keep = keeps.get(name)
            reason = reasons[one.layer.source] or (
                f"padding cannot be left out: {keep}" if isinstance(keep, str) else None
            )
            if reason is None and not grams[name].rows:
                reason = "no row was seen: all are padding, or the samples have none"
            why = why or reason
            if why is None:
                found.append(_moment(grams[name]))
        yield family, why or found


def _moment(gram: Gram) -> np.ndarray:
    size = len(gram.mean)
    moment = np.ones((size + 1, size + 1))
    moment[:-1, :-1] = steadied((gram.matrix / gram.rows)[None], gram.rows)[0]
    moment[:-1, -1] = moment[-1, :-1] = gram.mean
    return moment
