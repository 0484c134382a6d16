"""Second moments of the rows that layers multiply, from samples, some layers at a time."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as oir

from burnish.passes.factors import steadied
from burnish.passes.gram import Gram
from burnish.passes.layers import STATISTICS, Layer, gram_of, portions, unobservable
from burnish.passes.lossy import Context
from burnish.passes.rank import by_group, features_of
from burnish.passes.sites import Site

ROUNDING = 1e-12
"""What is added to a moment about the mean, as a share of the largest of those about 0: where the mean is all, their
difference is what rounding left, and may be negative.
"""


def moments(
    model: oir.Model,
    groups: Mapping[str, Sequence[Layer]],
    context: Context,
    limit: int = STATISTICS,
    centred: Container[str] = (),
) -> Iterator[tuple[str, np.ndarray | str]]:
    """The moment of the rows that the layers of each group read, all of them together, or why there is none.

    Each group comes once, when it is done; `context.on_step` is told that its layers are rounded then.

    Args:
        model: the model.
        groups: layers with one weight, by name.
        context: samples, and what observes.
        limit: bytes of statistics that are held at once, and of activations.
        centred: groups whose moment is that about the mean.

    Returns:
        Names with float64 [groups, in, in], one group unless it is a grouped convolution, whose rows are patches; mixed
        with a multiple of the unit matrix where few rows were seen; or the reason in plain words.
    """
    layers, owner = {}, {}
    for name, group in groups.items():
        reason = next((why for one in group if (why := unobservable(model, one)) is not None), None)
        if reason is not None:
            yield name, f"what it reads cannot be observed: {reason}"
            continue
        for index, layer in enumerate(group):
            key = f"{name}\n{index}"
            layers[key], owner[key] = layer, name
    wanted = {key: gram_of(layer, exact=owner[key] in centred) for key, layer in layers.items()}
    places = {key: (layers[key].input, gram.axis) for key, gram in wanted.items()}
    keeps = dict(context.keeps(model, places))
    for key, keep in keeps.items():
        if keep is not None and not isinstance(keep, str) and type(wanted[key]) is not Gram:
            keeps[key] = "its patches mix positions"
    refused = {owner[key]: keep for key, keep in keeps.items() if isinstance(keep, str)}
    for name, why in refused.items():
        yield name, f"padding cannot be left out: {why}"
    wanted = {key: gram for key, gram in wanted.items() if owner[key] not in refused}
    if not wanted:
        return
    whole: dict[str, Gram] = {}
    done, total = 0, len({owner[key] for key in wanted})
    left = {name: sum(owner[key] == name for key in wanted) for name in groups}
    observer = context.observe(model)
    for part in portions(layers, wanted, limit):
        sites = {key: Site(layers[key].input, keep) for key in part if not isinstance(keep := keeps[key], str)}
        seen = observer.observe(sites, part, context.samples, limit=limit)
        for key in list(seen):
            found = seen.pop(key)
            assert isinstance(found, Gram)
            name = owner[key]
            left[name] -= 1
            if name in whole:
                whole[name].merge(found)
            else:
                whole[name] = found
            if not left[name]:
                context.on_step("rounding", done, total)
                done += 1
                yield name, _moment(whole.pop(name), features_of(layers[key]), name in centred)
    observer.close()


def _moment(gram: Gram, features: int, centred: bool) -> np.ndarray | str:
    if not gram.rows:
        return "no row was seen: all are padding, or the samples have none"
    moment = gram.matrix / gram.rows
    if centred:
        most = np.diagonal(moment, axis1=-2, axis2=-1).max(initial=0.0)
        moment = gram.covariance + ROUNDING * most * np.eye(moment.shape[-1])
    if not np.isfinite(moment).all():
        return "its input holds NaN, infinity, or numbers too large to be squared"
    return steadied(by_group(moment, features), gram.rows)
