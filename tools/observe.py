"""`burnish.observe`: statistics of the values inside a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes import observing
from burnish.passes import sites as places
from burnish.passes.layers import gram_of, layers, unobservable
from burnish.passes.protocols import Observer
from burnish.passes.reducers import Reducer
from burnish.passes.sites import LIMIT, Keep, Site

Wanted = Iterable[str] | Mapping[str, str | oir.Value | Site]


def observe(
    source: Any,
    sites: Wanted | None = None,
    reducer: Reducer | Mapping[str, Reducer] | None = None,
    *,
    inputs: Any = None,
    data: Any = None,
    mask: str | None = "auto",
    threads: int = 1,
    limit: int = LIMIT,
) -> dict[str, Reducer]:
    """Run a model in ONNX Runtime and reduce what passes through its values, in memory that the samples do not fill.

    Args:
        source: anything that `burnish.load` takes.
        sites: names of values, or values (`onnx_ir.Value`, a name, a `Site`) under names of your own; by default the
            inputs of the linear layers and convolutions of the main graph, under the layers' names.
        reducer: what is wanted of each site, or of all; by default the Gram matrix of the rows that a layer multiplies.
        inputs: example inputs, for a torch module.
        data: samples, as for `burnish.optimize`; made from the model's own meaning when absent.
        mask: the input that says which positions are padding, whose rows do not count. `auto` finds it by what the
            graph does with it; None lets every row count.
        threads: threads inside an operator.
        limit: bytes of values that are held at once.

    Returns:
        A reducer that has seen all samples, for each site.

    Raises:
        InputError: a value cannot be observed, it cannot be told which of its rows are padding, the model refuses a
            sample, a value alone exceeds the limit.
    """
    from burnish.backends.ort.observe import OrtObserver
    from burnish.frontends import load, synthesis
    from burnish.tools.api import samples_for

    model = load(source, inputs)
    chosen, reducers = _resolved(model, sites, reducer)
    chosen = with_mask(model, chosen, reducers, mask)
    samples = samples_for(model, data)
    observer: Observer = OrtObserver(model, threads=threads)
    if data is None:
        samples, _ = synthesis.usable(samples, observer)
        observer.close()
    return observer.observe(chosen, reducers, samples, limit=limit)


def _resolved(
    model: oir.Model, sites: Wanted | None, reducer: Reducer | Mapping[str, Reducer] | None
) -> tuple[dict[str, Site], dict[str, Reducer]]:
    if sites is None:
        found = {name: one for name, one in layers(model).items() if unobservable(model, one) is None}
        chosen = {name: Site(layer.input) for name, layer in found.items()}
        if reducer is None:
            return chosen, {name: gram_of(layer) for name, layer in found.items()}
    else:
        named = sites if isinstance(sites, Mapping) else {name: name for name in sites}
        chosen = {name: _site(model, what) for name, what in named.items()}
    if reducer is None:
        raise InputError("there is no reducer", hint="say what is wanted of the sites: `reducer=Gram()`")
    if isinstance(reducer, Reducer):
        return chosen, dict.fromkeys(chosen, reducer)
    missing = next((name for name in chosen if name not in reducer), None)
    if missing is not None:
        raise InputError("there is no reducer for it", place=f"site `{missing}`")
    return chosen, {name: reducer[name] for name in chosen}


def _site(model: oir.Model, what: str | oir.Value | Site) -> Site:
    if isinstance(what, Site):
        return what
    return Site(what if isinstance(what, oir.Value) else observing.value_named(model, what))


def with_mask(
    model: oir.Model, sites: Mapping[str, Site], reducers: Mapping[str, Reducer], mask: str | None
) -> dict[str, Site]:
    """The sites, with the rows that count where they do not say so; arguments and errors as for `observe`."""
    keeps = keeps_of(model, {name: (site.value, reducers[name].feature_axis) for name, site in sites.items()}, mask)
    found = {}
    for name, site in sites.items():
        keep = keeps[name]
        if site.keep is None and isinstance(keep, str):
            raise InputError(
                f"it cannot be told which of its rows are padding: {keep}",
                place=f"site `{name}`",
                hint="let every row count with `mask=None`, or give a `Site` with a `Keep`",
            )
        found[name] = site if site.keep is not None or isinstance(keep, str) else Site(site.value, keep)
    return found


def keeps_of(
    model: oir.Model, values: Mapping[str, tuple[oir.Value, int | None]], mask: str | None = "auto"
) -> dict[str, Keep | str | None]:
    """Which rows of each value count, as `burnish.passes.sites.aligned` says; all of them where there is no mask.

    Of several masks, as an encoder and a decoder have, the one that fits a value says it.

    Args:
        model: the model.
        values: values, each with the axis of its features.
        mask: as for `observe`.
    """
    from burnish.frontends.roles import roles
    from burnish.ir.inference import Inference

    meanings = roles(model) if mask is not None else {}
    names = [name for name, role in meanings.items() if role.kind == "mask"] if mask == "auto" else [mask or ""]
    if mask is None or not names:
        return dict.fromkeys(values)
    given = {str(value.name): value for value in model.graph.inputs}
    if names[0] not in given:
        raise InputError(f"the model has no input `{names[0]}`", place="mask")
    facts = Inference(model)
    cached = any(one.kind == "past" for one in meanings.values())
    new = [name for name, one in meanings.items() if cached and one.kind in ("ids", "positions")]
    tail = given[new[0]] if new else None

    def keep(value: oir.Value, axis: int | None) -> Keep | str | None:
        if places.stored(value) is not None:
            return None
        found = []
        for name in names:
            role = meanings.get(name)
            kept, additive = (role.kept, role.additive) if role is not None and role.kind == "mask" else (1, False)
            found.append(places.aligned(value, axis, given[name], facts, kept=kept, additive=additive, tail=tail))
        fitting = [one for one in found if isinstance(one, Keep)]
        if len(fitting) > 1:
            return "several masks fit: " + ", ".join(f"`{one.input}`" for one in fitting)
        reasons = [one for one in found if isinstance(one, str)]
        return fitting[0] if fitting else "; ".join(reasons) if reasons else None

    return {name: keep(value, axis) for name, (value, axis) in values.items()}
